"""Means of activations over a data set, streamed: what mean ablation puts in the place of a value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.core.selection import Where
from nicehooks.errors import NiceHooksError, TreeMismatch
from nicehooks.values import trees


def mean_activations(
    model: nn.Module, where: Where, batches: Iterable[Any], dim: int | tuple[int, ...] = 0
) -> ActivationCache:
    """The mean activations at the sites of `where` over all examples of `batches`, of which it holds one at a time.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> means = mean_activations(model, "*", [torch.zeros(2, 4), torch.ones(1, 4)])
    >>> means["0"].shape
    torch.Size([1, 3])

    The dimensions that the mean is over stay, with the size 1, so that the means of whole values go where activations
    go: into `patch`, `ablate(value=…)` and `sweep`, which takes them for single positions too.

    Args:
        model: any module; it is run without gradients.
        where: paths, sites, … (see `select`).
        batches: inputs of the model: a tensor, a tuple of arguments, or a mapping of keyword arguments each.
        dim: the dimensions to take the mean over: the batch, or `(0, 1)` for the positions too, which then may be as
            many as they like in each batch.

    Raises:
        SiteNotFound: `where` selects nothing.
        NiceHooksError: there are no batches.
        TreeMismatch: values of two batches have different shapes, or are no floating tensors.
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    sums: dict[str, _Sum] = {}
    for batch in batches:
        with torch.no_grad(), capture(model, where) as seen:
            _call_with(model, batch)
        for path, value in seen.items():
            sums.setdefault(path, _Sum(path)).add(value, dims)
    if not sums:
        raise NiceHooksError("mean_activations(model, where, batches): there are no batches, so there is no mean.")
    return ActivationCache({path: one.mean() for path, one in sums.items()})


def _call_with(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class _Sum:
    """The sum of the values of one site, in double precision, and of how many numbers it is."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.totals: list[Tensor] = []
        self.counts: list[int] = []
        self.like: Any = None

    def add(self, value: Any, dims: tuple[int, ...]) -> None:
        tensors = [leaf for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]
        if not tensors or not all([tensor.is_floating_point() for tensor in tensors]):
            raise TreeMismatch(f"mean_activations at {self.path!r}: {trees.structure_of(value)} has no mean.")
        wide = [tensor.sum(dims, keepdim=True, dtype=torch.float64) for tensor in tensors]
        if self.like is None:
            self.like, self.totals, self.counts = value, [torch.zeros_like(one) for one in wide], [0] * len(wide)
        if [one.shape for one in wide] != [one.shape for one in self.totals]:
            before, now = trees.structure_of(self.like), trees.structure_of(value)
            raise TreeMismatch(SHAPES.format(path=self.path, before=before, now=now))
        self.totals = [total + one for total, one in zip(self.totals, wide, strict=True)]
        sizes = [math.prod([tensor.shape[dim] for dim in dims]) for tensor in tensors]
        self.counts = [count + size for count, size in zip(self.counts, sizes, strict=True)]

    def mean(self) -> Any:
        means = iter([total / count for total, count in zip(self.totals, self.counts, strict=True)])
        return trees.map_tensors(lambda tensor: next(means).to(tensor.dtype), self.like)


SHAPES = (
    "mean_activations at {path!r}: {now} came after {before}, so there is no mean. Take it over the positions too:\n"
    "    mean_activations(model, where, batches, dim=(0, 1))"
)
