"""The library, written a second time and by hand: a plain list of who is active, and each model's forward spelled out.

Nothing here binds, hooks or copies a context. A `Run` computes a model on the weights of a twin, passes every value
through `at`, and there walks along the list. What the library does has to be the same, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gallery.calling import Trip
from gallery.values import Box, Pair
from torch import Tensor
from torch.nn import functional

# --- who is active ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One site: the event of a run at which it is, and the part of the value there.

    Attributes:
        key: its path.
        event: where in a run: "head", "head@input", "head.weight", "@softmax", "@softmax.other".
        chain: the subscripts; `HEADS` for /2.
        gradient: whether the value is the gradient there.
        call: the only call to act at.
        per_call: whether each call has a key of its own.
    """

    key: str
    event: str
    chain: tuple[Any, ...] = ()
    gradient: bool = False
    call: int | None = None
    per_call: bool = False


HEADS = object()
"""In a chain: the last dimension in two groups."""


@dataclass(eq=False)
class Active:
    """One entry of an intervention.

    Attributes:
        groups: the places of each item, and whether it is a wildcard.
        change: the new value of a part; None leaves every value alone.
        keep: which values `cache` keeps; None for what is no capture.
        owner: the thread that has entered it; None where it is attached.
        steps: the only step to act at.
    """

    groups: list[tuple[list[Place], bool]]
    change: Callable[[Any], Any] | None = None
    keep: str | None = None
    owner: int | None = None
    steps: int | None = None
    stop: bool = False
    suspends: bool = False
    called: bool = False
    ended: bool = False
    reached: set[str] = field(default_factory=set)
    cache: dict[str, Any] = field(default_factory=dict)
    orders: dict[str, int] = field(default_factory=dict)
    step_of: dict[int, int] = field(default_factory=dict)

    @property
    def places(self) -> list[Place]:
        return list({place.key: place for places, _ in self.groups for place in places}.values())

    def missed(self) -> int:
        """How many items were not reached as they should have been."""
        found = [(sum(place.key not in self.reached for place in places), len(places), w) for places, w in self.groups]
        return sum(missing == total if wild else missing > 0 for missing, total, wild in found)

    def outcome_of_leaving(self) -> list[str]:
        """The class names of what leaving raises or warns."""
        if not self.missed():
            return []
        return ["SiteNotReached" if self.called or self.reached else "NotCalledWarning"]

    def outcome_of_removing(self) -> list[str]:
        return ["NotReachedWarning"] * self.missed() if self.called else []


def acting(active: list[Active], thread: int) -> list[Active]:
    """Who acts in `thread`, in order."""
    found: list[Active] = []
    for one in active:
        if one.owner in (None, thread):
            found = [] if one.suspends else [*found, one]
    return found


class Stopped(Exception):
    """A capture has seen everything that it wanted."""


# --- one run ----------------------------------------------------------------------------------------------------------


