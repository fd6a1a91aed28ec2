"""What messages teach: why something is refused or did nothing, and the line to write instead.

Knows the core; nothing imports it, the core asks for it by name (`core.explaining`).
"""
