"""Arithmetic of two nested values, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from nicehooks.errors import TreeMismatch
from nicehooks.values import trees

Number = int | float | complex


def combine(op: Callable[[Any, Any], Any], a: Any, b: Any, path: str) -> Any:
    """`op` of the tensors of `a` and `b`, values at `path`; what is no tensor in either stays that of `a`.

    Raises:
        TreeMismatch: `a` and `b` have different structures, or two of their tensors do not broadcast.
    """
    if isinstance(a, Tensor | Number) and isinstance(b, Tensor | Number):
        return _combine_leaves(op, a, b, path)
    node, other = trees.open_node(a), trees.open_node(b)
    if node is None and other is None and not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a
    theirs = None if node is None or other is None else _in_order(a, b, node, other)
    if node is None or theirs is None:
        raise TreeMismatch(f"at {path!r}: {trees.describe(a)} and {trees.describe(b)} have different structures.")
    children = zip(node.entries, node.children, theirs, strict=True)
    return node.rebuild([combine(op, x, y, path + trees.show_step(entry)) for entry, x, y in children])


def _in_order(a: Any, b: Any, node: trees.Node, other: trees.Node) -> list[Any] | None:
    """The children of `b` in the order of `a`: by name, or by position (a named tuple is saved as a tuple)."""
    if set(node.entries) == set(other.entries):
        by_name = dict(zip(other.entries, other.children, strict=True))
        return [by_name[entry] for entry in node.entries]
    sequences = isinstance(a, tuple | list) and isinstance(b, tuple | list)
    return other.children if sequences and len(node.children) == len(other.children) else None


def _combine_leaves(op: Callable[[Any, Any], Any], a: Any, b: Any, path: str) -> Any:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not _broadcast(a.shape, b.shape):
        raise TreeMismatch(f"at {path!r}: {trees.describe(a)} and {trees.describe(b)} do not broadcast.")
    return op(a, b)


def _broadcast(a: Iterable[int], b: Iterable[int]) -> bool:
    pairs = zip(reversed(tuple(a)), reversed(tuple(b)), strict=False)
    return all(x == y or 1 in (x, y) for x, y in pairs)
