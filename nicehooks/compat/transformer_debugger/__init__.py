"""The surface of transformer-debugger: trees of hooks, bound to a model.

Knows the contexts and the anatomies.
"""
