"""Nested values: taken apart, rebuilt, and the parts of them that a subscript names.

Knows torch and optree; no path, no module of a model.
"""

# ruff: noqa: F401  # each of these adds its kinds to a table
from nicehooks.values import containers, sharded, shared_memory
