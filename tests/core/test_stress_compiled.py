"""Law 9 at length: random stacks of interventions around a compiled model, against the one in `reference.py`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import Machine, inputs, on, outcome, threads


class CompiledStress(Machine):
    """Runs a compiled model, beside the same model in eager mode."""

    supports_everything = False

    def prepare(self) -> None:
        """Dynamo leaves marks of its own on a model, once; the machine compiles anew, at any moment.

        Parameters are frozen: Dynamo warns where a list that it goes on with (`keep="all"`) holds tensors with a graph.
        """
        self.model.requires_grad_(False)
        self.twin.requires_grad_(False)
        torch.compile(self.model, fullgraph=True, backend="eager")(inputs(0, 5, 4))
        torch._dynamo.reset()
        self.compiled: Any = None

    @rule(thread=threads, seed=st.integers(0, 3))
    def run_compiled(self, thread: int, seed: int) -> None:
        x = inputs(seed, 5, 4)
        if self.compiled is None:
            self.compiled = torch.compile(self.model, fullgraph=True, backend="eager")
        self.exact = False
        found = on(thread, lambda: outcome(lambda: self.compiled(x)))
        self.compare(found, outcome(lambda: self.reference(thread, x)))

    @rule(thread=threads, seed=st.integers(0, 3))
    def run(self, thread: int, seed: int) -> None:
        x = inputs(seed, 5, 4)
        found = on(thread, lambda: outcome(lambda: self.model(x)))
        self.compare(found, outcome(lambda: self.reference(thread, x)))

    def close(self) -> None:
        self.compiled = None
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def room_for_every_stack():
    """Each stack is a graph of its own."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


LONG = int(os.environ.get("NICEHOOKS_STRESS", "1"))
"""As in `test_stress.py`."""

TestCompiledStress = pytest.mark.slow(CompiledStress.TestCase)
TestCompiledStress.settings = settings(
    max_examples=8 * LONG,
    stateful_step_count=10,
    derandomize=LONG == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
