"""The path language: text that says which values of a model are meant.

Knows values; no model, and no port by its name.
"""

from nicehooks.moved import finder

__getattr__ = finder(__name__)  # see NOTE [Names in old pickles]
