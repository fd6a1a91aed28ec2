"""Every sort of container besides tuples, lists and dicts: see NOTE [Sorts of containers]."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import optree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nicehooks import torch_private_tensors
from nicehooks.values.nodes import Node, add_sort, like, open_mapping


def _open_named_tuple(tree: Any) -> Node:
    return Node(list(tree), list(range(len(tree))), list(tree._fields), lambda new: tuple.__new__(type(tree), new))


def _open_packed_sequence(tree: Any) -> Node:
    """Its numbers are in `data`; the rest says which row is whose, and that is no value of the model."""
    node = _open_named_tuple(tree)

    def rebuild(children: Iterable[Any]) -> Any:
        data, sizes, *orders = children
        if isinstance(data, Tensor):  # the orders lie where the data lie, the sizes always on the CPU
            orders = [order if order is None else order.to(data.device) for order in orders]
        return node.rebuild((data, sizes, *orders))

    return node._replace(rebuild=rebuild, settings=(1, 2, 3))


def _open_structseq(tree: Any) -> Node:
    names = list(optree.structseq_fields(type(tree)))
    return Node(list(tree), list(range(len(tree))), names, lambda new: type(tree)(list(new)))


def _open_list(tree: Any) -> Node:
    def rebuild(children: Iterable[Any]) -> Any:
        new = like(tree, list)
        new.extend(children)
        return new

    return _open_plain(tree, rebuild)


def _open_tuple(tree: Any) -> Node:
    def rebuild(children: Iterable[Any]) -> Any:
        new: Any = tuple.__new__(type(tree), children)
        vars(new).update(vars(tree))
        return new

    return _open_plain(tree, rebuild)


def _open_plain(tree: Any, rebuild: Callable[[Iterable[Any]], Any]) -> Node:
    positions = list(range(len(tree)))
    return Node(list(tree), positions, positions, rebuild)


def _open_counted_mapping(tree: Any) -> Node:
    return open_mapping(tree)._replace(counted=True)


def _open_dataclass(tree: Any) -> Node:
    names = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]

    def rebuild(children: Iterable[Any]) -> Any:
        new = like(tree, object)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(new, name, child)
        return new

    return Node([getattr(tree, name) for name in names], names, names, rebuild)


def _open_registered_with_torch(tree: Any) -> Node:
    flatten, unflatten = torch_private_tensors.torch_node(type(tree))  # pyright: ignore[reportGeneralTypeIssues]
    children, context = flatten(tree)
    named = isinstance(context, list | tuple) and len(context) == len(children)
    named = named and all([isinstance(name, str) for name in context])
    entries = list(context) if named else torch_private_tensors.torch_names(tree) or list(range(len(children)))
    return Node(list(children), entries, entries, lambda new: unflatten(list(new), context))


def _open_known_to_optree(tree: Any) -> Node | None:
    if optree.tree_is_leaf(tree, none_is_leaf=True):
        return None
    children, context, entries, unflatten = optree.tree_flatten_one_level(tree, none_is_leaf=True)
    names = list(entries)
    return Node(list(children), names, names, lambda new: unflatten(context, tuple(new)))


def _is_model_output(kind: type) -> bool:
    """Whether `kind` is a dict whose items are fields too, as those of a `ModelOutput` of transformers."""
    return issubclass(kind, OrderedDict) and dataclasses.is_dataclass(kind)


def _is_plain_mapping(kind: type) -> bool:
    """Whether an item of a `kind` is set as that of any dict."""
    return issubclass(kind, dict) and kind.__setitem__ in (dict.__setitem__, OrderedDict.__setitem__)


def _is_mapping(kind: type) -> bool:
    special = _is_registered(kind) or dataclasses.is_dataclass(kind)
    return _is_model_output(kind) or (_is_plain_mapping(kind) and not special)


def _is_counted(kind: Any) -> bool:
    """A dict that looks up items in a way of its own, as `ModelOutput` does, takes positions too."""
    return _is_mapping(kind) and kind.__getitem__ is not dict.__getitem__


def _is_registered(kind: type) -> bool:
    return torch_private_tensors.torch_node(kind) is not None


def _is_list(kind: type) -> bool:
    return _is_plain_sequence(kind, list)


def _is_tuple(kind: type) -> bool:
    return _is_plain_sequence(kind, tuple)


def _is_plain_sequence(kind: type, base: type) -> bool:
    """Whether a `kind` is a `base` that gives and takes its items as any does."""
    if not issubclass(kind, base) or hasattr(kind, "__slots__") or dataclasses.is_dataclass(kind):
        return False
    return all([getattr(kind, name, None) is getattr(base, name, None) for name in ITEMS])


ITEMS = ("__iter__", "__getitem__", "__len__", "extend")
"""What a list, or a tuple, may do in a way of its own."""


def _is_packed(kind: type) -> bool:
    return kind is PackedSequence


add_sort("packed sequence", _is_packed, _open_packed_sequence)
add_sort("named tuple", optree.is_namedtuple_class, _open_named_tuple)
add_sort("structseq", optree.is_structseq_class, _open_structseq)
add_sort("counted mapping", _is_counted, _open_counted_mapping)
add_sort("other mapping", _is_mapping, open_mapping)
add_sort("registered with torch", _is_registered, _open_registered_with_torch, is_built_here=False)
add_sort("other list", _is_list, _open_list)
add_sort("other tuple", _is_tuple, _open_tuple)
add_sort("dataclass", dataclasses.is_dataclass, _open_dataclass)
add_sort("perhaps known to optree", lambda kind: True, _open_known_to_optree, is_built_here=False)
