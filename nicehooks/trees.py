"""Values with structure: reading and rewriting a part of one, whatever nests in it.

A *chain* is the tuple of subscripts that leads from a value to a part of it: Python subscripts (integers, strings,
slices, `None`, `...`, tuples of them) and `Heads`. Functions here raise `TreeMismatch` with the bare fact; the public
edge adds the site.

NOTE [The library's own namespace]
optree knows Python's containers, but neither dataclasses nor what others registered with `torch.utils._pytree`
(`ModelOutput`, say). Such a type is registered when its first value comes by, in a namespace of our own, so that optree
behaves for everybody else as before.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from nicehooks import internals
from nicehooks.errors import TreeMismatch

NAMESPACE = "nicehooks"
Chain = tuple[Any, ...]


class _Keep:
    """The type of `KEEP`."""

    def __repr__(self) -> str:
        return "KEEP"


KEEP = _Keep()
"""In a tree of new values: leave this part as it is."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """The step `/n` of a chain: the last dimension split into `n` equal groups."""

    count: int

    def __str__(self) -> str:
        return f"/{self.count}"


# --- taking apart and putting together --------------------------------------------------------------------------------


class Node(NamedTuple):
    """One level of a tree: what it holds, under which names, and how to build one like it."""

    children: list[Any]
    entries: list[Any]
    rebuild: Callable[[Iterable[Any]], Any]


_nodes: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}
_known: set[type] = {tuple, list, dict, OrderedDict, Tensor, torch.nn.Parameter, type(None), int, float, bool, str, torch.Size}


def leaves(tree: Any) -> list[Any]:
    """All leaves of `tree` in order; `None` is a leaf."""
    if isinstance(tree, Tensor):
        return [tree]
    while True:
        found = optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)
        if not _learn_types(found):
            return found


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with `fn` applied to each of its tensors."""
    if isinstance(tree, Tensor):
        return fn(tree)
    leaves(tree)  # makes its types known

    def on_leaf(leaf: Any) -> Any:
        return fn(leaf) if isinstance(leaf, Tensor) else leaf

    return optree.tree_map(on_leaf, tree, none_is_leaf=True, namespace=NAMESPACE)


def open_node(tree: Any) -> Node | None:
    """The first level of `tree`, or None where it is a leaf.

    The containers that everybody uses are taken apart here, because Dynamo can trace this; optree knows the rest.
    """
    kind: Any = type(tree)
    if isinstance(tree, Tensor):
        return None
    if kind is tuple or kind is list:
        return Node(list(tree), list(range(len(tree))), kind)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return Node(list(tree), list(range(len(tree))), lambda new: kind(*new))
    if kind is dict or kind is OrderedDict:
        return Node(list(tree.values()), list(tree), lambda new: kind(zip(tree, new, strict=True)))
    _learn(kind)
    if kind in _nodes:
        flatten, unflatten = _nodes[kind]
        children, context, *entries = flatten(tree)
        names = list(entries[0] if entries and entries[0] is not None else range(len(children)))
        return Node(list(children), names, lambda new: unflatten(context, tuple(new)))
    if optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE):
        return None
    children, context, names, build = optree.tree_flatten_one_level(tree, none_is_leaf=True, namespace=NAMESPACE)
    return Node(list(children), list(names), lambda new: build(context, tuple(new)))


def _learn_types(found: list[Any]) -> bool:
    """Registers the containers among the leaves `found`; whether there were any."""
    return any([_learn(type(leaf)) for leaf in found])


@internals.evaluated_while_tracing
def _learn(kind: type) -> bool:
    if kind in _known:
        return False
    _known.add(kind)
    return _register(kind)


def _register(kind: type) -> bool:
    """See NOTE [The library's own namespace]."""
    if optree.is_namedtuple_class(kind) or optree.is_structseq_class(kind):  # optree takes these apart by itself
        return False
    node = internals.torch_node(kind)
    if node is not None:
        flatten, unflatten = _like_torch(*node)
    elif dataclasses.is_dataclass(kind):
        flatten, unflatten = _like_dataclass(kind)
    elif issubclass(kind, dict) and kind.__setitem__ is dict.__setitem__:
        flatten, unflatten = _like_dict(kind)
    else:
        return False
    _nodes[kind] = flatten, unflatten
    optree.register_pytree_node(kind, flatten, unflatten, namespace=NAMESPACE)
    return True


def _like_torch(take: Callable[..., Any], put: Callable[..., Any]) -> tuple[Any, Any]:
    def flatten(value: Any) -> Any:
        children, context = take(value)
        names = context if isinstance(context, list | tuple) and len(context) == len(children) else None
        return tuple(children), context, None if names is None else tuple(names)

    return flatten, lambda context, children: put(list(children), context)


