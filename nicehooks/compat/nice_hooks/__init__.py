"""The surface of nice_hooks: `run`, hooks that are told their path.

Knows the contexts.
"""