class Run:
    """One call of a model, under the interventions in `active`.

    Args:
        weights: the parameters of a model that no intervention has ever touched, by name.
        at_level: whether gradients are those of a transform: what does not depend on the input has none there.
    """

    orders = 0

    def __init__(self, active: list[Active], thread: int, weights: dict[str, Tensor], at_level: bool = False) -> None:
        self.active = acting(active, thread)
        self.thread = thread
        self.at_level = at_level
        self.counts: dict[str, int] = {}
        self.seen: dict[Active, set[str]] = {}
        self.weights = dict(weights)

    def __call__(self, forward: Callable[[Run, Any], Any], x: Tensor) -> Any:
        try:
            for one in self.active:
                one.called = True
                one.step_of[self.thread] = one.step_of.get(self.thread, -1) + 1
                for place in one.places:
                    if place.event in self.weights and self.admits(one, place, 0):
                        self.weights[place.event] = self.act(one, place, place.key, self.weights[place.event])
                    elif place.event == "@input" and self.admits(one, place, 0):
                        x = self.act(one, place, place.key, x)
            return self.at("", forward(self, x))
        except Stopped:
            return None

    def at(self, event: str, value: Any) -> Any:
        """What becomes of `value`, which has come to `event`."""
        return self.at_all({event: value})[0]

    def at_all(self, values: dict[str, Any]) -> list[Any]:
        """The same for several values that come at one time, as the arguments of a call do."""
        calls = {event: self.counts.get(event, -1) + 1 for event in values}
        self.counts.update(calls)
        watchers: dict[str, list[tuple[Active, Place]]] = {event: [] for event in values}
        for one in self.active:  # a watcher is one of the gradient of the very tensor that the value is now
            for place in one.places:
                event = place.event
                if event not in values or not self.admits(one, place, calls[event]):
                    continue
                if place.gradient:
                    watchers[event].append((one, place))
                    continue
                if one.change is not None:
                    values[event] = self.watched(values[event], watchers[event])
                    watchers[event] = []
                key = place.key.replace("#*", f"#{calls[event]}") if place.per_call else place.key
                values[event] = self.act(one, place, key, values[event])
        return [self.watched(value, watchers[event]) for event, value in values.items()]

    def admits(self, one: Active, place: Place, call: int) -> bool:
        return place.call in (None, call) and one.steps in (None, one.step_of[self.thread])

    def act(self, one: Active, place: Place, key: str, value: Any) -> Any:
        one.reached.add(place.key)
        if one.change is not None:
            return with_part(value, place.chain, one.change)
        if one.keep is not None:
            record(one, key, part(value, place.chain))
        if one.stop:
            seen = self.seen.setdefault(one, set())
            seen.add(place.key)
            if len(seen) == len(one.places):
                raise Stopped
        return value

    def watched(self, value: Any, watchers: list[tuple[Active, Place]]) -> Any:
        if not watchers or not torch.is_grad_enabled() or (self.at_level and not value.requires_grad):
            return value
        Run.orders += 1
        return Watched.apply(value if value.requires_grad else value.detach().requires_grad_(), watchers, Run.orders)

    # modules

    def module(self, name: str, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        return self.at(name, function(self.at(f"{name}@input", x)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        w, b = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.module(name, lambda x: functional.linear(x, w, b), x)


class Watched(torch.autograd.Function):
    """The identity; lets interventions act on the gradient, in their order."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, watchers: list[tuple[Active, Place]], order: int) -> Tensor:
        ctx.watchers, ctx.order = watchers, order
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        for one, place in ctx.watchers:
            if one.ended:
                continue
            one.reached.add(place.key)
            if one.change is not None:
                gradient = with_part(gradient, place.chain, one.change)
            if one.keep is None:
                continue
            before = one.orders.get(place.key)
            if before is None or (ctx.order < before if one.keep == "first" else ctx.order >= before):
                one.orders[place.key] = ctx.order
                one.cache[place.key] = part(gradient, place.chain)
        return gradient, None, None


def record(one: Active, key: str, value: Any) -> None:
    if one.keep == "all":
        one.cache.setdefault(key, []).append(value)
    elif one.keep == "last" or key not in one.cache:
        one.cache[key] = value


def part(value: Any, chain: tuple[Any, ...]) -> Any:
    for step in chain:
        if step is HEADS:
            value = value.unflatten(-1, (2, -1))
        else:
            value = getattr(value, step) if isinstance(value, Box) else value[step]
    return value


def with_part(value: Any, chain: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """`value` with its part at `chain` changed; a tensor by an assignment to a copy of it."""
    if not chain:
        new = change(value)
        return new.expand(value.shape) if isinstance(value, Tensor) else new
    first, rest = chain[0], chain[1:]
    if isinstance(value, Tensor):
        copy = value.clone()
        inner = part(copy, (first,))
        inner[...] = with_part(part(value, (first,)), rest, change)
        return copy
    inner = with_part(part(value, (first,)), rest, change)
    if isinstance(value, Box):
        return Box(**{**vars(value), first: inner})
    if isinstance(value, dict):
        return type(value)((key, inner if key == first else old) for key, old in value.items())
    children = [inner if i == first else old for i, old in enumerate(value)]
    return Pair(*children) if isinstance(value, Pair) else type(value)(children)


# --- the models -------------------------------------------------------------------------------------------------------


def mlp(run: Run, x: Tensor) -> Tensor:
    x = run.linear("embed", x)
    for i in range(3):
        x = x + run.module(f"blocks.{i}", lambda x, i=i: tanh(run, f"blocks.{i}.1", run.linear(f"blocks.{i}.0", x)), x)
    return run.linear("head", x)


def tanh(run: Run, name: str, x: Tensor) -> Tensor:
    return run.module(name, torch.tanh, x)


def thrice(run: Run, x: Tensor) -> Tensor:
    for _ in range(3):
        x = run.linear("block", x)
    return x


def normed(run: Run, x: Tensor) -> Tensor:
    weight, bias = run.weights["norm.weight"], run.weights["norm.bias"]
    value = run.module("norm", lambda x: functional.layer_norm(x, (4,), weight, bias), x)
    value, by, scale = run.at_all({"gate@value": value, "gate@by": x, "gate@scale": 1.0})
    return run.at("gate", value * by.sigmoid() * scale)


def nested(run: Run, x: Tensor) -> Tensor:
    def nest(x: Tensor) -> Any:
        return Pair(x, [x * 2, None]), OrderedDict(b=x * 3, a=(x * 4,)), {"box": Box((x * 5, None))}

    pair, ordered, boxed = run.module("nest", nest, run.linear("inner", x))
    return pair.left + pair.right[0] + ordered["b"] + ordered["a"][0] + boxed["box"].content[0]


def mixer(run: Run, x: Tensor) -> Tensor:
    run.weights["out.weight"] = run.weights["key.weight"]
    q, k = run.linear("query", x), run.linear("key", x)
    q, k = run.at_all({"@scores.q": q, "@scores.k": k})
    scores = run.at("@scores", product(run, q, k.transpose(-1, -2)))
    pattern = run.at("@softmax", torch.softmax(run.at("@softmax.input", scores), dim=-1))
    x = run.module("trip", Trip(), product(run, pattern, x))
    return run.linear("out", run.linear("out", x))


def product(run: Run, a: Tensor, b: Tensor) -> Tensor:
    return run.at("@matmul", torch.matmul(*run.at_all({"@matmul.input": a, "@matmul.other": b})))


FORWARDS: dict[str, Callable[[Run, Any], Any]] = {
    "Mlp": mlp,
    "Thrice": thrice,
    "Normed": normed,
    "Nested": nested,
    "Mixer": mixer,
}


# --- the paths, and what they select ----------------------------------------------------------------------------------

FIRST = (slice(None), 0)


def _places() -> Iterator[tuple[str, str, list[Place], bool]]:
    """Models, paths, what each selects, and whether it is a wildcard."""
    plain = {
        "Mlp": {
            "": Place("", ""),
            "@input[0]": Place("", "@input"),
            "embed": Place("", "embed"),
            "embed@input['input']": Place("", "embed@input"),
            "embed@weight": Place("", "embed.weight"),
            "head@weight[0]": Place("", "head.weight", (0,)),
            "head@bias": Place("", "head.bias"),
            "blocks.1": Place("", "blocks.1"),
            "blocks.1[:, 0]": Place("", "blocks.1", (FIRST,)),
            "blocks.1[1:4][:, ::2]": Place("", "blocks.1", (slice(1, 4), (slice(None), slice(None, None, 2)))),
            "blocks.2/2[..., 1, :]": Place("", "blocks.2", (HEADS, (..., 1, slice(None)))),
            "blocks.1.0@bias[2:]": Place("", "blocks.1.0.bias", (slice(2, None),)),
            "blocks.1.1@input[0]": Place("", "blocks.1.1@input"),
            "head@input[0][:, -1]": Place("", "head@input", ((slice(None), -1),)),
            "blocks.1@grad": Place("", "blocks.1", gradient=True),
            "blocks.1@grad[:, 0]": Place("", "blocks.1", (FIRST,), gradient=True),
            "embed@grad": Place("", "embed", gradient=True),
            "head@input.grad[0]": Place("", "head@input", gradient=True),
            "head@input.grad['input'][:, 0]": Place("", "head@input", (FIRST,), gradient=True),
        },
        "Thrice": {
            "block": Place("", "block"),
            "block#1": Place("", "block", call=1),
            "block#2[:, 0]": Place("", "block", (FIRST,), call=2),
            "block#*": Place("", "block", per_call=True),
            "block#0@input[0]": Place("", "block@input", call=0),
            "block@weight": Place("", "block.weight"),
            "block#1@grad": Place("", "block", gradient=True, call=1),
            "block@input[0]": Place("", "block@input"),
        },
        "Normed": {
            "norm": Place("", "norm"),
            "gate@input['by']": Place("", "gate@by"),
            "gate@input[0]": Place("", "gate@value"),
            "gate@input[1][:, 0]": Place("", "gate@by", (FIRST,)),
            "gate@input['scale']": Place("", "gate@scale"),
            "gate@input.grad['value']": Place("", "gate@value", gradient=True),
            "gate@grad": Place("", "gate", gradient=True),
            "norm@bias": Place("", "norm.bias"),
            "gate": Place("", "gate"),
        },
        "Nested": {
            "inner": Place("", "inner"),
            "nest[0][0]": Place("", "nest", (0, 0)),
            "nest[0][1][0][:, 0]": Place("", "nest", (0, 1, 0, FIRST)),
            "nest[1]['b']": Place("", "nest", (1, "b")),
            "nest[1]['a'][0]": Place("", "nest", (1, "a", 0)),
            "nest[2]['box']['content'][0]": Place("", "nest", (2, "box", "content", 0)),
            "nest@input['x']": Place("", "nest@input"),
            "inner@weight[:, 1]": Place("", "inner.weight", ((slice(None), 1),)),
        },
        "Mixer": {
            "query": Place("", "query"),
            "key@weight": Place("", "key.weight"),
            "out@bias": Place("", "out.bias"),
            "out#1": Place("", "out", call=1),
            "out#0@input[0]": Place("", "out@input", call=0),
            "trip": Place("", "trip"),
            "@softmax()": Place("", "@softmax"),
            "@softmax()[:, 0]": Place("", "@softmax", (FIRST,)),
            "@softmax().input[0]": Place("", "@softmax.input"),
            "@softmax().input['input']": Place("", "@softmax.input"),
            "@scores()": Place("", "@scores"),
            "@scores().input['k']": Place("", "@scores.k"),
            "@matmul#1()": Place("", "@matmul", call=1),
            "@matmul#0().input['other']": Place("", "@matmul.other", call=0),
            "@matmul#*()": Place("", "@matmul", per_call=True),
            "query@grad": Place("", "query", gradient=True),
            "trip@input.grad[0]": Place("", "trip@input", gradient=True),
        },
    }
    for model, paths in plain.items():
        for path, place in paths.items():
            yield model, path, [replace(place, key=path)], False
    yield "Mlp", "blocks.*", [Place(f"blocks.{i}", f"blocks.{i}") for i in range(3)], True
    yield "Mlp", "blocks.{0,2}", [Place(f"blocks.{i}", f"blocks.{i}") for i in (0, 2)], False
    yield "Mlp", "blocks.*@grad", [Place(f"blocks.{i}@grad", f"blocks.{i}", gradient=True) for i in range(3)], True
    yield "Mlp", "blocks.*.1", [Place(f"blocks.{i}.1", f"blocks.{i}.1") for i in range(3)], True


PLACES: dict[str, dict[str, tuple[list[Place], bool]]] = {}
for _model, _path, _found, _wild in _places():
    PLACES.setdefault(_model, {})[_path] = (_found, _wild)