def _like_dataclass(kind: Any) -> tuple[Any, Any]:
    names = tuple(field.name for field in dataclasses.fields(kind))

    def build(_: Any, children: Iterable[Any]) -> Any:
        new = object.__new__(kind)  # the fields of a value that exists: __init__ has nothing to check or to add
        for name, child in zip(names, children, strict=True):
            object.__setattr__(new, name, child)
        return new

    return lambda value: (tuple(getattr(value, name) for name in names), None, names), build


def _like_dict(kind: Any) -> tuple[Any, Any]:
    def build(keys: Any, children: Iterable[Any]) -> Any:
        new = kind.__new__(kind)
        dict.update(new, zip(keys, children, strict=True))
        return new

    return lambda value: (tuple(value.values()), tuple(value), tuple(value)), build


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
    return tree if new is part else _replace(tree, chain[0], new)


def length(tree: Any, items: list[Any], position: int) -> int:
    """How many sites the `*` at `position` among the items of a subscript stands for."""
    if not isinstance(tree, Tensor):
        node = open_node(tree)
        if node is None:
            raise TreeMismatch(f"[*] needs a tensor or a container, not {describe(tree)}")
        return len(node.children)
    before, after = items[:position], items[position:]
    dim = sum(item is not None for item in before)
    if Ellipsis in before:
        dim = tree.ndim - sum(item is not None for item in after)
    if not 0 <= dim < tree.ndim:
        raise TreeMismatch(f"[*] is at dimension {dim} of {describe(tree)}")
    return tree.shape[dim]


def _step(tree: Any, step: Any) -> Any:
    if isinstance(tree, Tensor):
        return _split(tree, step.count) if isinstance(step, Heads) else _index(tree, step)
    if isinstance(step, Heads) or (isinstance(step, tuple) and step != ()) or isinstance(step, slice):
        raise TreeMismatch(f"{show_step(step)} needs a tensor, not {describe(tree)}")
    node, position = _child(tree, step)
    return node.children[position]


def _replace(tree: Any, step: Any, new: Any) -> Any:
    if isinstance(tree, Tensor):
        return new.flatten(-2) if isinstance(step, Heads) else _scatter(tree, step, new)
    node, position = _child(tree, step)
    if isinstance(tree, dict):  # keeps what a dict subclass carries beside its items
        changed = copy.copy(tree)
        changed[node.entries[position]] = new
        return changed
    return node.rebuild([*node.children[:position], new, *node.children[position + 1 :]])


def _child(tree: Any, step: Any) -> tuple[Node, int]:
    """The node of `tree` and the position in it of what `step` names: a position, a key or a field."""
    node = open_node(tree)
    if node is None:
        raise TreeMismatch(f"{show_step(step)} needs a tensor or a container, not {describe(tree)}")
    fields = getattr(tree, "_fields", node.entries)
    for names in (node.entries, list(fields)):
        if step in names and not (isinstance(tree, tuple | list) and isinstance(step, int)):
            return node, names.index(step)
    if isinstance(step, int) and -len(node.children) <= step < len(node.children):
        return node, step % len(node.children)
    have = ", ".join(repr(name) for name in fields) if fields else "nothing"
    raise TreeMismatch(f"{show_step(step)} is not in {describe(tree)}, which has {have}")


