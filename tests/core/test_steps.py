"""Steps where the root model does not run, counted anew, and by every sort of filter."""

from __future__ import annotations

import pytest
import torch
from gallery.steps import Both, Deep, EncoderDecoder, Twice, Wrapper
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nicehooks import SiteNotReached, UnsupportedModule, ablate, capture, edit, steer
from nicehooks.core.when import When

X = torch.zeros(1)


def plus(value):
    return value + 1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(0, [2, 0, 0]), ([1, 2], [0, 2, 2]), (slice(1, None), [0, 2, 2]), (lambda n: n == 1, [0, 2, 0])],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_under_a_wrapper_a_step_is_a_call_of_the_outermost_module_that_runs(steps, expected, depth):
    model = Wrapper(Twice())
    name = "inner.layer"
    if depth == 2:
        model = Wrapper(model.inner)
        model.generate = Wrapper(model.inner).generate
    with edit(model, name, plus, steps=steps):
        assert [out.item() for out in model.generate(X)] == expected


def test_under_a_wrapper_calls_are_counted_within_a_step():
    model = Wrapper(Twice())
    with edit(model, "inner.layer", plus, calls=1), capture(model, "inner.layer#0", keep="all") as acts:
        assert [out.item() for out in model.generate(X)] == [1, 1, 1]
    assert [value.item() for value in acts["inner.layer#0"]] == [0, 0, 0]


@pytest.mark.parametrize("make", [EncoderDecoder, Deep])
def test_an_encoder_that_runs_before_the_model_belongs_to_the_first_step(make):
    model, name = make(), "" if make is EncoderDecoder else "base."
    for steps, expected in ((0, [2, 1, 1]), ([0, 2], [2, 1, 2])):
        with edit(model, [f"{name}encoder", f"{name}decoder"], plus, steps=steps):
            assert [out.item() for out in model.generate(X)] == expected
    with pytest.raises(SiteNotReached, match="the model ran, but not once with steps=1"):
        with edit(model, [f"{name}encoder", f"{name}decoder"], plus, steps=1):
            assert [out.item() for out in model.generate(X)] == [0, 1, 0]


def test_the_root_counts_as_soon_as_it_runs():
    model = Twice()
    with ablate(model, "layer", value=5.0, steps=1):
        assert [model.layer(X).item(), model(X).item(), model(X).item(), model.layer(X).item()] == [0, 0, 10, 5]


@pytest.mark.parametrize("steps", [0, [1, 2], slice(1, None)])
def test_calls_under_a_wrapper_whose_forward_has_run_are_no_silent_steps_of_it(steps):
    """Each of them would belong to the step of the forward: steps=0 would act at all of them."""
    model = Both(Twice())
    with pytest.raises(UnsupportedModule, match=r"'inner' in it is called again(.*\n)*.*context\.restart\(\)"):
        with edit(model, "inner.layer", plus, steps=steps):
            model(X)
            model.generate(X)
    with edit(model, "inner.layer", plus, steps=0) as context:
        assert model(X).item() == 2
        context.restart()
        assert [out.item() for out in model.generate(X)] == [2, 0, 0]
        context.restart()
        assert [model(X).item(), model.inner(X).item(), model(X).item(), model.inner(X).item()] == [2, 2, 0, 0]


def test_what_the_model_does_not_call_itself_belongs_to_the_step_before_it():
    model = Both(Twice())
    model.head = nn.Identity()
    with edit(model, "head", plus, steps=1), capture(model, "head#0", keep="all") as acts:
        found = [model.head(model(X)).item() for _ in range(3)] + [model.head(X).item() for _ in range(2)]
    assert found == [0, 1, 0, 0, 0] and len(acts.calls("head#0")) == 3


@pytest.mark.parametrize(("path", "options"), [("inner.layer", {"steps": 1}), ("inner.layer#0", {})])
def test_a_capture_that_stops_the_model_stops_nothing_where_the_model_does_not_run(path, options):
    """There nobody would catch what ends the forward."""
    model = Both(Twice())
    with capture(model, path, stop=True, **options) as acts:
        assert [out.item() for out in model.generate(X)] == [0, 0, 0]
    assert list(acts) == [path]
    with capture(model, path, stop=True) as acts:
        assert model(X) is None and model.inner(X).item() == 0


