"""The surface of Auto_HookPoint: hook points for a model class that has none.

Knows the surface of TransformerLens.
"""
