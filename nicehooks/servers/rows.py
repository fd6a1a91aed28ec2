"""The rows of one request in values that hold those of many: taken out, and put back.

The engine packs the tokens of all requests behind one another: a layer returns `[1, tokens, d_model]`, what is
flattened further `[tokens, d_model]`. The head of a language model sees one row for each request that gets a token:
`[1, requests, vocabulary]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.values import trees


class RowSpan(NamedTuple):
    """The rows of one request: among the tokens, and among those that the head sees, if it has one there."""

    start: int
    stop: int
    logit: int | None


class Packed(NamedTuple):
    """How many rows a packed value has: one for each token, or, at the head, one for each request."""

    tokens: int
    logits: int


class Hidden:
    """Stands for a tensor in which the requests have no rows of their own."""

    def __repr__(self) -> str:
        return "(a tensor in which the requests have no rows of their own)"


HIDDEN = Hidden()


def place_of(tensor: Tensor, span: RowSpan, sizes: Packed, head: bool) -> tuple[int, int, int] | None:
    """The dimension of the rows, the first row of `span` in it, and how many it has; None where it has none.

    Args:
        head: whether the value is at the head, where the rows may be those of the requests that get a token.
    """
    shape = tensor.shape
    for dim in (1, 0) if len(shape) > 1 and shape[0] == 1 else range(min(1, len(shape))):
        rows = shape[dim]
        if head and rows == sizes.logits:
            return None if span.logit is None else (dim, span.logit, 1)
        if rows == sizes.tokens:
            return dim, span.start, span.stop - span.start
    return None


def taken_out(value: Any, span: RowSpan, sizes: Packed, head: bool, copy: bool) -> Any:
    """`value` with the rows of `span` alone; as a copy if it is kept: a view would hold all."""

    def rows(tensor: Tensor) -> Any:
        place = place_of(tensor, span, sizes, head)
        if place is None:
            return HIDDEN
        own = tensor.narrow(*place)
        return own.clone() if copy else own

    return trees.map_tensors(rows, value)


class Change(NamedTuple):
    """The rows of one request, as they were taken out, and what takes their place."""

    span: RowSpan
    old: Any
    new: Any


def put_back(value: Any, changes: list[Change], sizes: Packed, head: bool) -> Any:
    """`value` with each of `changes`, which are in the order of the rows; out of place, in one step for each tensor."""
    news = [_tensors_at(change.new, change.old) for change in changes]
    at = -1

    def merged(tensor: Tensor) -> Tensor:
        nonlocal at
        at += 1
        pieces = [
            (place_of(tensor, change.span, sizes, head), new[at])
            for change, new in zip(changes, news, strict=True)
            if new[at] is not None
        ]
        return _written(tensor, pieces) if pieces else tensor

    return trees.map_tensors(merged, value)


def _tensors_at(new: Any, old: Any) -> list[Tensor | None]:
    """The leaves of `new` where `old` has rows of the request, in order; None where nothing has changed.

    A value that was no tensor in the packed value is no place that a tensor of it is written to.
    """
    pairs = zip(trees.leaves(new), trees.leaves(old), strict=True)
    return [
        after if isinstance(after, Tensor) and after is not before else None
        for after, before in pairs
        if isinstance(before, Tensor | Hidden)
    ]


def _written(tensor: Tensor, pieces: list[Any]) -> Tensor:
    """`tensor` with the rows of each of `pieces`, as (place, rows)."""
    dim, done, parts = pieces[0][0][0], 0, []
    for (_, first, count), rows in pieces:
        parts += [tensor.narrow(dim, done, first - done), rows] if first > done else [rows]
        done = first + count
    left = tensor.shape[dim] - done
    return torch.cat([*parts, tensor.narrow(dim, done, left)] if left else parts, dim)
