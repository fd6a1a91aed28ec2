"""Nested values: taken apart, rebuilt, and the parts of them that a subscript names.

Knows torch and optree; no path, no module of a model.
"""

from nicehooks.values import containers as containers  # which adds its sorts to the table of nodes
