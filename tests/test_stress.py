"""All laws at once: random stacks of interventions, in any order and thread, against the one in `reference.py`."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, precondition, rule
from reference import FORWARDS, PLACES, Active, Boom, Mixer, Run, Trip, acting
from torch import Tensor, nn
from worlds import make, state

from nicehooks import (
    ContextMisuse,
    NiceHooksError,
    NiceHooksWarning,
    ablate,
    capture,
    captured,
    describe,
    edit,
    patch,
    splice,
    steer,
    suspend,
    trees,
)
from nicehooks.contexts import Intervention

LONG = int(os.environ.get("NICEHOOKS_STRESS", "1"))
"""How many times as many examples, of twice as many steps: `NICEHOOKS_STRESS=50 pytest tests/test_stress.py`."""

THREADS = [ThreadPoolExecutor(1) for _ in range(2)]
threads = st.sampled_from([0, 0, 0, 1, 2])


def on(thread: int, work: Callable[[], Any]) -> Any:
    """What `work` returns, done in a thread; nobody else does anything meanwhile."""
    return THREADS[thread - 1].submit(work).result() if thread else work()


def inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_called(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Mixer() if name == "Mixer" else make(name)


# --- the verbs --------------------------------------------------------------------------------------------------------

VECTOR = torch.tensor(0.5)


def explode(value: Any) -> Any:
    raise Boom


def filled(value: Any, number: float) -> Any:
    return torch.full_like(value, number) if isinstance(value, Tensor) else number


def half(value: Tensor) -> Tensor:
    return value * 0.5


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
class Kept:
    """A forward whose backward may come later."""

    x: Tensor
    out: Tensor
    reference_x: Tensor
    reference_out: Tensor


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


class Stress(RuleBasedStateMachine):
    """Does the same to the library and to the reference, and compares after every step."""

    entries = Bundle("entries")
    idle = Bundle("idle")

    @initialize(name=st.sampled_from(sorted(FORWARDS)))
    def begin(self, name: str) -> None:
        self.name, self.forward = name, FORWARDS[name]
        self.model, self.twin = model_called(name), model_called(name)
        self.before = state(self.model)
        self.saved = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.clean = self.model(inputs(0, 5, 4))
        self.entered: list[Entry] = []
        self.kept: list[Kept] = []
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
        if verb in TENSORS_ALONE and "gate@input['scale']" in paths:
            verb = "edit"
        build, change = VERBS[verb]
        steps = data.draw(st.sampled_from([None, None, None, 0, 1]), "steps")
        context = build(self.model, paths, steps=steps)
        return self.start(Entry(context, lambda: Active(groups, change, steps=steps), Active(groups)), thread, attached)

    @rule(target=entries, data=st.data(), thread=threads, attached=st.booleans(), stop=st.integers(0, 4))
    def enter_capture(self, data: Any, thread: int, attached: bool, stop: int) -> Entry:
        paths, groups = self.draw_paths(data)
        gradient = any(place.gradient for places, _ in groups for place in places)
        keep = data.draw(st.sampled_from(["first", "last"] if gradient else ["first", "last", "all"]), "keep")
        stops = stop == 0
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
        known = PLACES[self.name]
        paths = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3, unique=True), "paths")
        return paths, [known[path] for path in paths]

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
        expected: list[str] = []
        if how == "remove" or active.owner is None:
            how, expected = "remove", active.outcome_of_removing()
        elif how == "exit":
            expected = active.outcome_of_leaving()
        active.ended = True
        self.entered.remove(entry)
        assert self.said(entry, thread, how) == expected
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
                    error = (Boom, Boom(), None) if how == "raise" else (None, None, None)
                    on(thread, lambda: entry.context.__exit__(*error))
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
        found = dict(self.twin.named_parameters())
        return {name: weight.detach() for name, weight in found.items()} if detached else found

    def active(self) -> list[Active]:
        return [entry.active for entry in self.entered]

    def reference(self, thread: int, x: Tensor, *more: Active, at_level: bool = False) -> Any:
        run = Run([*self.active(), *more], thread, self.weights(detached=at_level), at_level)
        return run(self.forward, x)

    @rule(thread=threads, seed=st.integers(0, 3), mode=st.sampled_from(["", "", "no_grad", "inference_mode"]))
    def run(self, thread: int, seed: int, mode: str) -> None:
        x = inputs(seed, 5, 4)
        guard = {"": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]

        def guarded(model: Callable[[], Any]) -> Any:
            with guard():
                return model()

        found = on(thread, lambda: outcome(lambda: guarded(lambda: self.model(x))))
        expected = outcome(lambda: guarded(lambda: self.reference(thread, x)))
        self.compare(found, expected)

    @precondition(lambda self: self.name == "Mixer")
    @rule(thread=threads)
    def run_that_raises(self, thread: int) -> None:
        Trip.armed = True
        try:
            self.run(thread, 0, "")
        finally:
            Trip.armed = False

    @rule(thread=threads)
    def run_on_what_does_not_fit(self, thread: int) -> None:
        """The error is the model's own; contexts see what came before it."""
        found: list[str] = []
        for work in (
            lambda: on(thread, lambda: self.model(inputs(0, 5, 3))),
            lambda: self.reference(thread, inputs(0, 5, 3)),
        ):
            try:
                work()
                found.append("")
            except Boom:
                found.append("Boom")
            except RuntimeError:
                found.append("RuntimeError")
        assert found[0] == found[1]
        self.compare_caches()

    @rule(thread=threads, seed=st.integers(0, 3))
    def run_forward_alone(self, thread: int, seed: int) -> None:
        """Backward may come later, or never."""
        x, y = (inputs(seed, 5, 4).requires_grad_() for _ in range(2))
        found = on(thread, lambda: outcome(lambda: self.model(x)))
        expected = outcome(lambda: self.reference(thread, y))
        self.compare(found, expected)
        if found.value is not None:
            self.kept.append(Kept(x, found.value, y, expected.value))

    @precondition(lambda self: self.kept)
    @rule(thread=threads, which=st.integers(0, 9))
    def run_backward(self, thread: int, which: int) -> None:
        kept = self.kept.pop(which % len(self.kept))
        if not kept.out.requires_grad:
            assert not kept.reference_out.requires_grad
            return
        found = on(thread, lambda: outcome(lambda: kept.out.sin().sum().backward()))
        expected = outcome(lambda: kept.reference_out.sin().sum().backward())
        assert found.raised == expected.raised
        if not found.raised:
            self.compare_gradients(kept)
        for parameter in (*self.model.parameters(), *self.twin.parameters()):
            parameter.grad = None
        self.exact = False  # gradients are summed up in another order
        self.compare_caches()

    def compare_gradients(self, kept: Kept) -> None:
        mine, theirs = dict(self.model.named_parameters()), dict(self.twin.named_parameters())
        pairs = [(kept.x, kept.reference_x), *((mine[name], theirs[name]) for name in mine)]
        assert all(close(a.grad, b.grad, exact=False) for a, b in pairs)

    @rule(thread=threads, seed=st.integers(0, 3), inside=st.booleans(), data=st.data())
    def run_vmap(self, thread: int, seed: int, inside: bool, data: Any) -> None:
        """Contexts outside see the whole batch; one inside has what it has seen as an output."""
        xs = inputs(seed, 2, 5, 4)
        path = data.draw(st.sampled_from([p for p in sorted(PLACES[self.name]) if "grad" not in p]), "path")
        places = [PLACES[self.name][path]] if inside and "scale" not in path else []
        model = captured(self.model, path) if places else lambda x: (self.model(x), {})

        def function(x: Tensor) -> Any:  # vmap wants tensors, also of a forward that was stopped
            out, acts = model(x)
            return (x.new_zeros(()) if out is None else out), dict(acts)

        found = on(thread, lambda: outcome(lambda: torch.vmap(function)(xs)))
        inner = [Active(places, keep="last", owner=thread) for _ in xs]
        expected = outcome(lambda: self.mapped(thread, xs, inner if places else []))
        self.exact = False
        if places and not expected.raised:  # one outside may have stopped the forward before it
            expected.raised = "".join(inner[0].outcome_of_leaving())
        if not found.raised:
            found.value, acts = found.value
            assert list(acts) == list(inner[0].cache)
            assert all(close(acts[key], torch.stack([one.cache[key] for one in inner]), False) for key in acts)
        self.compare(found, expected)

    def mapped(self, thread: int, xs: Tensor, inner: list[Active]) -> Any:
        """The reference for each example; what was captured of them, stacked."""
        before = [(one, one.cache, dict(one.step_of)) for one in self.active()]
        rows: list[Any] = []
        caches: list[list[dict[str, Any]]] = []
        try:
            for number, x in enumerate(xs):
                for one, _, step_of in before:
                    one.cache, one.step_of = {}, dict(step_of)
                try:
                    rows.append(self.reference(thread, x, *inner[number : number + 1]))
                finally:
                    caches.append([one.cache for one, _, _ in before])
        finally:
            for index, (one, cache, _) in enumerate(before):
                one.cache = cache
                for key in caches[0][index]:
                    stacked = _stacked([cache_of[index][key] for cache_of in caches])
                    if one.keep == "all":
                        cache.setdefault(key, []).extend(stacked)
                    elif one.keep == "last" or key not in cache:
                        cache[key] = stacked
        return torch.stack([x.new_zeros(()) if row is None else row for row in rows])

    @rule(thread=threads, seed=st.integers(0, 3))
    def run_grad(self, thread: int, seed: int) -> None:
        x = inputs(seed, 5, 4)
        y = x.clone().requires_grad_()

        def gradient() -> Any:
            out = self.reference(thread, y, at_level=True)
            if out is None or not out.requires_grad:
                return torch.zeros_like(y)
            (found,) = torch.autograd.grad(out.sin().sum(), y, allow_unused=True)
            return torch.zeros_like(y) if found is None else found

        def metric(x: Tensor) -> Tensor:
            out = self.model(x)
            return x.new_zeros(()) if out is None else out.sin().sum()

        found = on(thread, lambda: outcome(lambda: torch.func.grad(metric)(x)))
        expected = outcome(gradient)
        self.exact = False
        self.compare(found, expected)

    # copies, and looking on

    @rule(thread=threads, pickled=st.booleans())
    def copy(self, thread: int, pickled: bool) -> None:
        """A copy is clean, and belongs to nobody."""
        twin = on(thread, lambda: pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model))
        assert not describe(twin)
        assert torch.equal(on(thread, lambda: twin(inputs(0, 5, 4))), self.clean)
        assert [list(vars(module)) for module in twin.modules()] == [list(vars(m)) for m in self.twin.modules()]

    @rule(thread=threads)
    def look(self, thread: int) -> None:
        """`describe` knows who acts where."""
        here = acting(self.active(), thread)
        expected = Counter((place.key, one in here) for one in self.active() for place in one.places)
        found = Counter((record.path, record.acting) for record in on(thread, lambda: describe(self.model)))
        assert set(found) == set(expected)

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
        self.kept.clear()
        gc.collect()
        assert [tensor() for tensor in self.tensors if tensor() is not None] == []


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_stacked(list(calls)) for calls in zip(*values, strict=True)]
    return torch.stack(values) if isinstance(values[0], Tensor) else values[0]


TestStress = Stress.TestCase
TestStress.settings = settings(
    max_examples=100 * LONG,
    stateful_step_count=30 if LONG == 1 else 60,
    derandomize=LONG == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
