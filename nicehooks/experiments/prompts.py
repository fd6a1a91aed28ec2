"""Some of the prompts of a sweep: what it is given, cut to rows of the batch, and whether that may be done.

NOTE [Cut by prompts]
A sweep over some examples of its batch gives the numbers that it gives for them in the whole batch, if no example
depends on another one. Nothing says so of a model or a function, but the numbers do. Here, without a run: the metric of
the rows of the output is the rows of the metric, and what is put into a cell for the rows is the rows of what is put
there for all; so it is not for `"resample"`, for a mean over the batch, or for a cell that is one of the examples. In a
worker: the base run of the rows has these rows of the metric. No part has a single row, since that would be broadcast
where it does not belong; two rows or more are refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError
from nicehooks.experiments.items import Base, GridItem
from nicehooks.experiments.lanes import is_close
from nicehooks.experiments.replacements import Replacements, replacements_of
from nicehooks.experiments.runs import Run
from nicehooks.values import trees

LEAST_ROWS = 2
"""How many prompts a part has at least; see NOTE [Cut by prompts]."""


class NotCut(NiceHooksError):
    """A sweep cannot be cut by prompts; the message says why."""


class Prompts(NamedTuple):
    """Some examples of a batch of `batch`: from `start` on, up to `stop`."""

    start: int
    stop: int
    batch: int

    @property
    def are_all(self) -> bool:
        """Whether it is the whole batch."""
        return self.stop - self.start == self.batch

    def of(self, tree: Any) -> Any:
        """`tree` with these rows of each tensor whose first dimension is the batch.

        >>> Prompts(1, 3, batch=4).of({"ids": torch.arange(4), "scale": torch.ones(1)})
        {'ids': tensor([1, 2]), 'scale': tensor([1.])}
        """
        return tree if self.are_all else trees.map_tensors(self._cut, tree)

    def of_function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`; where it is a `functools.partial`, with these rows of its arguments."""
        return partial(fn.func, *self.of(fn.args), **self.of(fn.keywords)) if isinstance(fn, partial) else fn

    def of_metric(self, metric: Tensor) -> Tensor:
        """These rows of `metric`, whose last dimension is the batch; a metric of the whole batch as it is."""
        return metric if self.are_all else metric[..., self.start : self.stop]

    def _cut(self, tensor: Tensor) -> Tensor:
        return tensor[self.start : self.stop] if tensor.ndim and len(tensor) == self.batch else tensor


def rows_in(batch: int, count: int) -> list[Prompts]:
    """A batch in `count` parts, or in as many as have rows enough; it is one part at least.

    >>> [(rows.start, rows.stop) for rows in rows_in(7, 3)], len(rows_in(7, 5)), len(rows_in(1, 5))
    ([(0, 2), (2, 4), (4, 7)], 3, 1)
    """
    count = max(1, min(count, batch // LEAST_ROWS))
    return [Prompts(batch * at // count, batch * (at + 1) // count, batch) for at in range(count)]


def refuse_dependent(
    base: Base, replacements: Replacements, items: Sequence[GridItem], parts: Sequence[Prompts]
) -> None:
    """Looks whether `parts` of the batch have nothing to do with each other; see NOTE [Cut by prompts].

    Args:
        base: the base run of the whole batch.
        replacements: what is put into the cells.
        items: the interventions.
        parts: of the batch.

    Raises:
        NotCut: they have.
    """
    if base.metric.shape != (base.run.batch,):
        raise NotCut("the metric is one number for all of them")
    if replacements.differ_by_call:
        raise NotCut("'resample' takes the value of the next one")
    try:
        own = [(rows, _put_by(base, replacements, rows)) for rows in parts]
        for item in items:
            if not all(
                [_is_put_by_rows(replacements, own, item, call.value) for call in base.stems.calls(item.cell.stem)]
            ):
                raise NotCut(f"what is put at {str(item.cell.path)!r} depends on all of them")
    except (NiceHooksError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise error if isinstance(error, NotCut) else NotCut(str(error).partition("\n")[0]) from error


def _put_by(base: Base, replacements: Replacements, rows: Prompts) -> Replacements:
    """What is put into the cells for `rows` alone; refuses a metric that these do not have alone."""
    whole = base.run
    run = Run(whole.model, rows.of_function(whole.metric), rows.of(whole.args), rows.of(whole.kwargs))
    expected = rows.of_metric(base.metric)
    if not is_close(whole, run.measured(rows.of(whole.sample)), expected, expected):
        raise NotCut("the metric of some is another when the others are not there")
    return replacements_of(rows.of(replacements.values), (), replacements.subspace, run.batch)


def _is_put_by_rows(
    replacements: Replacements, own: Sequence[tuple[Prompts, Replacements]], item: GridItem, stem: Any
) -> bool:
    """Whether what `item` puts into its cell for some rows is these rows of what it puts there for all."""
    cell, comes_by = item.cell, item.cell.comes_by
    region = trees.get(stem, cell.chain)
    new = replacements.new(item.alternative, cell, stem, region)
    for rows, of_rows in own:
        part = rows.of(stem) if comes_by else stem
        region_of_rows = trees.get(part, cell.chain)
        if comes_by and not (_has_rows(region, rows.batch) and _has_rows(region_of_rows, rows.stop - rows.start)):
            return False
        found = trees.leaves(of_rows.new(item.alternative, cell, part, region_of_rows))
        expected = trees.leaves(rows.of(new) if comes_by else new)
        if len(found) != len(expected) or not all(map(_is_same_leaf, found, expected)):
            return False
    return True


def _has_rows(tree: Any, count: int) -> bool:
    tensors = [leaf for leaf in trees.leaves(tree) if isinstance(leaf, Tensor)]
    return all([tensor.ndim > 0 and len(tensor) == count for tensor in tensors])


def _is_same_leaf(one: Any, other: Any) -> bool:
    """Whether two leaves are the same, up to the rounding of what may have been multiplied in another order."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one is other or one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    epsilon, largest = torch.finfo(one.dtype).eps, other.abs().nan_to_num(0, 0, 0).max().item() if one.numel() else 0.0
    return torch.allclose(one, other, 0, (256 if epsilon < 1e-4 else 8) * epsilon * largest, equal_nan=True)
