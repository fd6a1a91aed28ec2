"""Stations: where what acts on the gradients of one call's tensors stands in line.

NOTE [One line for each tensor]
Interventions at a gradient act in the order in which they were entered, whether they want the gradient of one tensor or
those of several tensors at once. So all that act on a tensor of a call stand at one station, in this order. A station
of one tensor is a hook on that tensor, at the level that differentiates it (`internals.hook_gradient`). Several tensors
whose gradients have to come by together go through one node of the graph, and so does a single one in compiled code.
Who stood at the stations of single tensors before moves over to the station of them all.

The node returns copies: an in-place layer may come next, which autograd forbids for the views that such a node makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks import internals
from nicehooks.errors import UnsupportedModule

Gradients = list[Any]
"""The gradients of some tensors, in their order."""
OnGradients = Callable[[Gradients], Gradients]


class _Standing(NamedTuple):
    """Somebody at a station: what they do, and to the gradients at which positions."""

    positions: list[int]
    fn: OnGradients

    def pass_by(self, gradients: Gradients) -> Gradients:
        new = self.fn([gradients[position] for position in self.positions])
        found = dict(zip(self.positions, new, strict=True))
        return [found.get(position, gradient) for position, gradient in enumerate(gradients)]


class Station:
    """Acts on the gradients of some tensors.

    Attributes:
        line: what acts, in order.
        last: what comes after all of them, whenever they were added: it sees what they did.
        sources: in traced code, what went into the node.
    """

    __slots__ = ("last", "line", "sources")

    def __init__(self) -> None:
        self.sources: list[Tensor] = []
        self.line: list[_Standing] = []
        self.last: list[_Standing] = []

    def pass_by(self, gradients: Gradients) -> Gradients:
        """The gradients after everything has acted on them."""
        for standing in [*self.line, *self.last]:
            gradients = standing.pass_by(gradients)
        return gradients

    def pass_one_by(self, gradient: Tensor) -> Tensor:
        """As `pass_by`, as a hook on a tensor has to say it."""
        (new,) = self.pass_by([gradient])
        return new

    def take_over(self, other: Station, positions: list[int]) -> None:
        """Whoever stands at `other`, whose tensors are at `positions` here, stands here from now on."""
        for mine, theirs in ((self.line, other.line), (self.last, other.last)):
            mine += [_Standing([positions[at] for at in standing.positions], standing.fn) for standing in theirs]
            theirs.clear()


class Stations:
    """The stations of the tensors that go into one call, or of those that come out of it."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[int, tuple[Tensor, Station]] = {}  # the tensors keep their ids their own

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._places

    def watch(self, tensors: Sequence[Tensor], fn: OnGradients, last: bool = False) -> list[Tensor]:
        """`tensors`, or what takes their place, with `fn` on their gradients, all at once."""
        if torch.compiler.is_compiling():
            return self._watch_in_traced_code(tensors, fn)
        station = self._station_of(tensors[0])
        if station is None or any([self._station_of(tensor) is not station for tensor in tensors]):
            station, tensors = self._new_station(tensors)
        if station is None:
            return list(tensors)
        at = [id(tensor) for tensor in self._tensors_of(station)]
        standing = _Standing([at.index(id(tensor)) for tensor in tensors], fn)
        (station.last if last else station.line).append(standing)
        return list(tensors)

    def _watch_in_traced_code(self, tensors: Sequence[Tensor], fn: OnGradients) -> list[Tensor]:
        """Dynamo traces what a node does when the node is made, so one more in the line needs a new node."""
        before = self._station_of(tensors[0])
        if any([self._station_of(tensor) is not before for tensor in tensors]):
            raise UnsupportedModule(PARTS)
        if before is not None and len(self._tensors_of(before)) != len(tensors):
            raise UnsupportedModule(PARTS)
        station = Station()
        station.sources = list(tensors) if before is None else before.sources
        station.line = [*([] if before is None else before.line), _Standing(list(range(len(tensors))), fn)]
        watched = _Node.apply(station, *station.sources)
        for tensor in watched:
            self._places[id(tensor)] = (tensor, station)
        return list(watched)

    def _station_of(self, tensor: Tensor) -> Station | None:
        place = self._places.get(id(tensor))
        return None if place is None else place[1]

    def _tensors_of(self, station: Station) -> list[Tensor]:
        return [tensor for tensor, at in self._places.values() if at is station]

    def _new_station(self, tensors: Sequence[Tensor]) -> tuple[Station | None, Sequence[Tensor]]:
        """A station of `tensors`, or of what takes their place; none where nothing differentiates them."""
        station, here = Station(), [id(tensor) for tensor in tensors]
        for before in [at for at in map(self._station_of, tensors) if at is not None]:
            theirs = [id(tensor) for tensor in self._tensors_of(before)]
            if set(theirs) <= set(here):  # else they come by at a later point of backward
                station.take_over(before, [here.index(one) for one in theirs])
        if len(tensors) == 1:
            hooked = internals.hook_gradient(tensors[0], station.pass_one_by)
            if hooked is None:
                return None, tensors
            tensors = [hooked]
        else:
            tensors = _NodeWithTangents.apply(station, *tensors)
        for tensor in tensors:
            self._places[id(tensor)] = (tensor, station)
        return station, tensors


PARTS = (
    "in compiled code, hooks on the gradients of one value have to be on the same parts of it: "
    "set them on the whole value."
)


class _Node(torch.autograd.Function):
    """The identity; see NOTE [One line for each tensor]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(station: Station, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple([tensor.clone() for tensor in tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.station = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None, *ctx.station.pass_by(list(gradients)))


class _NodeWithTangents(_Node):
    """As `_Node`, also in forward-mode differentiation; Dynamo takes no function that has it."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple([tangent.clone() for tangent in tangents[1:]])
