"""The region of a tensor that a step of a path names: written as text, read, and replaced out of place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import TreeMismatch
from nicehooks.values.nodes import structure_of
from nicehooks.values.refusals import TORCH_ERRORS, refused

Chain = tuple[Any, ...]
"""The subscripts that lead from a value to a part of it: Python subscripts (integers, strings, slices, `None`, `...`,
lists of integers, tuples of them), `Heads` and `Rows`."""


@dataclass(frozen=True)
class Heads:
    """The step `/n` of a chain: the last dimension split into `n` equal groups."""

    count: int

    def __str__(self) -> str:
        return f"/{self.count}"


@dataclass(frozen=True)
class Rows:
    """The step `/rows` of a chain: the first dimension split into those that the module around has flattened.

    Attributes:
        sizes: of these dimensions, `(batch, pos)`; they are known only while that module runs.
    """

    sizes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return "/rows"


class Constant:
    """A constant of a module, known by its name: its copies, and what is unpickled, are the constant itself."""

    def __init__(self, module: str, name: str, text: str) -> None:
        self.__module__ = module
        self._name = name
        self._text = text

    def __repr__(self) -> str:
        return self._text

    def __reduce__(self) -> str:
        return self._name


STAR = Constant(__name__, "STAR", "*")
"""`*` in a subscript: one site per index."""


def items_of(step: Any) -> tuple[Any, ...]:
    """The items of a subscript: of a tuple its own, otherwise the one that it is."""
    return step if isinstance(step, tuple) else (step,)


def show_step(step: Any) -> str:
    """A step of a chain as it is written in a path."""
    if isinstance(step, Heads | Rows):
        return str(step)
    if isinstance(step, tuple):
        inner = ", ".join(_show_item(item) for item in step)
        return f"[{inner},]" if len(step) == 1 else f"[{inner}]"
    return f"[{_show_item(step)}]"


def _show_item(item: Any) -> str:
    if not isinstance(item, slice):
        return "..." if item is Ellipsis else repr(item)
    start, stop, step = ("" if bound is None else str(bound) for bound in (item.start, item.stop, item.step))
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


def read_region(tensor: Tensor, step: Any) -> Tensor:
    """The region of `tensor` that `step` names: a view, unless it is a list of indices."""
    try:
        return _ways_with(tensor)[0](tensor, step)
    except (IndexError, OverflowError):
        raise TreeMismatch(f"{show_step(step)} is out of range for {structure_of(tensor)}") from None
    except TORCH_ERRORS as error:
        raise refused(error, f"{show_step(step)} of {structure_of(tensor)} cannot be read") from None


def write_unchecked(base: Tensor, step: Any, new: Tensor) -> Tensor:
    """As `replaced`; what torch refuses is its own error."""
    return _ways_with(base)[1](base, step, new)


def ready(value: Any, may_write: bool = False) -> Any:
    """`value` in the form in which it can be read and written, in place too, and that takes its place from now on."""
    return _ways_with(value)[2](value, may_write) if isinstance(value, Tensor) else value


def _ways_with(tensor: Tensor) -> Any:
    """How a tensor of this kind is read, written, and made ready for either."""
    return next((ways for is_of, *ways in KINDS if is_of(tensor)), (read_plain, write_plain, lambda value, _: value))


def read_plain(tensor: Tensor, step: Any) -> Tensor:
    """The region of a tensor that is read as any is; what torch refuses is its own error."""
    if isinstance(step, Heads):
        return _split(tensor, step.count)
    if isinstance(step, Rows):
        return _split_rows(tensor, step.sizes)
    items = items_of(step)
    if any(isinstance(item, str) for item in items):
        raise TreeMismatch(f"{show_step(step)} is a key, but the value is {structure_of(tensor)}")
    if any(isinstance(item, slice) and item.step is not None and item.step < 1 for item in items):
        raise TreeMismatch(f"{show_step(step)} steps backwards, which PyTorch does not do")
    if torch.compiler.is_compiling() and not _is_within(tensor, step):
        raise IndexError
    return tensor[step]


def _is_within(tensor: Tensor, step: Any) -> bool:
    """Whether every index is within its dimension; torch itself says so, but not to code that is being traced."""
    items = [item for item in by_dimension(tensor, step) if item is not None]
    sized = zip(tensor.shape, items, strict=False)
    indices = [(size, at) for size, item in sized for at in (item if isinstance(item, list) else [item])]
    return len(items) <= tensor.ndim and all([-size <= at < size for size, at in indices if isinstance(at, int)])


def by_dimension(tensor: Tensor, step: Any) -> list[Any]:
    """The items of a subscript, with whole dimensions for its `...`."""
    items = list(items_of(step))
    if Ellipsis in items:
        at = items.index(Ellipsis)
        fill = tensor.ndim - sum(item is not None and item is not Ellipsis for item in items)
        items[at : at + 1] = [slice(None)] * fill
    return [item for item in items if item is not Ellipsis]  # torch reads a second one as no dimension


def _split(tensor: Tensor, count: int) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[-1] % count:
        raise TreeMismatch(f"/{count} does not divide the last dimension of {structure_of(tensor)}")
    return tensor.reshape(*tensor.shape[:-1], count, tensor.shape[-1] // count)  # a view; Dynamo may not take unflatten


def _split_rows(tensor: Tensor, sizes: tuple[int, ...] | None) -> Tensor:
    if sizes is None:
        raise TreeMismatch(f"{Rows()} of {structure_of(tensor)} is known only while the model runs: capture it so")
    if tensor.ndim == 0 or tensor.shape[0] != math.prod(sizes):
        raise TreeMismatch(f"{Rows()} does not split the first dimension of {structure_of(tensor)} into {list(sizes)}")
    return tensor.reshape(*sizes, *tensor.shape[1:])


def replaced(base: Tensor, step: Any, new: Tensor) -> Tensor:
    """`base` with the region `step` replaced by `new`, which has the region's shape; out of place, under `vmap` too."""
    try:
        return write_unchecked(base, step, new)
    except TORCH_ERRORS as error:
        raise refused(error, f"{show_step(step)} of {structure_of(base)} cannot be written") from None


