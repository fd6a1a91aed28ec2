"""Assignment: what stands in the place of a value after a new one was assigned to it.

Functions here raise `TreeMismatch` with the bare fact; the public edge adds the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import torch_private_tensors
from nicehooks.errors import TreeMismatch
from nicehooks.values.nodes import Node, is_nested, is_same, open_node, structure_of
from nicehooks.values.refusals import TORCH_ERRORS, refused
from nicehooks.values.regions import Constant
from nicehooks.values.sharded import is_distributed, laid_out_as, misfit_of_shards
from nicehooks.values.whole import map_tensors

KEEP = Constant("nicehooks", "KEEP", "KEEP")
"""In a tree of new values: leave this part as it is."""


def assign(old: Any, new: Any) -> Any:
    """What stands in the place of `old` after `new` was assigned to it.

    A tensor is broadcast to the shape of the old one and cast to its dtype and device. A tree replaces leaf by leaf,
    a number every tensor of a tree, of which None has none, and `KEEP` nothing.
    """
    if is_same(new, old) or new is KEEP:
        return old
    if isinstance(old, Tensor):
        return _fit(old, new)
    node = open_node(old)
    if isinstance(new, int | float | complex) and (node is not None or old is None):
        return map_tensors(lambda tensor: _fit(tensor, new), old)
    return new if node is None else _assign_children(old, node, new)


def _assign_children(old: Any, node: Node, new: Any) -> Any:
    values = _matching(old, node, new)
    children: list[Any] = []
    for entry, child, value in zip(node.entries, node.children, values, strict=True):
        try:
            children.append(assign(child, value))
        except TreeMismatch as error:
            raise TreeMismatch(f"{error} (in element {entry!r})") from None
    if all(is_same(a, b) for a, b in zip(children, node.children, strict=True)):
        return old
    return node.rebuild(children)


def _matching(old: Any, node: Node, new: Any) -> list[Any]:
    """The new values for the children of `old`, in its order; keys that a mapping does not name stay."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if set(new.keys()) <= set(node.entries):  # a TensorDict goes through its rows, not through its keys
            return [new.get(entry, KEEP) for entry in node.entries]
        raise _came_for(old, new)
    other = open_node(new)
    plain = isinstance(old, tuple | list) and isinstance(new, tuple | list)
    if other is None or len(other.children) != len(node.children) or not (plain or type(old) is type(new)):
        raise _came_for(old, new)
    return other.children


def _came_for(old: Any, new: Any) -> TreeMismatch:
    return TreeMismatch(f"{structure_of(new)} came where {structure_of(old)} stands")


def _fit(old: Tensor, new: Any) -> Tensor:
    try:
        return _fitted(old, new)
    except TORCH_ERRORS as error:
        raise refused(error, f"{_shown_short(new)} cannot be written into {structure_of(old)}") from None


def _fitted(old: Tensor, new: Any) -> Tensor:
    if is_complex(new) and not old.is_complex():
        raise TreeMismatch(f"{_shown_short(new)} has an imaginary part, {structure_of(old)} has none")
    if isinstance(new, int | float | complex):
        return _filled_like(old, new.real if isinstance(new, complex) and not new.imag else new)
    if not isinstance(new, Tensor):
        raise _came_for(old, new)
    if is_nested(old) or is_nested(new):
        return _fitted_nested(old, new)
    value = usable(new)
    while value.ndim > old.ndim and value.shape[0] == 1:  # as in Python's own x[...] = value
        value = value.squeeze(0)
    if not fits(value.shape, old.shape):
        raise _too_large(old, new)
    if is_distributed(old) or is_distributed(value):
        return laid_out_as(value.to(device=old.device, dtype=old.dtype).expand(old.shape), old)
    value = _in_layout_of(old, value).to(device=old.device, dtype=old.dtype)
    if value.shape != old.shape:
        value = value.expand(old.shape).clone()  # in-place layers need memory of its own
    return _strided_as(old, value)


def _strided_as(old: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of `old`, of the same shape, as after an assignment.

    A model may rely on them (`view`), and a product of matrices is rounded in another way with others.
    """
    if torch.compiler.is_compiling():  # which sorts no sizes that it does not know
        return value.contiguous() if old.is_contiguous() else value
    if old.layout is not torch.strided or value.layout is not torch.strided:
        return value
    if not (type(old) in _PLAIN and type(value) in _PLAIN) or value.stride() == old.stride():
        return value
    order = sorted(range(old.ndim), key=old.stride, reverse=True)
    return value.permute(order).contiguous().permute(sorted(range(old.ndim), key=order.__getitem__))


_PLAIN = (Tensor, nn.Parameter)


def _filled_like(old: Tensor, number: Any) -> Tensor:
    if is_nested(old):
        return torch.zeros_like(old).fill_(number)
    if torch.compiler.is_compiling() or old.layout is torch.strided:
        return torch.full_like(old, number)
    return _in_layout_of(old, torch.full(old.shape, number, dtype=old.dtype, device=old.device))


def _in_layout_of(old: Tensor, value: Tensor) -> Tensor:
    """`value`, made sparse where `old` is, and dense where it is not."""
    if torch.compiler.is_compiling() or value.layout is old.layout:
        return value
    return value.to_dense() if old.layout is torch.strided else value.to_sparse(layout=old.layout)


def _fitted_nested(old: Tensor, new: Tensor) -> Tensor:
    if not (is_nested(old) and is_nested(new) and torch_private_tensors.nests_alike(new, old)):
        raise TreeMismatch(f"{structure_of(new)} does not broadcast to {structure_of(old)}")
    return torch_private_tensors.nested_as(usable(new).to(device=old.device, dtype=old.dtype), old)


def _too_large(old: Tensor, new: Tensor) -> TreeMismatch:
    if is_distributed(old) and not is_distributed(new):
        return misfit_of_shards(new, old)
    return TreeMismatch(f"{structure_of(new)} does not broadcast to {structure_of(old)}")


def is_complex(value: Any) -> bool:
    """Whether a number, or a tensor, has an imaginary part that no real tensor could take."""
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex) and value.imag != 0


def _shown_short(value: Any) -> str:
    return structure_of(value) if isinstance(value, Tensor) else repr(value)


def fits(shape: Iterable[int], target: Iterable[int]) -> bool:
    """Whether a tensor of `shape` broadcasts to `target` without changing it."""
    shape, target = tuple(shape), tuple(target)
    tail = target[len(target) - len(shape) :]
    # no `in`: Dynamo finds a size that it does not know in no tuple
    return len(shape) <= len(target) and all([a == 1 or a == b for a, b in zip(shape, tail, strict=True)])


def usable(value: Tensor) -> Tensor:
    """`value`, cloned where it was made under `inference_mode` and autograd could not work with it here."""
    if torch.compiler.is_compiling() or not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    return value.clone()
