"""A machine that does the same to the library and to the reference, in any order and thread, and compares."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gallery.attention import Mixer
from gallery.calling import Boom
from gallery.returning import Through
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from reference import FORWARDS, PLACES, Active, Run
from torch import Tensor, nn
from worlds import make, state

from nicehooks import (
    ContextMisuse,
    NiceHooksError,
    NiceHooksWarning,
    ablate,
    capture,
    describe,
    edit,
    patch,
    splice,
    steer,
    suspend,
)
from nicehooks.contexts.intervention import Intervention
from nicehooks.values import trees

THREADS = [ThreadPoolExecutor(1) for _ in range(2)]
threads = st.sampled_from([0, 0, 0, 1, 2])


def on(thread: int, work: Callable[[], Any]) -> Any:
    """What `work` returns, done in a thread; nobody else does anything meanwhile."""
    return THREADS[thread - 1].submit(work).result() if thread else work()


def inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_called(name: str) -> nn.Module:
    torch.manual_seed(0)
    own = {"Mixer": Mixer, "Through": Through}
    return own[name]() if name in own else make(name)


def one_of(data: Any, options: list[Any], label: str) -> Any:
    """One of the options, drawn by Hypothesis or by a generator of random numbers."""
    return data.choice(options) if isinstance(data, random.Random) else data.draw(st.sampled_from(options), label)


def some_of(data: Any, options: list[str], most: int) -> list[str]:
    """At least one of the options, each at most once."""
    if isinstance(data, random.Random):
        return data.sample(options, data.randint(1, min(most, len(options))))
    return data.draw(st.lists(st.sampled_from(options), min_size=1, max_size=most, unique=True), "paths")


# --- the verbs --------------------------------------------------------------------------------------------------------

VECTOR = torch.tensor(0.5)


def explode(value: Any) -> Any:
    raise Boom


def filled(value: Any, number: float) -> Any:
    return torch.full_like(value, number) if isinstance(value, Tensor) else number


def half(value: Tensor) -> Tensor:
    return value * 0.5


def is_traced(path: str) -> bool:
    """Whether `torch.compile` knows the port of a path."""
    return "grad" not in path and "()" not in path


VERBS: dict[str, tuple[Callable[..., Intervention], Callable[[Any], Any] | None]] = {
    "ablate": (lambda model, paths, **o: ablate(model, *paths, **o), lambda v: filled(v, 0.0)),
    "patch": (lambda model, paths, **o: patch(model, dict.fromkeys(paths, 0.5), **o), lambda v: filled(v, 0.5)),
    "patch with a tensor": (
        lambda model, paths, **o: patch(model, dict.fromkeys(paths, torch.tensor([0.25])), **o),
        lambda v: filled(v, 0.25),
    ),
    "edit": (lambda model, paths, **o: edit(model, paths, lambda v: v * 2 + 1, **o), lambda v: v * 2 + 1),
    "edit, None": (lambda model, paths, **o: edit(model, paths, lambda v: None, **o), None),
    "edit, itself": (lambda model, paths, **o: edit(model, paths, lambda v: v, **o), None),
    "raise": (lambda model, paths, **o: edit(model, paths, explode, **o), explode),
    "steer": (lambda model, paths, **o: steer(model, paths, VECTOR, 2.0, **o), lambda v: v + 2.0 * VECTOR),
    "splice": (lambda model, paths, **o: splice(model, paths, half, **o), half),
    "splice with its error": (
        lambda model, paths, **o: splice(model, paths, half, error=True, **o),
        lambda v: half(v) + (v - half(v)).detach(),
    ),
}
TENSORS_ALONE = ("steer", "splice", "splice with its error", "patch with a tensor")


@dataclass(eq=False)
class Entry:
    """A context of the library, and what it is in the reference."""

    context: Intervention
    fresh: Callable[[], Active]
    active: Active
    acts: Any = None


@dataclass
class Outcome:
    """What came out of the library, or out of the reference."""

    value: Any = None
    raised: str = ""


def outcome(work: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(work())
    except (Boom, NiceHooksError, NiceHooksWarning) as error:
        return Outcome(raised=type(error).__name__)


def close(a: Any, b: Any, exact: bool) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y, exact) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is None is b or a == b
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and (torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5, rtol=1e-4))


class Machine(RuleBasedStateMachine):
    """Enters and leaves; a subclass runs. What the library does is compared after every step, and after the last."""

    supports_everything = True
    collects = True
    entries = Bundle("entries")
    idle = Bundle("idle")

    @initialize(name=st.sampled_from(sorted(FORWARDS)), data=st.data())
    def begin(self, name: str, data: Any) -> None:
        """A model, and a few of its paths, so that interventions meet."""
        known = [path for path in sorted(PLACES[name]) if self.supports_everything or is_traced(path)]
        self.paths = some_of(data, known, 5)
        self.name, self.forward = name, FORWARDS[name]
        self.model, self.twin = self.models(name)
        self.prepare()
        self.before = state(self.model)
        self.saved = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.clean = self.model(inputs(0, 5, 4))
        self.entered: list[Entry] = []
        self.tensors: list[weakref.ref[Tensor]] = []
        self.exact = True

    # entering and leaving

    def start(self, entry: Entry, thread: int, attached: bool) -> Entry:
        context = entry.context
        if attached:
            on(thread, context.attach)
            entry.acts = context.cache if isinstance(context, capture) else None
        else:
            entry.acts = on(thread, context.__enter__)
        entry.active = entry.fresh()
        entry.active.owner = None if attached else thread
        self.entered.append(entry)
        return entry

    @rule(target=entries, data=st.data(), thread=threads, attached=st.booleans(), verb=st.sampled_from(sorted(VERBS)))
    def enter(self, data: Any, thread: int, attached: bool, verb: str) -> Entry:
        paths, groups = self.draw_paths(data)
        if verb == "raise" and not self.supports_everything:
            verb = "edit"
        if verb in TENSORS_ALONE and "gate@input['scale']" in paths:
            verb = "edit"
        build, change = VERBS[verb]
        steps = one_of(data, [None, None, None, 0, 1], "steps")
        context = build(self.model, paths, steps=steps)
        return self.start(Entry(context, lambda: Active(groups, change, steps=steps), Active(groups)), thread, attached)

    @rule(target=entries, data=st.data(), thread=threads, attached=st.booleans(), stop=st.integers(0, 4))
    def enter_capture(self, data: Any, thread: int, attached: bool, stop: int) -> Entry:
        paths, groups = self.draw_paths(data)
        gradient = any(place.gradient for places, _ in groups for place in places)
        keep = one_of(data, ["first", "last"] if gradient else ["first", "last", "all"], "keep")
        stops = stop == 0 and self.supports_everything
        context = capture(self.model, *paths, keep=keep, stop=stops)
        return self.start(
            Entry(context, lambda: Active(groups, keep=keep, stop=stops), Active(groups)), thread, attached
        )

    @rule(target=entries, thread=threads)
    def enter_suspend(self, thread: int) -> Entry:
        return self.start(
            Entry(suspend(self.model), lambda: Active([], suspends=True), Active([])), thread, attached=False
        )

    @rule(target=entries, entry=consumes(idle), thread=threads, attached=st.booleans())
    def enter_again(self, entry: Entry, thread: int, attached: bool) -> Entry:
        """The same object, or where it is a suspension, which is never attached here, in the same way."""
        return self.start(entry, thread, attached and not isinstance(entry.context, suspend))

    def draw_paths(self, data: Any) -> tuple[list[str], list[tuple[list[Any], bool]]]:
        paths = some_of(data, self.paths, 3)
        return paths, [PLACES[self.name][path] for path in paths]

    @rule(entry=entries, thread=threads)
    def enter_what_is_active(self, entry: Entry, thread: int) -> None:
        if not entry.context.active:
            return
        with pytest.raises(ContextMisuse):
            on(thread, entry.context.__enter__)
        if entry.active.owner is None:
            on(thread, entry.context.attach)

    @rule(target=idle, entry=consumes(entries), thread=threads, how=st.sampled_from(["exit", "raise", "remove"]))
    def leave(self, entry: Entry, thread: int, how: str) -> Entry:
        """In any order, from any thread."""
        active = entry.active
        if not self.supports_everything:
            thread = active.owner or 0
        expected: list[str] = []
        if how == "remove" or active.owner is None:
            how, expected = "remove", active.outcome_of_removing()
        elif how == "exit":
            expected = active.outcome_of_leaving()
        active.ended = True
        self.entered.remove(entry)
        said = self.said(entry, thread, how)
        assert said == expected, f"{said} said, {expected} expected"
        assert not entry.context.active
        on(thread, entry.context.remove)  # once ended, does nothing
        self.compare_cache(entry)
        self.forget(entry)
        return entry

    def said(self, entry: Entry, thread: int, how: str) -> list[str]:
        """The names of the warnings and errors on leaving."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            raised: list[str] = []
            try:
                if how == "remove":
                    on(thread, entry.context.remove)
                else:
                    kind = (Boom, Boom(), None) if how == "raise" else (None, None, None)
                    on(thread, lambda: entry.context.__exit__(*kind))
            except Exception as error:
                raised.append(type(error).__name__)
        return [warning.category.__name__ for warning in told] + raised

    def forget(self, entry: Entry) -> None:
        """Keeps weak references alone to what was captured, to see later whether it is gone."""
        if isinstance(entry.context, capture):
            own = {id(parameter) for parameter in self.model.parameters()}
            for value in entry.acts.values():
                self.tensors += [
                    weakref.ref(t) for t in trees.leaves(value) if isinstance(t, Tensor) and id(t) not in own
                ]
            if entry.active.owner is None:
                entry.acts.clear()  # a handle can still be asked for its cache
        entry.acts, entry.active = None, Active([])

    # running

    def weights(self, detached: bool = False) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {**dict(self.twin.named_parameters())}
        return {name: weight.detach() for name, weight in found.items()} if detached else found

    def active(self) -> list[Active]:
        return [entry.active for entry in self.entered]

    def reference(self, thread: int, x: Tensor, *more: Active, at_level: bool = False) -> Any:
        run = Run([*self.active(), *more], thread, self.weights(detached=at_level), at_level)
        return run(self.forward, x)

    # comparing

    def compare(self, found: Outcome, expected: Outcome) -> None:
        assert found.raised == expected.raised
        assert found.raised or close(found.value, expected.value, self.exact)
        self.compare_caches()

    def compare_caches(self) -> None:
        for entry in self.entered:
            self.compare_cache(entry)

    def compare_cache(self, entry: Entry) -> None:
        if isinstance(entry.context, capture):
            expected = entry.active.cache
            assert list(entry.acts) == list(expected)
            for key in expected:
                assert close(entry.acts[key], expected[key], self.exact), key

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for entry in list(self.entered):
            self.leave(entry, entry.active.owner or 0, "raise")
        assert not describe(self.model)
        assert state(self.model) == self.before
        assert all(torch.equal(value, self.saved[key]) for key, value in self.model.state_dict().items())
        for thread in range(len(THREADS) + 1):
            assert torch.equal(on(thread, lambda: self.model(inputs(0, 5, 4))), self.clean)
        self.close()
        if self.collects:
            gc.collect()
            assert [tensor() for tensor in self.tensors if tensor() is not None] == []

    def models(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The model that is tried, and the one whose weights the reference takes."""
        return model_called(name), model_called(name)

    def prepare(self) -> None:
        """What a subclass does before anything is entered."""

    def close(self) -> None:
        """Lets go of what a subclass still holds."""
