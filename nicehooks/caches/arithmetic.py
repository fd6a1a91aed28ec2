"""Arithmetic of nested values, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import TreeMismatch
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS, refused

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
        raise TreeMismatch(
            f"at {path!r}: {trees.structure_of(a)} and {trees.structure_of(b)} have different structures."
        )
    children = list(zip(node.entries, node.children, theirs, strict=True))
    return node.rebuild(
        [
            x if at in node.settings else combine(op, x, y, path + trees.show_step(entry))
            for at, (entry, x, y) in enumerate(children)
        ]
    )


def concatenated(values: list[Any], dim: int, path: str) -> Any:
    """The tensors of `values`, all at `path`, end to end along `dim`; what is no tensor stays that of the first.

    Raises:
        TreeMismatch: they have different structures, or two of their tensors do not fit together.
    """
    first, *others = values
    shown = ", ".join(dict.fromkeys(map(trees.structure_of, values)))
    if all(isinstance(value, Tensor) for value in values):
        try:
            return torch.cat(values, dim)
        except TORCH_ERRORS as error:
            raise refused(error, f"at {path!r}: {shown} cannot be put end to end along dim={dim}") from None
    nodes = [trees.open_node(value) for value in values]
    if all(node is None for node in nodes) and not any(isinstance(value, Tensor) for value in values):
        return first
    each = [None if a is None or b is None else _in_order(first, v, a, b) for v, a, b in _beside(nodes, others)]
    if nodes[0] is None or nodes[0].settings or any(children is None for children in each):
        raise TreeMismatch(f"at {path!r}: {shown} cannot be put end to end: their structures differ, or do not grow.")
    columns = zip(nodes[0].entries, nodes[0].children, *[children or [] for children in each], strict=True)
    return nodes[0].rebuild([concatenated(column, dim, path + trees.show_step(entry)) for entry, *column in columns])


def _beside(nodes: list[trees.Node | None], others: list[Any]) -> list[tuple[Any, Any, Any]]:
    return [(other, nodes[0], node) for other, node in zip(others, nodes[1:], strict=True)]


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
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not _broadcast(a, b):
        raise TreeMismatch(f"at {path!r}: {trees.structure_of(a)} and {trees.structure_of(b)} do not broadcast.")
    try:
        return op(a, b)
    except TORCH_ERRORS as error:
        raise refused(error, f"at {path!r}: {_shown(a)} and {_shown(b)} do not go together") from None


def _shown(value: Any) -> str:
    return trees.structure_of(value) if isinstance(value, Tensor) else repr(value)


def _broadcast(a: Tensor, b: Tensor) -> bool:
    if trees.is_nested(a) or trees.is_nested(b):
        return True  # torch alone knows
    pairs = zip(reversed(a.shape), reversed(b.shape), strict=False)
    return all(x == y or 1 in (x, y) for x, y in pairs)
