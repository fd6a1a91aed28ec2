"""What was seen at a site: one value, or one per call, and whether something has overwritten it since."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from nicehooks import torch_private, torch_private_tensors
from nicehooks.values import trees

_T = TypeVar("_T")


class Calls(list[_T]):
    """One value per call of a site, in the order in which the calls ended: what `keep="all"` collects."""


class Link:
    """One more call, behind those before: how compiled code collects calls without looking at them.

    What it looked at, Dynamo would guard, and compile again for each number of calls.
    """

    def __init__(self, before: Any, value: Any) -> None:
        self.before = before
        self.value = value


class GraphWatch:
    """Compares the versions of what traced code has captured with those at the end of the model's call.

    Compiled code has no versions to look at later: what it gives out are the final values of a graph. The number of
    writes to each is a result of the graph like any other, and a constant in most. They are left in the cache without
    a look at what is there, which Dynamo would guard: `[key] = (value, writes)`, or `Link`s of that for all calls.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.all_calls = False
        self.pending: list[tuple[str, Any, Tensor, Any]] = []

    def note(self, key: str, value: Any, all_calls: bool) -> None:
        """From here on a write to a tensor of `value` counts."""
        self.all_calls = all_calls
        for leaf in trees.leaves(value):
            if isinstance(leaf, Tensor):
                self.pending.append((key, value, leaf, torch_private_tensors.version_traced(leaf)))

    def settle(self) -> None:
        """Leaves the numbers of writes so far; those of a call before stay where this one has captured nothing."""
        self.cache._graph_watch = None
        if not self.pending:
            return
        writes: dict[str, Any] = {}
        for key, value, tensor, version in self.pending:
            before = writes[key][1] if key in writes else 0
            writes[key] = (value, before + torch_private_tensors.version_traced(tensor) - version)
        self.cache._graph_writes = Link(self.cache._graph_writes, writes) if self.all_calls else writes


def calls_of(link: Link) -> Calls[Any]:
    """The calls that `link` and those before it stand for."""
    values: list[Any] = []
    before: Any = link
    while type(before) is Link:
        values.append(before.value)
        before = before.before
    return Calls([*(before or ()), *reversed(values)])


class Watch(list[tuple[Any, Any]]):
    """The tensors of a captured value, held weakly, each with its version when it was captured.

    Attributes:
        overwritten: whether compiled code has overwritten one of them before it gave them out.
        lives: of the transforms that the tensors belong to; see `torch_private_tensors.life_of`.
        containers: those of the value that can change, by their ids, each with a copy of it as it was. They go with the
            watch: when the value leaves the cache.
    """

    overwritten: bool = False
    lives: tuple[Any, ...] = ()
    containers: Mapping[int, tuple[Any, Any]] = MappingProxyType({})

    @staticmethod
    def over(value: Any) -> Watch:
        """A watch over `value` as it is now."""
        tensors = _tensors(value)
        watch = Watch((weakref.ref(tensor), version_of(tensor)) for tensor in tensors)
        if torch_private.innermost_transform() is not None:
            lives = [torch_private_tensors.life_of(tensor) for tensor in tensors]
            watch.lives = tuple(life for life in lives if life is not None)
        each = [(one, trees.as_it_is(one)) for one in (value if type(value) is Calls else [value])]
        watch.containers = {id(one): (one, kept) for one, kept in each if kept is not one}
        return watch

    def over_other(self, value: Any) -> Watch:
        """The watch over `value` in another cache, which may share tensors with what this one watches over."""
        if not self.containers:
            return self
        watch, own = self.joined(Watch()), value if type(value) is Calls else [value]
        watch.containers = {id(one): self.containers[id(one)] for one in own if id(one) in self.containers}
        return watch

    def as_captured(self, value: Any) -> Any:
        """`value` itself, if its containers are what they were; else what they were, around the same tensors."""
        if not self.containers:
            return value
        if type(value) is not Calls:
            return self._one_as_captured(value)
        calls = [self._one_as_captured(one) for one in value]
        return Calls(calls) if any(new is not old for new, old in zip(calls, value, strict=True)) else value

    def _one_as_captured(self, value: Any) -> Any:
        _, kept = self.containers.get(id(value), (None, value))
        return value if trees.has_spine_of(value, kept) else kept

    def joined(self, other: Watch) -> Watch:
        """A watch over what both watch over."""
        watch = Watch([*self, *other])
        watch.lives = (*self.lives, *other.lives)
        watch.containers = {**self.containers, **other.containers}
        watch.overwritten = self.overwritten or other.overwritten
        return watch

    @staticmethod
    def before(value: Any, version: Any) -> Watch:
        """A watch over a tensor, or a tuple of them, as it was when its version, or their versions, were `version`."""
        if isinstance(value, Tensor):
            return Watch([(weakref.ref(value), version)])
        tensors = [one for one in value if one is not None]
        return Watch((weakref.ref(tensor), number) for tensor, number in zip(tensors, version, strict=True))

    def outlived(self, value: Any) -> bool:
        """Whether a transform is over that `value`, or what it was computed from, belongs to."""
        return any(map(torch_private_tensors.is_over, self.lives)) and any(
            map(torch_private_tensors.is_wrapped, _tensors(value))
        )

    def notices(self, value: Any) -> bool:
        """Whether a tensor of `value` was overwritten; other tensors than those that are watched do not count."""
        pairs = zip(self, _tensors(value), strict=False)
        return self.overwritten or any(
            tensor() is now and version_of(now) != version for (tensor, version), now in pairs
        )


def _tensors(value: Any) -> list[Tensor]:
    if type(value) is tuple and all([one is None or type(one) is Tensor for one in value]):
        return [one for one in value if one is not None]  # what attention modules return: worth a short way
    return [leaf for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]


def versions_of(value: tuple[Any, ...]) -> list[int]:
    """The versions of the tensors in a tuple, beside which there may be None and nothing else.

    Raises:
        AttributeError: something else is in it.
        RuntimeError: one of them was made under `inference_mode`.
    """
    return [torch_private.version_counter(one) for one in value if one is not None]


def version_of(tensor: Tensor) -> Any:
    """What changes when `tensor` is written to: its version counter.

    Tensors made under `inference_mode` have none; a checksum stands in for it there.
    """
    if not tensor.is_inference():
        return torch_private_tensors.version(tensor)
    with torch_private_tensors.outside_transforms(0):  # under vmap no tensor gives its numbers away
        return _checksum(torch_private_tensors.unwrapped(tensor))


def _checksum(tensor: Tensor) -> str:
    """Sums of the whole and of several parts, which notice most values that only change places, too."""
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    parts = [tensor.detach()]
    for dim, size in enumerate(tensor.shape):
        everything = (slice(None),) * dim
        parts += [parts[0][(*everything, slice(None, None, 2))], parts[0][(*everything, slice(size // 2))]]
    return str([part.sum(dtype=kind).item() for part in parts])  # as text: NaN equals itself


def _flatten_calls(calls: Calls[Any]) -> tuple[list[Any], None]:
    return list(calls), None


torch_private_tensors.register_torch_node(Calls, _flatten_calls, lambda values, _: Calls(values))
optree.register_pytree_node(
    Calls,
    lambda calls: (tuple(calls), None),
    lambda _, values: Calls(values),
    namespace=torch_private_tensors.EVERY_NAMESPACE,
)
