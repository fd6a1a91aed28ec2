"""The ports: which value of a module a path means beside its output, and how it is reached.

Knows the core, one port a file; no intervention. Each file puts its ports into the register.
"""

from nicehooks.moved import finder

__getattr__ = finder(__name__)  # see NOTE [Names in old pickles]
