"""Law 9, for what is counted, for threads, and for what compiled code overwrites."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch._dynamo
from gallery.checkpointed import CheckpointedFunction
from torch import nn
from worlds import graphs, inputs, make

from nicehooks import StaleActivation, UnsupportedModule, ablate, capture, edit, grad_at, patch, steer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


# --- steps and calls of a root that torch inlines ---------------------------------------------------------------------

STEPS = [0, [1, 3], slice(1, None), slice(1, 3), slice(0, None, 2), range(2, 5), slice(1, None, 3)]
slow = pytest.mark.slow


@pytest.mark.parametrize("steps", [2, *[pytest.param(steps, marks=slow) for steps in STEPS]], ids=str)
@pytest.mark.parametrize("root", ["a container", "a function"])
def test_steps_of_an_inlined_root_are_those_of_eager_code(steps, root):
    model = chain()
    run = compiled(model) if root == "a container" else compiled(lambda x: model(x) + 0)

    def acted(call):
        with ablate(model, "0", steps=steps), capture(model, "0") as acts:
            return [(call(inputs()), not acts["0"].any())[1] for _ in range(12)]

    assert acted(run) == acted(model)
    made = graphs()
    assert made <= 4
    assert acted(run) == acted(model)
    assert graphs() == made


@pytest.mark.parametrize(
    "context",
    [
        lambda model: capture(model, "0#0", "2#*"),
        lambda model: capture(model, "0", stop=True),
        pytest.param(lambda model: steer(model, "0", torch.ones(4), calls=0), marks=slow),
        pytest.param(lambda model: capture(model, "0", steps=slice(2, None), keep="all"), marks=slow),
    ],
)
def test_what_counts_is_compiled_a_few_times_and_then_never_again(context):
    model, x = chain(), inputs()
    run, seen = compiled(model), []
    for _ in range(2):
        with context(model) as acts:
            for _ in range(12):
                run(x)
                seen.append(graphs())
        if isinstance(acts, dict):
            with context(model) as expected:
                for _ in range(12):
                    model(x)
            assert list(acts) == list(expected)
            assert [len(acts.calls(key)) for key in acts] == [len(expected.calls(key)) for key in expected]
    assert seen[3:] == [seen[3]] * 21


def test_a_predicate_is_asked_of_each_number_and_compiled_once_for_it():
    model, x = chain(), inputs()
    run = compiled(model)

    def acted(call):
        with ablate(model, "0", steps=lambda step: step % 2 == 1), capture(model, "0") as acts:
            return [(call(x), not acts["0"].any())[1] for _ in range(5)]

    for _ in range(2):
        assert acted(run) == acted(model) == [False, True, False, True, False]
        assert graphs() == 5


# --- threads ----------------------------------------------------------------------------------------------------------


def in_threads(work, count):
    errors = []

    def guarded(seed):
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


@pytest.mark.parametrize("steps", [None, slice(0, None)], ids=["uncounted", "counted"])
def test_threads_share_the_graphs_of_the_contexts_that_they_enter(steps):
    model, x = chain(), inputs()
    run = compiled(model)
    run(x)

    def work(seed):
        for turn in range(20):
            with steer(model, "0", torch.full((4,), float(seed + turn)), steps=steps), capture(model, "2") as acts:
                assert torch.equal(run(x), model(x)) and len(acts) == 1

    in_threads(work, 6)
    assert graphs() <= 3


@slow
def test_a_handle_acts_in_its_place_among_the_contexts_of_each_thread():
    model, x = chain(), inputs()
    run = compiled(model)

    def work(seed):
        for _ in range(3):
            with edit(model, "0", lambda value: value + 1):
                handle = edit(model, "0", lambda value: value * 2).attach()
                with edit(model, "0", lambda value: value + 3):
                    eager = model(x)
                    assert torch.allclose(run(x), eager)
                handle.remove()
                assert torch.allclose(run(x), model(x))

    work(0)
    in_threads(work, 1)


def test_what_another_thread_has_entered_stays_out_of_a_graph_whose_handle_came_between_two_contexts():
    model, x = chain(), inputs()
    entered, over = threading.Event(), threading.Event()

    def work():
        with edit(model, "0", lambda value: value + 100):
            entered.set()
            over.wait(60)
            model(x)

    thread = threading.Thread(target=work)
    with edit(model, "0", lambda value: value + 1):
        handle = edit(model, "0", lambda value: value * 2).attach()
        thread.start()
        entered.wait(60)
        with edit(model, "0", lambda value: value + 3):
            found = compiled(model)(x)
        over.set()
        thread.join(60)
        handle.remove()
    assert torch.allclose(found, model[1:]((model[0](x) + 1) * 2 + 3))


# --- what is overwritten ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=slow)])
@pytest.mark.parametrize("keep", ["last", pytest.param("first", marks=slow), pytest.param("all", marks=slow)])
def test_what_a_compiled_model_has_overwritten_is_not_given_out(backend, keep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).requires_grad_(False)
    run, x = compiled(model, backend), inputs()
    for _ in range(2):
        with capture(model, "0", "1@input[0]", "0[:, 0]", "1", "2", keep=keep) as acts:
            run(x)
            run(x)
        for path in ("0", "1@input[0]", "0[:, 0]"):
            with pytest.raises(StaleActivation, match="clone=True"):
                acts[path]
        assert torch.allclose(acts.calls("1")[0], model[:2](x), atol=1e-6)
        assert torch.allclose(acts.calls("2")[0], model(x), atol=1e-6)
    with capture(model, "0", clone=True) as cloned:
        run(x)
    assert torch.allclose(cloned["0"], model[0](x), atol=1e-6)
    with capture(model, "0", "2") as eager:  # the same cache, filled anew by eager code
        run(x)
        model[2](x)
        eager["0"] = x
    assert eager["0"] is x
    assert graphs() <= 4


PARTLY: dict[str, Any] = {
    "the part": lambda model: model[0].compile(backend="aot_eager"),
    "a wrapper in its place": lambda model: model.__setitem__(0, compiled(model[0], "aot_eager")),
    "its forward": lambda model: setattr(model[0], "forward", torch.compile(model[0].forward, backend="aot_eager")),
}


@pytest.mark.parametrize("how", PARTLY)
def test_what_a_compiled_part_overwrites_is_kept_as_it_was(how):
    """Nothing of ours runs at the end of its graph, to say what was overwritten."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(4, 4))
    model, x = nn.Sequential(inner, nn.Linear(4, 4)).eval(), inputs()
    linear, expected = inner[0](x).detach(), model(x).detach()
    PARTLY[how](model)
    for keep in ("last", "all"):
        with capture(model, "0.0", "0.0[:, 1]", "0.2@input[0]", keep=keep) as acts, torch.no_grad():
            assert torch.allclose(model(x), expected)
        assert torch.allclose(acts.calls("0.0")[0], linear) and torch.allclose(acts.calls("0.0[:, 1]")[0], linear[:, 1])
        assert torch.allclose(acts.calls("0.2@input[0]")[0], linear)


