"""Random programs of `fuzz.py`: a few in the quick tier, ten thousand in the slow one, interrupted ones apart."""

from __future__ import annotations

import gc
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fuzz
import pytest
from torch import nn
from worlds import state

from nicehooks import ablate, capture, captured, describe, grad_at, patch
from nicehooks.errors import NotReachedWarning

FUZZ = Path(fuzz.__file__)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_some_programs(kind: str) -> None:
    fuzz.run_programs(60, seed=1, kind=kind)


@pytest.mark.slow
def test_ten_thousand_programs() -> None:
    """Other ones each time; an error says the seed and the number of its program, and so does this."""
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    fuzz.run_programs(10_000, seed)


def in_a_process_of_its_own(*words: str) -> str:
    done = subprocess.run([sys.executable, FUZZ, *words], capture_output=True, text=True, cwd=FUZZ.parent.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_interrupts_at_any_line() -> None:
    said = in_a_process_of_its_own("300", "--kind", "interrupts")
    assert re.fullmatch(r"seed \d+\nall agree\n", said)


def stacked(model: nn.Module) -> list[Any]:
    return [ablate(model, "1"), capture(model, "1"), patch(model, "1", 2.0)]


@pytest.mark.parametrize("with_its_own_forward", [False, True])
def test_an_interrupt_at_any_line_of_coming_and_going_leaves_nothing(with_its_own_forward: bool) -> None:
    for line in range(1, 1000):
        model = fuzz.chain()
        if with_its_own_forward:
            model[1].forward = partial(type(model[1]).forward, model[1])
        interrupt = fuzz.Interrupt(line, within="/core/binding.py")
        fuzz.interrupted_once(model, stacked, interrupt)
        if interrupt.left > 0:
            assert line > 100
            return
    pytest.fail("it never got to the end")


def calls_captured(model: nn.Module) -> None:
    captured(model, ["1", "2.0"])(fuzz.X)


def stacks_contexts(model: nn.Module) -> None:
    with ablate(model, "1"), patch(model, {"2.0": 1.0}):
        model(fuzz.X)


def asks_for_a_gradient(model: nn.Module) -> None:
    grad_at(model, "1", lambda out: out.sum())(fuzz.X)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # an interrupt in `__del__` goes no further
@pytest.mark.parametrize("job", [calls_captured, stacks_contexts, asks_for_a_gradient])
@pytest.mark.parametrize("within", ["/contexts/intervention.py", "/core/binding.py"])
def test_an_interrupt_where_nobody_has_a_handle_leaves_nothing(job: Callable[[nn.Module], None], within: str) -> None:
    for line in range(1, 1000):
        model = fuzz.chain()
        model(fuzz.X)
        before, tracer = state(model), sys.gettrace()
        interrupt = fuzz.Interrupt(line, within)
        sys.settrace(interrupt)
        try:
            job(model)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        if state(model) != before:
            gc.collect()
        assert state(model) == before and not describe(model)
        if interrupt.left > 0:
            assert line > 40
            return
    pytest.fail("it never got to the end")


def test_a_context_that_was_forgotten_is_over() -> None:
    model = fuzz.chain()
    before = state(model)
    with pytest.warns(NotReachedWarning) as caught:
        ablate(model, "1").__enter__()
    assert state(model) == before and not describe(model)
    assert str(caught[0].message) == (
        "ablate(model, '1', …) was entered, and is over, as nothing refers to it any more. Enter it with `with`, keep "
        "what you call __enter__ on, or .attach() it."
    )
    assert caught[0].filename == __file__


def test_who_traced_before_an_interrupt_traces_behind_it() -> None:
    def tracer(frame: Any, event: str, argument: Any) -> None: ...

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        fuzz.interrupted_once(fuzz.chain(), stacked, fuzz.Interrupt(5))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.slow
def test_compiled_models_with_layers_in_place() -> None:
    fuzz.run_programs(25, seed=secrets.randbelow(10**6), kind="compiled")


def test_what_disagrees_says_how_to_run_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "same_tree", lambda found, expected: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuzz.run_program(seed=5, number=3, kind="container")
    assert capsys.readouterr().err == "again: python tests/fuzz.py --seed 5 --only 3 --kind container\n"