def _split(tensor: Tensor, count: int) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[-1] % count:
        raise TreeMismatch(f"/{count} does not divide the last dimension of {describe(tensor)}")
    return tensor.unflatten(-1, (count, tensor.shape[-1] // count))


def _index(tensor: Tensor, step: Any) -> Tensor:
    items = step if isinstance(step, tuple) else (step,)
    if any(isinstance(item, str) for item in items):
        raise TreeMismatch(f"{show_step(step)} is a key, but the value is {describe(tensor)}")
    if any(isinstance(item, slice) and item.step is not None and item.step < 1 for item in items):
        raise TreeMismatch(f"{show_step(step)} steps backwards, which PyTorch does not do")
    try:
        return tensor[step]
    except IndexError:
        raise TreeMismatch(f"{show_step(step)} is out of range for {describe(tensor)}") from None


def _scatter(base: Tensor, step: Any, new: Tensor) -> Tensor:
    """`base` with the region `step` replaced by `new`, which has the region's shape; out of place, under `vmap` too."""
    items = list(step) if isinstance(step, tuple) else [step]
    if any(isinstance(item, list) for item in items):
        return _scatter_scattered(base, step, new)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        fill = base.ndim - sum(item is not None and item is not Ellipsis for item in items)
        items[at : at + 1] = [slice(None)] * fill
    return _scatter_from(base, items, new, 0)


def _scatter_from(base: Tensor, items: list[Any], new: Tensor, dim: int) -> Tensor:
    if not items:
        return new
    item, rest = items[0], items[1:]
    if item is None:
        return _scatter_from(base, rest, new.squeeze(dim), dim)
    if isinstance(item, int):
        part = _scatter_from(base.select(dim, item), rest, new, dim)
        return torch.select_scatter(base, part, dim, item)
    if item == slice(None):
        return _scatter_from(base, rest, new, dim + 1)
    part = _scatter_from(base[(slice(None),) * dim + (item,)], rest, new, dim + 1)
    return torch.slice_scatter(base, part, dim, item.start, item.stop, item.step or 1)


def _scatter_scattered(base: Tensor, step: Any, new: Tensor) -> Tensor:
    positions = torch.arange(base.numel(), device=base.device).reshape(base.shape)[step].flatten()
    return base.flatten().index_copy(0, positions, new.flatten()).reshape(base.shape)


# --- assignment -------------------------------------------------------------------------------------------------------


def assign(old: Any, new: Any) -> Any:
    """What stands in the place of `old` after `new` was assigned to it.

    A tensor is broadcast to the shape of the old one and cast to its dtype and device. A tree replaces leaf by leaf,
    a number every tensor of a tree, and `KEEP` nothing.
    """
    if new is old or new is KEEP:
        return old
    if isinstance(old, Tensor):
        return _fit(old, new)
    node = open_node(old)
    if node is None:
        return new
    if isinstance(new, int | float | complex):
        return map_tensors(lambda tensor: _fit(tensor, new), old)
    return _assign_children(old, node, new)


def _assign_children(old: Any, node: Node, new: Any) -> Any:
    values = _matching(old, node, new)
    children: list[Any] = []
    for entry, child, value in zip(node.entries, node.children, values, strict=True):
        try:
            children.append(assign(child, value))
        except TreeMismatch as error:
            raise TreeMismatch(f"{error} (in element {entry!r})") from None
    if all(a is b for a, b in zip(children, node.children, strict=True)):
        return old
    return node.rebuild(children)


def _matching(old: Any, node: Node, new: Any) -> list[Any]:
    """The new values for the children of `old`, in its order; keys that a mapping does not name stay."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and set(new) <= set(node.entries):
        return [new.get(entry, KEEP) for entry in node.entries]
    other = open_node(new)
    plain = isinstance(old, tuple | list) and isinstance(new, tuple | list)
    if other is None or len(other.children) != len(node.children) or not (plain or type(old) is type(new)):
        raise TreeMismatch(f"{describe(new)} came where {describe(old)} stands")
    return other.children


def _fit(old: Tensor, new: Any) -> Tensor:
    if isinstance(new, int | float | complex):
        return torch.full_like(old, new)
    if not isinstance(new, Tensor):
        raise TreeMismatch(f"{describe(new)} came where {describe(old)} stands")
    value = usable(new)
    while value.ndim > old.ndim and value.shape[0] == 1:  # as in Python's own x[...] = value
        value = value.squeeze(0)
    if not fits(value.shape, old.shape):
        raise TreeMismatch(f"{describe(new)} does not broadcast to {describe(old)}")
    if value.is_complex() and not old.is_complex():
        raise TreeMismatch(f"{describe(new)} has an imaginary part, {describe(old)} has none")
    value = value.to(device=old.device, dtype=old.dtype)
    return value if value.shape == old.shape else value.expand(old.shape).clone()  # in-place layers need memory of its own


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


# --- descriptions -----------------------------------------------------------------------------------------------------


def show_step(step: Any) -> str:
    """A step of a chain as it is written in a path."""
    if isinstance(step, Heads):
        return str(step)
    if isinstance(step, tuple):
        inner = ", ".join(_show_item(item) for item in step)
        return f"[{inner},]" if len(step) == 1 else f"[{inner}]"
    return f"[{_show_item(step)}]"


def _show_item(item: Any) -> str:
    if item is Ellipsis:
        return "..."
    if not isinstance(item, slice):
        return str(item) if isinstance(item, Star) else repr(item)
    start, stop, step = ("" if bound is None else str(bound) for bound in (item.start, item.stop, item.step))
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


class Star:
    """`*` in a subscript: one site per index. `STAR` is the only one."""

    def __repr__(self) -> str:
        return "*"


STAR = Star()


def describe(value: Any) -> str:
    """The structure of a value, with shapes and dtypes, never contents."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    node = open_node(value)
    if node is None:
        return "None" if value is None else type(value).__name__
    inner = [describe(child) for child in node.children]
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        name = "" if type(value) in (tuple, list) else type(value).__name__
        return f"{name}({', '.join(inner)})" if isinstance(value, tuple) else f"{name}[{', '.join(inner)}]"
    names = getattr(value, "_fields", node.entries)
    named = ", ".join(f"{name}: {text}" for name, text in zip(names, inner, strict=True))
    return f"{{{named}}}" if type(value) is dict else f"{type(value).__name__}({named})"
