"""A nested value as a whole: mapped, kept as it is, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private_tensors
from nicehooks.values.nodes import built_here, is_same, open_node, sort_of


def place_in(values: Iterable[Any], value: Any) -> int | None:
    """Where `value` itself stands among `values`. Not by `id`: compiled code would be for that one tensor alone."""
    return next((at for at, one in enumerate(values) if one is value), None)


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with `fn` applied to each of its tensors."""
    return fn(tree) if isinstance(tree, Tensor) else map_children(lambda child: map_tensors(fn, child), tree)


def map_children(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `fn` applied to each child that is a value of the model; a leaf as it is."""
    node = open_node(tree)
    if node is None:
        return tree
    return node.rebuild([child if at in node.settings else fn(child) for at, child in enumerate(node.children)])


def as_it_is(tree: Any) -> Any:
    """`tree` in containers of its own, around the very same leaves: what happens to `tree` later does not show in it.

    What only a registered constructor could rebuild stays the object that it is.
    """
    if tree is None or isinstance(tree, Tensor | bool | int | float | str) or sort_of(type(tree)) not in built_here:
        return tree
    node: Any = open_node(tree)
    children = [as_it_is(child) for child in node.children]
    if isinstance(tree, tuple) and all([is_same(new, old) for new, old in zip(children, node.children, strict=True)]):
        return tree
    return node.rebuild(children)


def has_spine_of(tree: Any, copy: Any) -> bool:
    """Whether `tree` is still as it was when `as_it_is` made `copy` of it."""
    if tree is copy:
        return True
    node, other = open_node(tree), open_node(copy)
    if node is None or other is None or type(tree) is not type(copy) or node.entries != other.entries:
        return False
    return all(map(has_spine_of, node.children, other.children))


def has_fractions(value: Any) -> bool:
    """Whether `value` is a tensor of real or complex numbers, and not of whole ones or truth values: one of a kind that
    has gradients.
    """
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def bytes_of(tensor: Tensor) -> int:
    """The memory of the numbers of `tensor`; of a sparse one, of those that it holds."""
    if tensor.layout is not torch.strided:
        return sum(map(bytes_of, torch_private_tensors.held_by(tensor)))
    return tensor.numel() * tensor.element_size()
