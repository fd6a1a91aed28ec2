"""The parts of transformers by the names of the field, and what is linear between them.

Knows the contexts; the only room that knows families of transformers.
"""
