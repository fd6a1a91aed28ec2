"""The surface of TransformerLens: hook points, models with hooks by name.

Knows the contexts.
"""
