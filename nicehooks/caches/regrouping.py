"""One region of a tensor in other subscripts: `[:, 3][:, -1]` is `[:, :, -1][:, 3]`, so it is in what is there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from nicehooks.values.trees import Chain, items_of

MOST_DIMENSIONS = 4
"""Of more subscripted dimensions than these not every grouping is tried."""


def regrouped(chain: Chain) -> Iterator[tuple[Chain, Chain]]:
    """Each other chain that leads to something with the value at `chain` in it, and the way from there.

    >>> from nicehooks.paths.grammar import ModulePath
    >>> chain = ModulePath.parse("h.0[:, 3][:, -1]").chain
    >>> for whole, rest in regrouped(chain):
    ...     print(ModulePath("h.0", chain=whole), rest)
    h.0[:, 3, -1] ()
    h.0[:, 3] ((slice(None, None, None), -1),)
    h.0[:, :, -1] ((slice(None, None, None), 3),)
    """
    start = _start_of_tensor(chain)
    taken = _taken_of(chain[start:])
    if not taken or len(taken) > MOST_DIMENSIONS:
        return
    for count in range(len(taken), 0, -1):
        for some in combinations(sorted(taken), count):
            first = {dim: taken[dim] for dim in some}
            gone = [dim for dim, item in first.items() if isinstance(item, int)]
            rest = {dim - sum(one < dim for one in gone): taken[dim] for dim in taken if dim not in first}
            yield (*chain[:start], _as_subscript(first)), (_as_subscript(rest),) if rest else ()


def _start_of_tensor(chain: Chain) -> int:
    """From where on `chain` has subscripts of a tensor alone: a step before may split dimensions, or be of a tree."""
    start = len(chain)
    while start > 0 and all(map(_is_subscript, items_of(chain[start - 1]))):
        start -= 1
    while start < len(chain) and not isinstance(chain[start], tuple | slice):
        start += 1
    return start


def _is_subscript(item: Any) -> bool:
    return isinstance(item, slice) or type(item) is int


def _taken_of(steps: Chain) -> dict[int, Any]:
    """What `steps` take of each dimension of the tensor; nothing where one takes some of what another took."""
    taken: dict[int, Any] = {}
    for step in steps:
        items = items_of(step)
        ints = [dim for dim, item in taken.items() if isinstance(item, int)]
        there = [dim for dim in range(len(ints) + len(items)) if dim not in ints]
        for dim, item in zip(there, items, strict=False):
            if item == slice(None):
                continue
            if dim in taken:
                return {}
            taken[dim] = item
    return taken


def _as_subscript(taken: dict[int, Any]) -> Any:
    items = tuple(taken.get(dim, slice(None)) for dim in range(max(taken) + 1))
    return items if len(items) > 1 else taken[0]
