"""Containers: what a nested value is made of, taken apart and put together again.

NOTE [Dynamo and containers]
Everything here is traced by `torch.compile`. What depends on a type alone is found out by `_sort_of`, which runs while
Dynamo traces; the rest is written in Python that Dynamo knows. Under Dynamo, `copy.copy` forgets the items of a dict
subclass and does not take a dict at all (torch 2.13), so it is not used.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nicehooks import torch_private


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
    return _OPENERS[_sort_of(type(tree))](tree)


def is_same(new: Any, old: Any) -> bool:
    """Whether `new` is `old`. Dynamo tells this of tensors alone; nothing is lost where a container is rebuilt."""
    return new is old if isinstance(old, Tensor) or not torch.compiler.is_compiling() else False


def place_in(values: Iterable[Any], value: Any) -> int | None:
    """Where `value` itself stands among `values`. Not by `id`: compiled code would be for that one tensor alone."""
    return next((at for at, one in enumerate(values) if one is value), None)


def leaves(tree: Any) -> list[Any]:
    """All leaves of `tree` in order; `None` is a leaf."""
    if isinstance(tree, Tensor):
        return [tree]
    node = open_node(tree)
    return [tree] if node is None else [leaf for child in node.children for leaf in leaves(child)]


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
    if tree is None or isinstance(tree, Tensor | bool | int | float | str) or _sort_of(type(tree)) not in _BUILT_HERE:
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


def is_nested(value: Any) -> bool:
    """Whether `value` is a tensor of tensors that differ in shape: some of its sizes are no numbers."""
    return isinstance(value, Tensor) and value.is_nested


def bytes_of(tensor: Tensor) -> int:
    """The memory of the numbers of `tensor`; of a sparse one, of those that it holds."""
    if tensor.layout is not torch.strided:
        return sum(map(bytes_of, torch_private.held_by(tensor)))
    return tensor.numel() * tensor.element_size()


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


def one_size(tensor: Tensor, dim: int) -> int | None:
    """The size of a dimension; None where it is another for each of the tensors that are nested in `tensor`."""
    if not is_nested(tensor):
        return tensor.shape[dim]
    size = torch_private.nested_sizes(tensor)[dim]
    return None if isinstance(size, str) else size


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
def _sort_of(kind: type) -> str:
    """The key in `_OPENERS` of what opens values of the type `kind`."""
    return _find_sort(kind)


@lru_cache(maxsize=4096)
def _find_sort(kind: type) -> str:
    if kind in (type(None), bool, int, float, str, torch.Size):
        return "leaf"
    if kind in (tuple, list):
        return "sequence"
    if kind is PackedSequence:
        return "packed sequence"
    if optree.is_namedtuple_class(kind):
        return "named tuple"
    if optree.is_structseq_class(kind):
        return "structseq"
    if kind in (dict, OrderedDict, defaultdict) or _is_model_output(kind):
        return _sort_of_mapping(kind)
    if torch_private.torch_node(kind) is not None:
        return "registered with torch"
    if dataclasses.is_dataclass(kind):
        return "dataclass"
    return _sort_of_mapping(kind) if _is_plain_mapping(kind) else "perhaps known to optree"


def _is_model_output(kind: type) -> bool:
    """Whether `kind` is a dict whose items are fields too, as those of a `ModelOutput` of transformers."""
    return issubclass(kind, OrderedDict) and dataclasses.is_dataclass(kind)


def _is_plain_mapping(kind: type) -> bool:
    """Whether an item of a `kind` is set as that of any dict."""
    return issubclass(kind, dict) and kind.__setitem__ in (dict.__setitem__, OrderedDict.__setitem__)


def _sort_of_mapping(kind: Any) -> str:
    """A dict that looks up items in a way of its own, as `ModelOutput` does, takes positions too."""
    return "mapping" if kind.__getitem__ is dict.__getitem__ else "counted mapping"


def _open_sequence(tree: Any) -> Node:
    positions = list(range(len(tree)))
    return Node(list(tree), positions, positions, type(tree))


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


def _open_mapping(tree: Any) -> Node:
    keys = list(tree)
    return Node(list(tree.values()), keys, keys, lambda new: _like_mapping(tree, new), counted=False)


def _open_counted_mapping(tree: Any) -> Node:
    return _open_mapping(tree)._replace(counted=True)


def _like_mapping(tree: Any, children: Iterable[Any]) -> Any:
    kind: Any = type(tree)
    if kind is dict or kind is OrderedDict:
        return kind(zip(tree, children, strict=True))
    if kind is defaultdict:
        return defaultdict(tree.default_factory, zip(tree, children, strict=True))
    new = _like(tree, OrderedDict if isinstance(tree, OrderedDict) else dict)
    if isinstance(tree, defaultdict):
        new.default_factory = tree.default_factory
    for key, child in zip(tree, children, strict=True):
        new[key] = child
    return new


def _open_dataclass(tree: Any) -> Node:
    names = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]

    def rebuild(children: Iterable[Any]) -> Any:
        new = _like(tree, object)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(new, name, child)
        return new

    return Node([getattr(tree, name) for name in names], names, names, rebuild)


def _like(tree: Any, base: Any) -> Any:
    """A new object of the type of `tree`, with the attributes of `tree`; its constructor has nothing to add to them."""
    new = base.__new__(type(tree))
    for name, value in getattr(tree, "__dict__", {}).items():
        object.__setattr__(new, name, value)
    return new


def _open_registered_with_torch(tree: Any) -> Node:
    flatten, unflatten = torch_private.torch_node(type(tree))  # pyright: ignore[reportGeneralTypeIssues]
    children, context = flatten(tree)
    named = isinstance(context, list | tuple) and len(context) == len(children)
    named = named and all([isinstance(name, str) for name in context])
    entries = list(context) if named else torch_private.torch_names(tree) or list(range(len(children)))
    return Node(list(children), entries, entries, lambda new: unflatten(list(new), context))


def _open_known_to_optree(tree: Any) -> Node | None:
    if optree.tree_is_leaf(tree, none_is_leaf=True):
        return None
    children, context, entries, unflatten = optree.tree_flatten_one_level(tree, none_is_leaf=True)
    names = list(entries)
    return Node(list(children), names, names, lambda new: unflatten(context, tuple(new)))


_OPENERS: dict[str, Callable[[Any], Node | None]] = {
    "leaf": lambda tree: None,
    "sequence": _open_sequence,
    "named tuple": _open_named_tuple,
    "packed sequence": _open_packed_sequence,
    "structseq": _open_structseq,
    "mapping": _open_mapping,
    "counted mapping": _open_counted_mapping,
    "registered with torch": _open_registered_with_torch,
    "dataclass": _open_dataclass,
    "perhaps known to optree": _open_known_to_optree,
}

_BUILT_HERE = ("sequence", "named tuple", "packed sequence", "structseq", "mapping", "counted mapping", "dataclass")
"""The sorts that are rebuilt without a constructor of theirs."""
