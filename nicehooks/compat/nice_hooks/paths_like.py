"""What stands for paths, and for the index in one, under the names that nice_hooks has for them."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor

AnySlice: TypeAlias = int | slice | list[Any] | tuple[Any, ...] | Tensor | None
"""The index of a path: what stands between the brackets, or None."""

PathsLike: TypeAlias = str | list[str] | bool | None
"""Paths as text: one, several, all (True) or none (False, None). Every function takes more: see `select`."""


def to_paths(paths: PathsLike) -> list[str]:
    """The paths that `paths` stands for, as a list.

    >>> to_paths("h.*"), to_paths(["a", "b"]), to_paths(True), to_paths(None)
    (['h.*'], ['a', 'b'], ['**'], [])

    Args:
        paths: a path or a list of them; True for all modules, False or None for none.
    """
    if isinstance(paths, bool) or paths is None:
        return ["**"] if paths else []
    return [paths] if isinstance(paths, str) else list(paths)
