"""The path language: text that says which values of a model are meant.

Knows values; no model, and no port by its name.
"""

from nicehooks.paths.grammar import _parse as _parse  # pyright: ignore[reportPrivateUsage]  # for pickles of before
