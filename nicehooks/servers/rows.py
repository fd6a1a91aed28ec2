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
    """The rows of one request: among the tokens, and among those that the head sees, if it has one there.

    Attributes:
        before, after: how many positions of the prompt come before these rows and behind them, in other forwards.
    """

    start: int
    stop: int
    logit: int | None
    before: int = 0
    after: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def positions(self) -> int:
        """How many there are with those before and behind."""
        return self.before + self.length + self.after

    @property
    def is_piece(self) -> bool:
        return self.positions > self.length


class Packed(NamedTuple):
    """How many rows a packed value has: one for each token, or, at the head, one for each request."""

    tokens: int
    logits: int


class Hidden:
    """Stands for a tensor in which the requests have no rows of their own."""

    def __repr__(self) -> str:
        return "(a tensor in which the requests have no rows of their own)"


HIDDEN = Hidden()


class NoRow(Hidden):
    """Stands for the row that the head has of each request that gets a token, where this one gets none."""


NO_ROW = NoRow()


def row_dim(tensor: Tensor, rows: int) -> int | None:
    """The dimension of `tensor` that its `rows` rows are in; None where there is none of that size."""
    shape = tensor.shape
    dims = (1, 0) if len(shape) > 1 and shape[0] == 1 else range(min(1, len(shape)))
    return next((dim for dim in dims if shape[dim] == rows), None)


class RowPlace(NamedTuple):
    """Where the rows of a request are in a packed tensor; `is_logit` says that it is the one that the head sees."""

    dim: int
    first: int
    length: int
    is_logit: bool = False


def place_of(tensor: Tensor, span: RowSpan, sizes: Packed, head: bool) -> RowPlace | Hidden:
    """Where the rows of `span` are in `tensor`, or what stands for them.

    Args:
        head: whether the value is at the head, where the rows may be those of the requests that get a token.
    """
    if head and (dim := row_dim(tensor, sizes.logits)) is not None:
        return NO_ROW if span.logit is None else RowPlace(dim, span.logit, 1, True)
    dim = row_dim(tensor, sizes.tokens)
    return HIDDEN if dim is None else RowPlace(dim, span.start, span.length)


def taken_out(value: Any, span: RowSpan, sizes: Packed, head: bool, copy: bool, spread: bool = False) -> Any:
    """`value` with the rows of `span` alone.

    Args:
        copy: whether it is kept: a view would hold all.
        spread: whether to put them in their place among all positions of the prompt; the others are filled with the
            rows next to them.
    """

    def rows(tensor: Tensor) -> Any:
        place = place_of(tensor, span, sizes, head)
        if isinstance(place, Hidden):
            return place
        own = tensor.narrow(place.dim, place.first, place.length)
        if spread and not place.is_logit:
            return _spread(own, place.dim, span)
        return own.clone() if copy else own

    return trees.map_tensors(rows, value)


def _spread(own: Tensor, dim: int, span: RowSpan) -> Tensor:
    first, last = own.narrow(dim, 0, 1), own.narrow(dim, own.shape[dim] - 1, 1)
    return torch.cat([times_over(first, dim, span.before), own, times_over(last, dim, span.after)], dim)


def times_over(row: Tensor, dim: int, times: int) -> Tensor:
    """`row`, which is the only one in `dim`, so many times; in the memory of one."""
    return row.expand(*row.shape[:dim], times, *row.shape[dim + 1 :])


def is_absent(value: Any) -> bool:
    """Whether the request has no row in `value`, which is at the head, in this forward."""
    return any([leaf is NO_ROW for leaf in trees.leaves(value)])


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
        pieces: list[Any] = []
        for change, new in zip(changes, news, strict=True):
            rows = new[at]
            if rows is not None:
                place: Any = place_of(tensor, change.span, sizes, head)
                spread = rows.shape[place.dim] > place.length
                own = rows.narrow(place.dim, change.span.before, place.length) if spread else rows
                pieces.append((place, own))
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
    dim, done, parts = pieces[0][0].dim, 0, []
    for (_, first, count, _), rows in pieces:
        parts += [tensor.narrow(dim, done, first - done), rows] if first > done else [rows]
        done = first + count
    left = tensor.shape[dim] - done
    return torch.cat([*parts, tensor.narrow(dim, done, left)] if left else parts, dim)
