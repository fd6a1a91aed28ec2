"""A part of a nested value: read, and rewritten out of place.

Functions here raise `TreeMismatch` with the bare fact; the public edge adds the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from nicehooks import torch_private
from nicehooks.errors import TreeMismatch
from nicehooks.values import regions
from nicehooks.values.nodes import Node, is_nested, is_same, open_node, structure_of
from nicehooks.values.regions import STAR, Chain, Heads, Rows, items_of, show_step


def get(tree: Any, chain: Chain) -> Any:
    """The part of `tree` at the end of `chain`; tensors give views."""
    for step in chain:
        tree = _step(tree, step)
    return tree


def rewrite(tree: Any, chain: Chain, fn: Callable[[Any], Any], may_write: bool = False) -> Any:
    """`tree` with `fn` applied to the part at the end of `chain`; `tree` itself where `fn` returns what it got.

    Nothing is written in place: around a changed part of a tensor, the tensor is new. So it is where it had to be made
    `ready` first, for `fn` to write into too, if it `may_write`.
    """
    tree = regions.ready(tree, may_write)
    if not chain:
        return fn(tree)
    part = _step(tree, chain[0])
    new = rewrite(part, chain[1:], fn, may_write)
    return tree if is_same(new, part) else _replace(tree, chain[0], new)


def length(tree: Any, items: list[Any], position: int) -> int:
    """How many sites the `*` at `position` among the items of a subscript stands for."""
    if not isinstance(tree, Tensor):
        node = open_node(tree)
        if node is None:
            raise TreeMismatch(f"[*] needs a tensor or a container, not {structure_of(tree)}")
        return len(node.children)
    before, after = items[:position], items[position:]
    dim = sum(item is not None for item in before)
    if Ellipsis in before:
        dim = tree.ndim - sum(item is not None for item in after)
    if not 0 <= dim < tree.ndim:
        raise TreeMismatch(f"[*] is at dimension {dim} of {structure_of(tree)}")
    sizes: Any = torch_private.nested_sizes(tree) if is_nested(tree) else tree.shape
    if isinstance(sizes[dim], str):  # it is another for each of the tensors that are nested in this one
        raise TreeMismatch(f"[*] is at dimension {dim} of {structure_of(tree)}, which has no one size there")
    return sizes[dim]


def each_index(tree: Any, chain: Chain) -> Iterator[Chain]:
    """`chain` with each index that `tree` has in the place of a `*`: positions, and in a mapping its keys."""
    for done, step in enumerate(chain):
        items = list(items_of(step))
        stars = [position for position, item in enumerate(items) if item is STAR]
        if stars:
            for index in _indices(get(tree, chain[:done]), items, stars[0]):
                items[stars[0]] = index
                one = tuple(items) if isinstance(step, tuple) else index
                yield from each_index(tree, (*chain[:done], one, *chain[done + 1 :]))
            return
    yield chain


def _indices(tree: Any, items: list[Any], position: int) -> list[Any]:
    node = open_node(tree)
    entries = range(length(tree, items, position)) if node is None else node.entries
    return [entry if type(entry) in (int, str) else number for number, entry in enumerate(entries)]


def _step(tree: Any, step: Any) -> Any:
    if isinstance(tree, Tensor):
        return regions.read_region(tree, step)
    node, position = _child(tree, step)
    return node.children[position]


def _replace(tree: Any, step: Any, new: Any) -> Any:
    if isinstance(tree, Tensor):
        return regions.replaced(tree, step, new)
    node, position = _child(tree, step)
    return node.rebuild([*node.children[:position], new, *node.children[position + 1 :]])


def _child(tree: Any, step: Any) -> tuple[Node, int]:
    """The node of `tree` and the position in it of what `step` names: a position, a key or a field."""
    if isinstance(step, Heads | Rows | tuple | slice):
        raise TreeMismatch(f"{show_step(step)} needs a tensor, not {structure_of(tree)}")
    node = open_node(tree)
    if node is None:
        raise TreeMismatch(f"{show_step(step)} needs a tensor or a container, not {structure_of(tree)}")
    if step in node.names:
        return node, node.names.index(step)
    count = len(node.children)
    if node.counted and isinstance(step, int) and -count <= step < count:
        return node, step % count
    have = ", ".join(repr(name) for name in node.names) or "nothing"
    raise TreeMismatch(f"{show_step(step)} is not in {structure_of(tree)}, which has {have}")