# --- what is refused, and the way that works --------------------------------------------------------------------------

COMPILED = {
    "around": lambda model: compiled(model, "aot_eager"),
    "in place": lambda model: (model.compile(fullgraph=True, backend="aot_eager"), model)[1],
    "a part": lambda model: (model[2].compile(fullgraph=True, backend="aot_eager"), model)[1],
    "forward": lambda model: (setattr(model, "forward", compiled(model.forward, "aot_eager")), model)[1],
}


@pytest.mark.parametrize("how", ["around", *[pytest.param(how, marks=slow) for how in COMPILED if how != "around"]])
def test_grad_at_runs_a_compiled_model_as_it_was_written(how):
    model, x = chain(), inputs()
    expected, gradients = grad_at(model, "0", "2", lambda output: output.sum())(x)
    run = COMPILED[how](model)
    for _ in range(2):
        value, found = grad_at(run, "0", "2", lambda output: output.sum())(x)
        assert torch.equal(value, expected)
        assert list(found) == list(gradients) and all(torch.equal(found[key], gradients[key]) for key in found)
    before = graphs()
    compiled(chain())(x)
    assert graphs() == before + 1  # compiling is on again


def test_grad_at_in_traced_code_is_refused():
    model = chain()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="grad_at cannot be traced"):
        compiled(grad_at(model, "0", lambda output: output.sum()))(inputs())


def test_a_gradient_of_a_backward_that_is_compiled_is_refused():
    model = chain()
    with torch._dynamo.config.patch(compiled_autograd=True):
        with pytest.raises(UnsupportedModule, match="compiled_autograd = False"), capture(model, "0@grad"):
            pass
        context = patch(model, "0", 0.0)
        with context:
            compiled(model, "aot_eager")(inputs()).sum().backward()
    assert "forward" not in vars(model[0])


@slow
def test_a_model_that_checkpoints_inside_compiled_code():
    """torch's own error names the line that lets it run; with it, values and gradients are those of eager code."""
    torch.manual_seed(0)
    model, x = CheckpointedFunction(), inputs()

    def done(run):
        model.zero_grad()
        with edit(model, "a", lambda value: value * 2), capture(model, "a", "b") as acts:
            run(x).sum().backward()
        return [*acts.values(), model.a.weight.grad.clone()]

    with pytest.raises(torch._dynamo.exc.Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint = True"):
        done(compiled(model, "aot_eager"))
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        found = done(compiled(model, "aot_eager"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, done(model), strict=True))


@slow
def test_a_part_that_is_compiled_is_counted_with_the_rest():
    model = make("Mlp")
    model.embed.compile(fullgraph=True, backend="eager")
    with capture(model, "embed", "head", steps=[1, 3], keep="all") as acts:
        for step in range(6):
            model(inputs() + step)
    assert [len(acts.calls(key)) for key in ("embed", "head")] == [2, 2]
    assert torch.equal(acts.calls("embed")[1], nn.functional.linear(inputs() + 3, model.embed.weight, model.embed.bias))