def test_two_parts_side_by_side_are_no_steps():
    model = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity()})
    with pytest.raises(UnsupportedModule, match=r"'first' and 'second'.*\n.*\n.*get_submodule\(\"second\"\)"):
        with edit(model, ["first", "second"], plus, steps=0):
            model.first(X)
            model.second(X)
    with capture(model, "first#0", "second#0") as acts:  # calls are those within each
        for _ in range(2):
            model.first(X)
            model.second(X)
    assert list(acts) == ["first#0", "second#0"]


def test_steps_are_counted_anew():
    model = Wrapper(Twice())
    with edit(model, "inner.layer", plus, steps=0) as context:
        first = model.generate(X)
        second = model.generate(X)
        context.restart()
        third = model.generate(X)
    assert [[out.item() for out in outs] for outs in (first, second, third)] == [[2, 0, 0], [0, 0, 0], [2, 0, 0]]
    context.restart()  # it is over: nothing to count
    handle = edit(model, "inner.layer", plus, steps=1).attach()
    assert [out.item() for out in model.generate(X)] == [0, 2, 0]
    handle.restart()
    assert [out.item() for out in model.generate(X)] == [0, 2, 0]
    handle.remove()


def test_a_capture_takes_steps_and_calls():
    model = Twice()
    looks = capture(model, "layer", "", steps=[0, 2], calls=0, keep="all")
    with looks as acts:
        for number in range(4):
            model(torch.tensor([float(number)]))
    assert [value.item() for value in acts["layer"]] == [0, 2] and [value.item() for value in acts[""]] == [0, 4]
    with capture(model, "layer", steps=2, stop=True) as stopped:
        outs = [model(X) for _ in range(4)]
    assert [out is None for out in outs] == [False, False, True, False] and list(stopped) == ["layer"]


NUMBERS = st.one_of(
    st.none(),
    st.integers(-2, 6),
    st.lists(st.integers(0, 7), max_size=3),
    st.builds(
        slice, st.one_of(st.none(), st.integers(0, 5)), st.one_of(st.none(), st.integers(0, 9)), st.integers(1, 3)
    ),
    st.sampled_from([range(3), {1, 4}, lambda number: number % 3 == 1]),
)


def admits(wanted, number):
    if wanted is None:
        return True
    if isinstance(wanted, slice):
        return number in range(*wanted.indices(1000))
    return wanted(number) if callable(wanted) else number == wanted if isinstance(wanted, int) else number in wanted


@given(NUMBERS, NUMBERS, st.one_of(st.none(), st.integers(0, 5), st.just("*")))
def test_a_chain_of_counts_says_what_the_filter_says(steps, calls, call):
    when = When(steps, calls, call)
    count = None if when.first_call is None else when.first_call
    for number in range(40 if count is not None else 0):
        assert count.admits() == (admits(calls, number) and (call in (None, "*") or number == call))
        assert (count.number == 0) == (number == 0) and (call != "*" or count.number == number)
        count = count.after()
    step = when.no_step
    if step is not None:
        assert step.admits() == step.after().admits() == admits(steps, 0)
    for number in range(40 if step is not None else 0):
        step = step.after()
        assert step.admits() == admits(steps, number) and (step.number == 0) == (number == 0)


def test_a_filter_of_large_numbers_is_counted_too():
    when = When(slice(20_000, None), None, None)
    step = when.no_step
    for _ in range(20_001):
        assert not step.admits()
        step = step.after()
    assert step.admits()


def test_a_mapping_steers_edits_and_splices():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with steer(model, {"0": torch.tensor([1.0]), "1": torch.tensor([10.0])}, scale=2.0) as context:
        assert model(X).item() == 22 and repr(context) == "steer(model, '0', '1', …)"
    with edit(model, {"0": plus, "1": lambda value: value * 3}):
        assert model(X).item() == 3
    with pytest.raises(TypeError, match="a mapping of both"):
        steer(model, {"0": X}, X)
    with pytest.raises(TypeError, match="a tensor as vector, not int"):
        steer(model, {"0": X, "1": 3})