def _with_complex(base: Tensor, step: Any, new: Tensor) -> Tensor:
    """`replaced`, in the real numbers that `base` consists of: they are one more dimension, behind all others."""
    if isinstance(step, Heads | Rows):
        return write_plain(base, step, new)
    real = write_plain(_as_real(base), tuple(by_dimension(base, step)), _as_real(new))
    return torch.view_as_complex(real.contiguous())


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


def write_plain(base: Tensor, step: Any, new: Tensor) -> Tensor:
    """`replaced`, of a tensor that is written as any is; what torch refuses is its own error."""
    if isinstance(step, Heads):
        return new.flatten(-2)
    if isinstance(step, Rows):
        return new.reshape(base.shape)
    items = by_dimension(base, step)
    if any(isinstance(item, list) for item in items):
        return _with_scattered(base, step, new)
    return _with_region(base, items, new, 0)


def _with_region(base: Tensor, items: list[Any], new: Tensor, dim: int) -> Tensor:
    """`base` with `new` where `items` lead to, from the dimension `dim` on."""
    if not items:
        return new
    item, rest = items[0], items[1:]
    if item is None:
        return _with_region(base, rest, new.squeeze(dim), dim)
    if isinstance(item, int):
        part, at = _with_region(base.select(dim, item), rest, new, dim), item % base.shape[dim]
        # Not select_scatter: differentiated around vmap, it gives a multiple of the gradient of `part` (torch 2.13).
        return torch.slice_scatter(base, part.unsqueeze(dim), dim, at, at + 1)
    if item == slice(None):
        return _with_region(base, rest, new, dim + 1)
    part = _with_region(base[(slice(None),) * dim + (item,)], rest, new, dim + 1)
    return _with_slice(base, part, dim, item)


def _with_slice(base: Tensor, part: Tensor, dim: int, item: slice) -> Tensor:
    """`base` with `part` at `item` of `dim`; under `vmap`, `slice_scatter` takes no bounds outside of the dimension."""
    size, count, step = base.shape[dim], part.shape[dim], item.step or 1
    if count == 0:
        return base
    start = item.start or 0
    start = max(start + size, 0) if start < 0 else start
    return torch.slice_scatter(base, part, dim, start, start + (count - 1) * step + 1, step)


def _with_scattered(base: Tensor, step: Any, new: Tensor) -> Tensor:
    positions = torch.arange(base.numel(), device=base.device).reshape(base.shape)[step].flatten()
    return base.flatten().index_copy(0, positions, new.flatten()).reshape(base.shape)


KINDS: list[tuple[Any, ...]] = [(lambda it: it.is_complex(), read_plain, _with_complex, lambda value, _: value)]
"""Kinds of tensors, told by a function, each with its way to be read, to be written and to be made ready; a file that
knows another kind puts it in front. torch 2.13 does not differentiate the writing of a part of complex ones."""
