"""The cache of activations: what was seen, found again by path.

Knows values, paths and the core; no port by its name, and no intervention.
"""
