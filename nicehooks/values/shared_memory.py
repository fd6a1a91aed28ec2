"""Tensors whose elements share memory, and what is written into a tensor in place.

NOTE [Elements that are one place in memory]
Two elements of what `expand`, `unfold` or `as_strided` gives may be one place in memory. What is written into a part of
such a tensor would be in its neighbours too, in place or by `torch.slice_scatter`, which keeps the memory as it is laid
out. So before anything is written there, each element gets a place of its own. The examples that `vmap` maps over may
share memory in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private_tensors
from nicehooks.values import regions


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements of `tensor`, or of the examples that are mapped over, may be one place in memory."""
    if not _is_in_memory(tensor):
        return False
    if not torch.compiler.is_compiling():
        tensor = torch_private_tensors.unwrapped(tensor)
    if tensor.is_contiguous():
        return False
    steps = [(stride, size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    for at, (stride, _) in enumerate(steps):
        within = [other * count for dim, (other, count) in enumerate(steps) if dim != at and other <= stride]
        if stride <= sum(within):  # a step along this dimension is no longer than all those along the shorter ones
            return True
    return False


def _is_in_memory(value: Any) -> bool:
    """Whether each element is somewhere in memory; of a gradient, traced code may not ask for the layout."""
    return (
        type(value) is Tensor
        and not value.is_nested
        and (torch.compiler.is_compiling() or value.layout is torch.strided)
    )


def _spread_out(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _write_apart(base: Tensor, step: Any, new: Tensor) -> Tensor:
    return regions.write_unchecked(_spread_out(base), step, new)


def _ready(tensor: Tensor, may_write: bool) -> Tensor:
    return _spread_out(tensor) if may_write else tensor


regions.KINDS.insert(0, (overlaps, regions.read_plain, _write_apart, _ready))


def last_written(value: Any) -> int | None:
    """By which `as_written` tells whether a tensor is written into from now on; None if nothing tells."""
    if torch.compiler.is_compiling() or not _is_in_memory(value) or value.is_inference():
        return None
    return torch_private_tensors.version(value)


def as_written(value: Any, before: int | None) -> Any:
    """`value`, but no more the same object if it may have been written into since `before`.

    It may have been read into memory of its own, by a list of indices, say; then what was written there is nowhere else
    yet, and it has to be put in its place as any other new value is.
    """
    if not _is_in_memory(value) or last_written(value) == before is not None:
        return value
    return value.view_as(value)
