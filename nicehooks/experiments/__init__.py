"""Experiments: many interventions, each alone, and a number for each.

Knows the contexts, the cache and the anatomy; nothing below knows it.
"""
