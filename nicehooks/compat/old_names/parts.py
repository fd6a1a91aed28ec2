"""What a file of this name once held; see NOTE [Names in old pickles]."""

from nicehooks.moved import finder

__getattr__ = finder(__name__)
