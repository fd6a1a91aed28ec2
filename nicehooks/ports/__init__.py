"""The ports: which value of a module a path means beside its output, and how it is reached.

Knows the core, one port a file; no intervention. Each file puts its ports into the register.
"""
