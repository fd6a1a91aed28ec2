"""The surfaces of four other systems, each in a room of its own.

Knows everything below; nothing below knows it.
"""
