"""Activations at scale: from a stream of batches into a store, and back out of it in any order.

Knows contexts and caches; what a store is on disk knows only files and tensors. Whoever trains on activations imports
from here, and nothing below knows that stores exist.
"""
