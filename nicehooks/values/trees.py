"""Values with structure: a part of one, whatever nests in it, is read, rewritten and assigned to.

Functions here raise `TreeMismatch` with the bare fact; the public edge adds the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private
from nicehooks.errors import TreeMismatch
from nicehooks.values import regions
from nicehooks.values.nodes import (
    Node,
    as_it_is,
    bytes_of,
    has_spine_of,
    is_nested,
    is_same,
    leaves,
    map_children,
    map_tensors,
    one_size,
    open_node,
    place_in,
    structure_of,
)
from nicehooks.values.refusals import TORCH_ERRORS, refused
from nicehooks.values.regions import STAR, Chain, Constant, Heads, Rows, show_step

__all__ = [
    "KEEP",
    "STAR",
    "Chain",
    "Heads",
    "Node",
    "Rows",
    "as_it_is",
    "assign",
    "bytes_of",
    "each_index",
    "fits",
    "get",
    "has_spine_of",
    "is_complex",
    "is_nested",
    "is_same",
    "leaves",
    "length",
    "map_children",
    "map_tensors",
    "open_node",
    "place_in",
    "rewrite",
    "show_step",
    "structure_of",
    "usable",
]

KEEP = Constant("nicehooks", "KEEP", "KEEP")
"""In a tree of new values: leave this part as it is."""


# --- reading and rewriting a part -------------------------------------------------------------------------------------


def get(tree: Any, chain: Chain) -> Any:
    """The part of `tree` at the end of `chain`; tensors give views."""
    for step in chain:
        tree = _step(tree, step)
    return tree


def rewrite(tree: Any, chain: Chain, fn: Callable[[Any], Any]) -> Any:
    """`tree` with `fn` applied to the part at the end of `chain`; `tree` itself where `fn` returns what it got.

    Nothing is written in place: around a changed part of a tensor, the tensor is new.
    """
    if not chain:
        return fn(tree)
    part = _step(tree, chain[0])
    new = rewrite(part, chain[1:], fn)
    return tree if is_same(new, part) else _replace(tree, chain[0], new)


def length(tree: Any, items: list[Any], position: int) -> int:
    """How many sites the `*` at `position` among the items of a subscript stands for."""
    if not isinstance(tree, Tensor):
        node = open_node(tree)
        if node is None:
            raise TreeMismatch(f"[*] needs a tensor or a container, not {structure_of(tree)}")
        return len(node.children)
    before, after = items[:position], items[position:]
    dim = sum(item is not None for item in before)
    if Ellipsis in before:
        dim = tree.ndim - sum(item is not None for item in after)
    if not 0 <= dim < tree.ndim:
        raise TreeMismatch(f"[*] is at dimension {dim} of {structure_of(tree)}")
    size = one_size(tree, dim)
    if size is None:
        raise TreeMismatch(f"[*] is at dimension {dim} of {structure_of(tree)}, which has no one size there")
    return size


def each_index(tree: Any, chain: Chain) -> Iterator[Chain]:
    """`chain` with each index that `tree` has in the place of a `*`: positions, and in a mapping its keys."""
    for done, step in enumerate(chain):
        items = list(step) if isinstance(step, tuple) else [step]
        stars = [position for position, item in enumerate(items) if item is STAR]
        if stars:
            for index in _indices(get(tree, chain[:done]), items, stars[0]):
                items[stars[0]] = index
                one = tuple(items) if isinstance(step, tuple) else index
                yield from each_index(tree, (*chain[:done], one, *chain[done + 1 :]))
            return
    yield chain


def _indices(tree: Any, items: list[Any], position: int) -> list[Any]:
    node = open_node(tree)
    entries = range(length(tree, items, position)) if node is None else node.entries
    return [entry if type(entry) in (int, str) else number for number, entry in enumerate(entries)]


def _step(tree: Any, step: Any) -> Any:
    if isinstance(tree, Tensor):
        return regions.read_region(tree, step)
    node, position = _child(tree, step)
    return node.children[position]


def _replace(tree: Any, step: Any, new: Any) -> Any:
    if isinstance(tree, Tensor):
        return regions.replaced(tree, step, new)
    node, position = _child(tree, step)
    return node.rebuild([*node.children[:position], new, *node.children[position + 1 :]])


def _child(tree: Any, step: Any) -> tuple[Node, int]:
    """The node of `tree` and the position in it of what `step` names: a position, a key or a field."""
    if isinstance(step, Heads | Rows | tuple | slice):
        raise TreeMismatch(f"{show_step(step)} needs a tensor, not {structure_of(tree)}")
    node = open_node(tree)
    if node is None:
        raise TreeMismatch(f"{show_step(step)} needs a tensor or a container, not {structure_of(tree)}")
    if step in node.names:
        return node, node.names.index(step)
    count = len(node.children)
    if node.counted and isinstance(step, int) and -count <= step < count:
        return node, step % count
    have = ", ".join(repr(name) for name in node.names) or "nothing"
    raise TreeMismatch(f"{show_step(step)} is not in {structure_of(tree)}, which has {have}")


# --- assignment -------------------------------------------------------------------------------------------------------


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
        raise TreeMismatch(f"{structure_of(new)} does not broadcast to {structure_of(old)}")
    value = _in_layout_of(old, value).to(device=old.device, dtype=old.dtype)
    if value.shape == old.shape:
        return value
    return value.expand(old.shape).clone()  # in-place layers need memory of its own


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
    if not (is_nested(old) and is_nested(new) and torch_private.nests_alike(new, old)):
        raise TreeMismatch(f"{structure_of(new)} does not broadcast to {structure_of(old)}")
    return torch_private.nested_as(usable(new).to(device=old.device, dtype=old.dtype), old)


def is_complex(value: Any) -> bool:
    """Whether a number, or a tensor, has an imaginary part that no real tensor could take."""
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex) and value.imag != 0


def _shown_short(value: Any) -> str:
    return structure_of(value) if isinstance(value, Tensor) else repr(value)


def fits(shape: Iterable[int], target: Iterable[int]) -> bool:
    """Whether a tensor of `shape` broadcasts to `target` without changing it."""
    shape, target = tuple(shape), tuple(target)
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def usable(value: Tensor) -> Tensor:
    """`value`, cloned where it was made under `inference_mode` and autograd could not work with it here."""
    if torch.compiler.is_compiling() or not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    return value.clone()
