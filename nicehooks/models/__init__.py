"""The language model that can be loaded without a hub.

Knows files, and asks `transformers` for the rest; needs the extra `hf`.
"""
