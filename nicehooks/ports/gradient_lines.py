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

from nicehooks import torch_private
from nicehooks.errors import UnsupportedModule
from nicehooks.values.trees import place_in

Gradients = list[Any]
"""The gradients of some tensors, in their order."""
OnGradients = Callable[[Gradients], Gradients]


class _Standing(NamedTuple):
    """Somebody at a station: what they do, and to the gradients at which positions."""

    positions: list[int]
    fn: OnGradients
    ticket: Tensor | None = None

    def pass_by(self, gradients: Gradients) -> Gradients:
        """The gradients after it has acted on them; behind them, the gradient of its ticket, if it has one."""
        new = self.fn([gradients[position] for position in self.positions])
        of_ticket = new[len(self.positions) :]
        found = dict(zip(self.positions, new[: len(self.positions)], strict=True))
        return [*[found.get(position, gradient) for position, gradient in enumerate(gradients)], *of_ticket]


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
            gradients = standing.pass_by(gradients)[: len(gradients)]
        return gradients

    def pass_by_with_tickets(self, gradients: Gradients) -> tuple[Gradients, Gradients]:
        """As `pass_by`, and the gradient of each of the `tickets`."""
        count, tickets = len(gradients), self.tickets
        of_tickets: list[Any] = [0.0] * len(tickets)
        for standing in self.line:
            new = standing.pass_by(gradients)
            gradients = new[:count]
            for at, ticket in enumerate(tickets):
                if ticket is standing.ticket:
                    of_tickets[at] = of_tickets[at] + new[count]
        return gradients, of_tickets

    @property
    def tickets(self) -> list[Tensor]:
        """Of those that act through an operator; see NOTE [Gradients of compiled code]."""
        found: list[Tensor] = []
        for standing in self.line:
            if standing.ticket is not None and not any([standing.ticket is ticket for ticket in found]):
                found.append(standing.ticket)
        return found

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
        self._places: list[tuple[Tensor, Station]] = []

    def __contains__(self, tensor: Tensor) -> bool:
        return self._station_of(tensor) is not None

    def watch(
        self, tensors: Sequence[Tensor], fn: OnGradients, last: bool = False, ticket: Tensor | None = None
    ) -> list[Tensor]:
        """`tensors`, or what takes their place, with `fn` on their gradients, all at once.

        With a `ticket`, which traced code has, the last that `fn` returns is the gradient of the ticket.
        """
        if torch.compiler.is_compiling():
            return self._watch_in_traced_code(tensors, fn, ticket)
        station = self._station_of(tensors[0])
        if station is None or any([self._station_of(tensor) is not station for tensor in tensors]):
            station, tensors = self._new_station(tensors)
        if station is None:
            return list(tensors)
        standing = _Standing(_places_in(self._tensors_of(station), tensors), fn)
        (station.last if last else station.line).append(standing)
        return list(tensors)

    def _watch_in_traced_code(self, tensors: Sequence[Tensor], fn: OnGradients, ticket: Any) -> list[Tensor]:
        """Dynamo traces what a node does when the node is made, so one more in the line needs a new node."""
        before = self._station_of(tensors[0])
        if any([self._station_of(tensor) is not before for tensor in tensors]):
            raise UnsupportedModule(PARTS)
        if before is not None and len(self._tensors_of(before)) != len(tensors):
            raise UnsupportedModule(PARTS)
        station = Station()
        station.sources = list(tensors) if before is None else before.sources
        station.line = [*([] if before is None else before.line), _Standing(list(range(len(tensors))), fn, ticket)]
        watched = _Node.apply(station, *station.tickets, *station.sources)
        self._places += [(tensor, station) for tensor in watched]
        return list(watched)

    def _station_of(self, tensor: Tensor) -> Station | None:
        return next((station for watched, station in reversed(self._places) if watched is tensor), None)

    def _tensors_of(self, station: Station) -> list[Tensor]:
        return [tensor for tensor, at in self._places if at is station]

    def _new_station(self, tensors: Sequence[Tensor]) -> tuple[Station | None, Sequence[Tensor]]:
        """A station of `tensors`, or of what takes their place; none where nothing differentiates them."""
        station = Station()
        for before in [at for at in map(self._station_of, tensors) if at is not None]:
            theirs = self._tensors_of(before)
            if all([place_in(tensors, one) is not None for one in theirs]):  # else they come by later in backward
                station.take_over(before, _places_in(tensors, theirs))
        if len(tensors) == 1:
            hooked = torch_private.hook_gradient(tensors[0], station.pass_one_by)
            if hooked is None:
                return None, tensors
            tensors = [hooked]
        else:
            tensors = _NodeWithTangents.apply(station, *tensors)
        self._places += [(tensor, station) for tensor in tensors]
        return station, tensors


def _places_in(tensors: Sequence[Tensor], some: Sequence[Tensor]) -> list[int]:
    """Where each of `some` stands among `tensors`, which has them all."""
    return [at for one in some if (at := place_in(tensors, one)) is not None]


PARTS = (
    "in compiled code, hooks on the gradients of one value have to be on the same parts of it: "
    "set them on the whole value."
)


class _Node(torch.autograd.Function):
    """The identity; see NOTE [One line for each tensor]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(station: Station, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple([tensor.clone() for tensor in tensors[len(station.tickets) :]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.station = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if not ctx.station.tickets:
            return (None, *ctx.station.pass_by(list(gradients)))
        new, of_tickets = ctx.station.pass_by_with_tickets(list(gradients))
        return (None, *of_tickets, *new)


class _NodeWithTangents(_Node):
    """As `_Node`, also in forward-mode differentiation; Dynamo takes no function that has it."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple([tangent.clone() for tangent in tangents[1:]])
