"""Containers: what a nested value is made of, taken apart and put together again.

NOTE [Dynamo and containers]
Everything here is traced by `torch.compile`. What depends on a type alone is found out by `sort_of`, which runs while
Dynamo traces; the rest is written in Python that Dynamo knows. Under Dynamo, `copy.copy` forgets the items of a dict
subclass and does not take a dict at all (torch 2.13), so it is not used.

NOTE [Sorts of containers]
Tuples, lists and dicts stand here; every other sort is in `containers`, which adds it to the table.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks import torch_private

Opener = Callable[[Any], Any]


class Node(NamedTuple):
    """One level of a tree.

    Attributes:
        children: what it holds.
        entries: the position of each child in a tuple or list; else its key or field name.
        names: the same, with field names where a tuple has them.
        rebuild: builds one like it around other children; no constructor is called, except where one was registered.
        counted: whether its children have positions beside their names, as fields have and keys have not.
        settings: the positions of the children that only say how the others lie: they are no values of the model.
    """

    children: list[Any]
    entries: list[Any]
    names: list[Any]
    rebuild: Callable[[Iterable[Any]], Any]
    counted: bool = True
    settings: tuple[int, ...] = ()


def open_node(tree: Any) -> Node | None:
    """The first level of `tree`, or None where it is a leaf."""
    if tree is None or isinstance(tree, Tensor | bool | int | float | str):
        return None
    return _openers[sort_of(type(tree))](tree)


def is_same(new: Any, old: Any) -> bool:
    """Whether `new` is `old`. Dynamo tells this of tensors alone; nothing is lost where a container is rebuilt."""
    return new is old if isinstance(old, Tensor) or not torch.compiler.is_compiling() else False


def leaves(tree: Any) -> list[Any]:
    """All leaves of `tree` in order; `None` is a leaf."""
    if isinstance(tree, Tensor):
        return [tree]
    node = open_node(tree)
    return [tree] if node is None else [leaf for child in node.children for leaf in leaves(child)]


def is_nested(value: Any) -> bool:
    """Whether `value` is a tensor of tensors that differ in shape: some of its sizes are no numbers."""
    return isinstance(value, Tensor) and value.is_nested


def structure_of(value: Any) -> str:
    """The structure of a value, with shapes and dtypes, never contents."""
    if isinstance(value, Tensor):
        return f"{_kind_of(value)}{_shape_of(value)} {str(value.dtype).removeprefix('torch.')}"
    node = open_node(value)
    if node is None:
        return "None" if value is None else type(value).__name__
    inner = [structure_of(child) for child in node.children]
    if isinstance(value, tuple | list) and node.names is node.entries:
        name = "" if type(value) in (tuple, list) else type(value).__name__
        return f"{name}({', '.join(inner)})" if isinstance(value, tuple) else f"{name}[{', '.join(inner)}]"
    named = ", ".join(f"{name}: {text}" for name, text in zip(node.names, inner, strict=True))
    return f"{{{named}}}" if type(value) is dict else f"{type(value).__name__}({named})"


def _kind_of(tensor: Tensor) -> str:
    if is_nested(tensor):
        return "NestedTensor"
    return "Tensor" if tensor.layout is torch.strided else "SparseTensor"


def _shape_of(tensor: Tensor) -> str:
    """The sizes of a tensor; `*` where those inside of a nested one differ."""
    if not is_nested(tensor):
        return f"{list(tensor.shape)}"  # Dynamo writes a list in no other way
    return f"[{', '.join(map(str, torch_private.nested_sizes(tensor)))}]"


# --- sorts of containers ----------------------------------------------------------------------------------------------


@torch_private.evaluated_while_tracing
def sort_of(kind: type) -> str:
    """The name of what opens values of the type `kind`; see NOTE [Sorts of containers]."""
    return _find_sort(kind)


@lru_cache(maxsize=4096)
def _find_sort(kind: type) -> str:
    return next((name for name, is_of in _sorts if is_of(kind)), "leaf")


def add_sort(name: str, is_of: Callable[[type], bool], opener: Opener, is_built_here: bool = True) -> None:
    """Adds a sort of containers, which is asked behind all those that are there.

    Args:
        name: of the sort.
        is_of: whether a type is of this sort.
        opener: gives the `Node` of a value of such a type; None where it is a leaf after all.
        is_built_here: whether values are rebuilt without a constructor of theirs.
    """
    _sorts.append((name, is_of))
    _openers[name] = opener
    if is_built_here:
        built_here.add(name)


_sorts: list[tuple[str, Callable[[type], bool]]] = []
_openers: dict[str, Opener] = {}
built_here: set[str] = set()
"""The sorts that are rebuilt without a constructor of theirs."""


def _open_sequence(tree: Any) -> Node:
    positions = list(range(len(tree)))
    return Node(list(tree), positions, positions, type(tree))


def open_mapping(tree: Any) -> Node:
    """A dict of any kind, with its keys."""
    keys = list(tree)
    return Node(list(tree.values()), keys, keys, lambda new: _like_mapping(tree, new), counted=False)


def _like_mapping(tree: Any, children: Iterable[Any]) -> Any:
    kind: Any = type(tree)
    if kind is dict or kind is OrderedDict:
        return kind(zip(tree, children, strict=True))
    if kind is defaultdict:
        return defaultdict(tree.default_factory, zip(tree, children, strict=True))
    new = like(tree, OrderedDict if isinstance(tree, OrderedDict) else dict)
    if isinstance(tree, defaultdict):
        new.default_factory = tree.default_factory
    for key, child in zip(tree, children, strict=True):
        new[key] = child
    return new


def like(tree: Any, base: Any) -> Any:
    """A new object of the type of `tree`, with the attributes of `tree`; its constructor has nothing to add to them."""
    new = base.__new__(type(tree))
    for name, value in getattr(tree, "__dict__", {}).items():
        object.__setattr__(new, name, value)
    return new


add_sort("leaf", {type(None), bool, int, float, str, torch.Size}.__contains__, lambda tree: None, is_built_here=False)
add_sort("sequence", {tuple, list}.__contains__, _open_sequence)
add_sort("mapping", {dict, OrderedDict, defaultdict}.__contains__, open_mapping)
