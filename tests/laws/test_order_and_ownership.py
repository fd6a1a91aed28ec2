"""Laws 3 and 4. Interventions act in the order in which they were entered, and only where they were entered."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch
from gallery.overwriting import Overwriting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from worlds import inputs, make, same, state

from nicehooks import KEEP, ContextMisuse, NotCalledWarning, capture, describe, edit, patch, select, steer, suspend
from nicehooks.errors import NotReachedWarning

# --- order ------------------------------------------------------------------------------------------------------------

EDITS = [lambda v: v + 1, lambda v: v * 3, lambda v: v - 2, lambda v: v * v]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=5), st.sampled_from(["head", "head[:, 0]", "head@input[0]", "head@bias"]))
def test_each_sees_what_the_earlier_ones_did(chosen, path):
    model = make("Mlp")
    with capture(model, path) as acts:
        model(inputs())
    value = acts[path]
    seen = []
    stack = []
    for number in chosen:
        before = capture(model, path, clone=True)
        seen.append((before, before.__enter__(), value))
        value = EDITS[number](value)
        stack.append(edit(model, path, EDITS[number]))
        stack[-1].__enter__()
    with capture(model, path) as last:
        model(inputs())
    assert torch.equal(last[path], value)
    for context, acts, expected in seen:
        assert torch.equal(acts[path], expected)
        context.__exit__(None, None, None)
    for context in reversed(stack):
        context.__exit__(None, None, None)


def test_order_is_that_of_entering_not_of_making():
    model = make("Mlp")
    second, first = patch(model, "head", 2.0), patch(model, "head", 1.0)
    with first, second:
        assert (model(inputs()) == 2).all()
    with second, first:
        assert (model(inputs()) == 1).all()


def test_leaving_in_another_order_leaves_the_order_of_the_rest():
    model = make("Mlp")
    handles = [edit(model, "head", fn) for fn in EDITS[:3]]
    for handle in handles:
        handle.attach()
    handles[0].remove()
    clean = model_without(model)
    assert same(model(inputs()), clean * 3 - 2)
    handles[0].attach()
    assert same(model(inputs()), (clean * 3 - 2) + 1)
    for handle in handles:
        handle.remove()


def model_without(model):
    with suspend(model):
        return model(inputs())


# --- ownership --------------------------------------------------------------------------------------------------------


def constant(model, value):
    """What the model returns when its embedding is `value` everywhere."""
    with patch(model, "embed", value):
        return model(inputs())


def test_two_threads_never_see_each_other():
    model = make("Mlp")
    before = state(model)
    expected = {value: constant(model, value) for value in (1.0, 2.0)}
    barrier = threading.Barrier(2)
    wrong = []

    def work(value):
        barrier.wait()
        for _ in range(1000):
            with patch(model, "embed", value), capture(model, "embed") as acts:
                out = model(inputs())
            if not (torch.equal(out, expected[value]) and (acts["embed"] == value).all()):
                wrong.append(value)

    run_threads(work, 1.0, 2.0)
    assert not wrong
    assert state(model) == before


def test_two_threads_never_see_each_others_parameters():
    model = make("Mlp")
    before = state(model)
    barrier = threading.Barrier(3)
    wrong = []

    def weights(value):
        if value is None:
            return model(inputs())
        with patch(model, {"embed@weight": value, "head@bias": value}):
            return model(inputs())

    expected = {value: weights(value) for value in (None, 1.0, 2.0)}

    def work(value):
        barrier.wait()
        wrong.extend(value for _ in range(300) if not torch.equal(weights(value), expected[value]))

    run_threads(work, None, 1.0, 2.0)
    assert not wrong
    assert state(model) == before


def run_threads(work, *values):
    errors = []

    def guarded(value):
        try:
            work(value)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_two_tasks_that_interleave_never_see_each_other():
    model = make("Mlp")
    before = state(model)
    expected = {value: constant(model, value) for value in (1.0, 2.0)}

    async def work(value):
        for _ in range(1000):
            with patch(model, "embed", value), capture(model, "embed") as acts:
                await asyncio.sleep(0)
                out = model(inputs())
                await asyncio.sleep(0)
            assert torch.equal(out, expected[value])
            assert (acts["embed"] == value).all()

    async def both():
        await asyncio.gather(work(1.0), work(2.0))

    asyncio.run(both())
    assert state(model) == before


def test_a_thread_without_interventions_sees_none():
    model = make("Mlp")
    clean = model(inputs())
    seen = []
    with patch(model, "head", 0.0):
        run_threads(lambda _: seen.append(model(inputs())), None)
        assert not model(inputs()).any()
    assert same(seen[0], clean)


def test_a_copy_of_the_context_carries_it_along():
    model = make("Mlp")

    async def main():
        with patch(model, "head", 0.0):
            return await asyncio.to_thread(model, inputs())

    assert not asyncio.run(main()).any()
    seen = []
    with patch(model, "head", 0.0):
        context = contextvars.copy_context()
        run_threads(lambda _: seen.append(context.run(model, inputs())), None)
    assert not seen[0].any()
    assert context.run(model, inputs()).any()  # it has ended, also for those who kept a copy


def test_an_attached_one_acts_everywhere():
    model = make("Mlp")
    handle = patch(model, "head", 0.0).attach()
    seen = []
    run_threads(lambda _: seen.append(model(inputs())), None)
    handle.remove()
    assert not seen[0].any()
    assert model(inputs()).any()


def test_suspend_silences_attached_ones_here_alone():
    model = make("Mlp")
    handle = patch(model, "head", 0.0).attach()
    seen = []
    with suspend(model):
        assert model(inputs()).any()
        run_threads(lambda _: seen.append(model(inputs())), None)
    assert not seen[0].any()
    handle.remove()


def test_a_generator_may_be_left_from_another_context():
    """As pytest fixtures and `contextlib` generators are."""
    model = make("Mlp")
    before = state(model)

    def fixture():
        with patch(model, "head", 0.0):
            model(inputs())
            yield

    generator = fixture()
    contextvars.copy_context().run(next, generator)
    assert model(inputs()).any()
    next(generator, None)
    assert state(model) == before
    assert model(inputs()).any()


def test_steps_are_counted_by_each_thread():
    model = make("Mlp")
    handle = edit(model, "embed", lambda value: value * 0, steps=1).attach()
    clean = model(inputs())
    counts = []

    def work(_):
        counts.append([same(model(inputs()), clean) for _ in range(3)])

    run_threads(work, 1, 2)
    handle.remove()
    assert counts == [[True, False, True]] * 2


def test_a_context_used_in_another_thread_only_says_so():
    model = make("Mlp")
    with pytest.warns(NotCalledWarning, match="another thread"), capture(model, "head"):
        run_threads(lambda _: model(inputs()), None)


def test_describe_says_who_is_active_where():
    model = make("Mlp")
    with steer(model, "embed", torch.ones(6)):
        model(inputs())
        seen = []
        run_threads(lambda _: seen.extend(describe(model)), None)
        (record,) = describe(model)
        assert record == ("embed", "steer(model, 'embed', …)", "with", True)
        assert [r.acting for r in seen] == [False]
    assert str(describe(model)) == "nothing is active"


def test_sites_of_another_model_are_found_by_name():
    model, twin = make("Mlp"), make("Mlp")
    with capture(twin, *select(model, "blocks.*")) as acts:
        twin(inputs())
    assert list(acts) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_context_around_a_submodule_counts_its_own_steps():
    outer = nn.Sequential(make("Mlp"), nn.Identity())
    with (
        edit(outer[0], "embed", lambda value: value * 0, steps=0),
        edit(outer, "0.head", lambda value: value + 1, steps=1),
    ):
        first, second = outer(inputs()), outer(inputs())
    assert not same(first, second)


def test_handles_left_attached_say_what_was_missed():
    model = make("Mlp")
    handle = edit(model, "embed#1", lambda value: value).attach()
    model(inputs())
    with pytest.warns(NotReachedWarning, match="call=1"):
        handle.remove()


def test_a_suspension_that_was_entered_twice_can_be_left():
    model = make("Mlp")
    context = suspend(model)
    with patch(model, "head", 0.0):
        with context:
            with pytest.raises(ContextMisuse):
                context.__enter__()
            assert model(inputs()).any()
        assert not context.active
        assert not model(inputs()).any()


def test_what_is_patched_stays_the_caller_s_own_whatever_the_model_writes_into_it():
    model, x = Overwriting(), torch.randn(2, 4)
    with capture(model, "second", clone=True) as acts:
        model(x)
    given = {"pair": (torch.ones(2, 4), torch.ones(2, 4)), "second": torch.ones(2, 4)}
    with patch(model, given):
        assert torch.equal(model(x), torch.full((2, 4), 3.0))  # 1 + 2 * 1
    assert all(value.eq(1).all() for value in (*given["pair"], given["second"]))
    with patch(model, "pair", (KEEP, torch.ones(2, 4))):
        assert torch.equal(model(x), (acts["second"] + 1).sin() + 2)


def test_a_context_that_is_entered_again_while_another_one_of_its_kind_is_open_acts_beside_it():
    """What a context has left for the next one of its kind, it cannot have again while that one uses it."""
    model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.zeros(2)
    first, second = (edit(model, "0", lambda value, more=more: value + more) for more in (1.0, 2.0))
    with first:
        assert model(x).tolist() == [1.0, 1.0]
    with second:
        assert model(x).tolist() == [2.0, 2.0]
        with first:
            assert model(x).tolist() == [3.0, 3.0]
        assert model(x).tolist() == [2.0, 2.0]
    assert model(x).tolist() == [0.0, 0.0]
