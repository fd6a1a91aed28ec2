"""Directions in activations: what tells two sets of inputs apart, and what labels can be read off.

Knows caches, contexts and stores.
"""
