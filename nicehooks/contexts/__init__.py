"""The interventions, and the functions made of them: what users enter.

Knows the core and the caches; no port by its name, and no family of models.
"""

from nicehooks.moved import finder

__getattr__ = finder(__name__)  # see NOTE [Names in old pickles]
