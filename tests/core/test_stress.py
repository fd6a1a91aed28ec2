"""All laws at once: random stacks of interventions, in any order and thread, against the one in `reference.py`."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gallery.calling import Boom, Trip
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from machine import Machine, close, inputs, on, outcome, threads
from reference import PLACES, Active, acting
from torch import Tensor

from nicehooks import captured, describe

LONG = int(os.environ.get("NICEHOOKS_STRESS", "1"))
"""How many times as many examples, of twice as many steps: `NICEHOOKS_STRESS=50 pytest tests/core/test_stress.py`."""


@dataclass
class Kept:
    """A forward whose backward may come later."""

    x: Tensor
    out: Tensor
    reference_x: Tensor
    reference_out: Tensor


class Stress(Machine):
    """Runs, differentiates, transforms and copies a model."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Kept] = []

    def close(self) -> None:
        self.kept.clear()

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

    @rule(thread=threads, seed=st.integers(0, 3))
    def run_forward_and_backward(self, thread: int, seed: int) -> None:
        before = len(self.kept)
        self.run_forward_alone(thread, seed)
        if len(self.kept) > before:
            self.run_backward(thread, before)

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
        raised: list[Boom] = []
        for number, x in enumerate(xs):
            for one, _, step_of in before:
                one.cache, one.step_of = {}, dict(step_of)
            try:
                rows.append(self.reference(thread, x, *inner[number : number + 1]))
            except Boom as error:  # in every row
                raised.append(error)
            caches.append([one.cache for one, _, _ in before])
        for index, (one, cache, _) in enumerate(before):
            one.cache = cache
            for key in caches[0][index]:
                stacked = _stacked([cache_of[index][key] for cache_of in caches])
                if one.keep == "all":
                    cache.setdefault(key, []).extend(stacked)
                elif one.keep == "last" or key not in cache:
                    cache[key] = stacked
        if raised:
            raise raised[0]
        return torch.stack([torch.zeros(()) if row is None else row for row in rows])

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


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_stacked(list(calls)) for calls in zip(*values, strict=True)]
    return torch.stack(values) if isinstance(values[0], Tensor) else values[0]


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Each example collects garbage: what was there before is left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


TestStress = Stress.TestCase
TestStress.settings = settings(
    max_examples=40 * LONG,
    stateful_step_count=25 if LONG == 1 else 60,
    derandomize=LONG == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
