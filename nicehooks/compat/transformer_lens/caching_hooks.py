"""Caching hooks: which hook points to cache, which positions of each, and the hook that does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.keeping import Keeper, runs_again
from nicehooks.core.selection import Site
from nicehooks.errors import PathError, TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
"""Which hook points: a name, some names, a predicate over names, or None for all."""

PosSlice = Any
"""Which positions: an int, a slice, a tuple for one, a list or array of ints, or None for all."""

ENDS_OF_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")
"""The ends of the names of points whose values are `[batch, pos, head, d_head]`: positions are the third dimension from
the end. Everywhere else they are the second, `[batch, pos, d_model]`."""


SPLIT_INTO_HEADS = re.compile(r"/\d+\Z")
"""The end of a path whose values are split into heads, likewise."""


class Matched(str):
    """A name that a predicate has chosen; names of one `group` are one wildcard.

    Attributes:
        group: what they have in common.
        shown: how the wildcard is shown in messages.
    """

    __slots__ = ("group", "shown")

    def __new__(cls, name: str, group: object, shown: str) -> Matched:
        new = super().__new__(cls, name)
        new.group = group
        new.shown = shown
        return new


class CachingHook:
    """Puts each value that comes by into `cache`, under the name of its hook point, and leaves it as it is.

    Args:
        cache: a dict; an `ActivationCache` notices, too, when the model overwrites what it has seen.
        suffix: what the key has after the name: `"_grad"` for gradients.
        device: where to keep the values; where they are by default.
        remove_batch_dim: takes the only example out of its batch.
        pos_slice: the positions to keep.
        detach: takes each value out of the autograd graph.
        clone: keeps a copy, which nothing can overwrite.
    """

    only_looks = True

    def __init__(
        self,
        cache: dict[str, Any],
        suffix: str = "",
        device: Any = None,
        remove_batch_dim: bool = False,
        pos_slice: PosSlice = None,
        detach: bool = False,
        clone: bool = False,
    ) -> None:
        self.cache = cache
        self.suffix = suffix
        self.keeper = Keeper(detach, clone, device)
        self.remove_batch_dim = remove_batch_dim
        self.positions = positions(pos_slice)
        self.level = torch_private.transform_level()

    def __repr__(self) -> str:
        return f"CachingHook({self.suffix})"

    def __call__(self, value: Any, hook: Any) -> None:
        key = f"{hook.name}{self.suffix}"
        if not self.suffix and runs_again(self.cache, key):
            return
        dim = -3 if hook.name.endswith(ENDS_OF_HEADS) or SPLIT_INTO_HEADS.search(hook.name) else -2
        chosen = trees.map_tensors(lambda tensor: self._chosen(tensor, dim, key), value)
        self.keeper.keep(chosen, self.level, lambda kept: self._put(key, kept))

    def _put(self, key: str, kept: Any) -> None:
        if isinstance(self.cache, ActivationCache):
            self.cache.record(key, kept)
        else:
            self.cache[key] = kept

    def _chosen(self, tensor: Tensor, dim: int, key: str) -> Tensor:
        """What is to be kept of a tensor."""
        if self.remove_batch_dim:
            tensor = _only_example(tensor, key)
        if self.positions is None or tensor.ndim < -dim:
            return tensor
        return self.positions(tensor, dim)


def _only_example(tensor: Tensor, key: str) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[0] != 1:
        shown = trees.structure_of(tensor)
        raise TreeMismatch(f"remove_batch_dim=True takes one example, but {key!r} is {shown}; leave it out")
    return tensor[0]


def positions(pos_slice: PosSlice) -> Callable[[Tensor, int], Tensor] | None:
    """A function `(tensor, dim)` that takes positions out of a dimension, counted from the end; None for all.

    The dimension stays, also for an int.

    >>> import torch
    >>> [positions(p)(torch.arange(6), -1).tolist() for p in (-1, slice(4), (1, 3), [0, 0])]
    [[5], [0, 1, 2, 3], [1, 2], [0, 0]]

    Args:
        pos_slice: an int; a slice, or a tuple of its arguments; a list, array or tensor of ints; None for all.
    """
    if pos_slice is None:
        return None
    if isinstance(pos_slice, tuple) and 1 <= len(pos_slice) <= 3:
        pos_slice = slice(*pos_slice)
    if isinstance(pos_slice, slice):
        return _sliced(pos_slice)
    if isinstance(pos_slice, int) and not isinstance(pos_slice, bool):
        return _at([pos_slice], lambda tensor, dim: tensor.narrow(dim, pos_slice, 1))
    if isinstance(pos_slice, list) or hasattr(pos_slice, "__array__"):
        index = torch.as_tensor(pos_slice)
        if index.ndim == 1 and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
            return _at(
                index.tolist(),
                lambda tensor, dim: tensor.index_select(dim, index.to(tensor.device) % tensor.shape[dim]),
            )
    raise TypeError(f"pos_slice={pos_slice!r}: it is an int, a slice, a tuple for one, a list of ints, or None")


def _sliced(wanted: slice) -> Callable[[Tensor, int], Tensor]:
    if wanted.step is not None and wanted.step <= 0:
        raise ValueError(f"pos_slice={wanted}: the step of a slice of a tensor is positive")
    return lambda tensor, dim: tensor[(..., wanted, *[slice(None)] * (-1 - dim))]


def _at(wanted: list[int], take: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """`take`, where `wanted` are positions of the tensor."""
    lowest, highest = min(wanted, default=0), max(wanted, default=-1)

    def taken(tensor: Tensor, dim: int) -> Tensor:
        if not -tensor.shape[dim] <= lowest <= highest < tensor.shape[dim] and wanted:
            raise TreeMismatch(f"pos_slice={wanted} is not within the dimension {dim} of {trees.structure_of(tensor)}")
        return take(tensor, dim)

    return taken


def chooser(names_filter: Any) -> list[Any] | Callable[[str], Any]:
    """The names that `names_filter` lists, or its predicate.

    Raises:
        PathError: it is neither.
    """
    if isinstance(names_filter, str | ModulePath | Site):
        return [names_filter]
    if callable(names_filter):
        return names_filter
    if isinstance(names_filter, Iterable):
        names = list(names_filter)
        if all([isinstance(name, str | ModulePath | Site) for name in names]):
            return names
    raise PathError(f"names_filter={names_filter!r}: it is a name, a list of names, or a predicate (name) -> bool")
