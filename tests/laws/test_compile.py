"""Law 9. A compiled model sees the interventions; leaving and entering again compiles nothing."""

from __future__ import annotations

import threading

import pytest
import torch
import torch._dynamo
from torch import nn
from worlds import graphs, inputs, make, same, state

from nicehooks import SiteNotReached, TreeMismatch, ablate, capture, edit, patch, splice, steer, suspend

V = torch.linspace(-1, 1, 6)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


CONTEXTS = {
    "capture": lambda model, i: capture(model, "**"),
    "capture parts": lambda model, i: capture(model, "blocks.*[:, 0]", "head@input[0]", "embed/2[..., 1, :]"),
    "capture all": lambda model, i: capture(model, "blocks.*", keep="all"),
    "patch": lambda model, i: patch(model, {"blocks.1[:, 0]": torch.full((5,), float(i)), "blocks.2": 0.5}),
    "edit": lambda model, i: edit(model, "blocks.*", lambda value: value * 2 + 1),
    "edit inputs": lambda model, i: edit(model, "head@input[0]", lambda value: value.sin()),
    "steer": lambda model, i: steer(model, "embed", V * i),
    "ablate": lambda model, i: ablate(model, "blocks.{0,2}"),
    "splice": lambda model, i: splice(model, "blocks.0", nn.Linear(6, 6), error=True),
    "weight": lambda model, i: steer(model, "head@weight[0]", V * i),
    "calls": lambda model, i: ablate(model, "blocks.0#0"),
}


@pytest.fixture(params=CONTEXTS)
def context(request):
    return CONTEXTS[request.param]


def equal(a, b):
    return torch.allclose(a, b, atol=1e-6)


def test_a_model_compiled_before_sees_it_and_nothing_is_compiled_again(context):
    model = make("Mlp")
    run = compiled(model)
    clean = run(inputs())
    before = state(model)
    counts = []
    for i in range(4):
        torch.manual_seed(i)
        with context(model, i) as seen:
            out = run(inputs())
        counts.append(graphs())
        torch.manual_seed(i)
        with context(model, i) as expected:
            assert equal(out, model(inputs()))
        if isinstance(seen, dict):
            assert list(seen) == list(expected)
            assert all(same(seen[key], expected[key]) for key in expected)
        assert equal(run(inputs()), clean)
        assert graphs() == counts[-1]
    assert counts == [2, 2, 2, 2]
    assert state(model) == before


def test_the_same_object_again_compiles_nothing():
    model = make("Mlp")
    run, context = compiled(model), steer(model, "blocks.*", V)
    run(inputs())
    for _ in range(3):
        with context, capture(model, "blocks.*") as acts:
            out = run(inputs())
        assert list(acts) == ["blocks.0", "blocks.1", "blocks.2"]
        with context:
            assert equal(out, model(inputs()))
    assert graphs() == 2


def test_new_numbers_compile_nothing_for_long():
    """A float becomes an input of the graph the second time; an int goes as a float."""
    model = make("Mlp")
    run = compiled(model)
    for i in range(12):
        with patch(model, "blocks.1", i), ablate(model, "embed", value=i / 2):
            run(inputs())
    assert graphs() <= 3


def test_a_model_compiled_inside_and_a_second_instance():
    model, twin = make("Mlp"), make("Mlp")
    run = compiled(model)
    with steer(model, "embed", V):
        steered = run(inputs())
        assert equal(steered, model(inputs()))
    assert equal(run(inputs()), model(inputs()))
    other = compiled(twin)
    with steer(twin, "embed", V):
        assert equal(other(inputs()), steered)
        assert equal(run(inputs()), model(inputs()))
    assert equal(other(inputs()), twin(inputs()))


def test_module_compile_in_place():
    model = make("Mlp")
    clean = model(inputs())
    model.compile(fullgraph=True, backend="eager")
    with ablate(model, "head"), capture(model, "blocks.1") as acts:
        assert not model(inputs()).any()
    assert acts["blocks.1"].shape == (5, 6)
    assert equal(model(inputs()), clean)


def test_around_a_compiled_function_and_stacked():
    model = make("Mlp")
    f = torch.compile(lambda x: model(x).sin(), fullgraph=True, backend="eager")
    f(inputs())
    for i in range(3):
        with (
            steer(model, "embed", V * i),
            capture(model, "blocks.0") as acts,
            ablate(model, "blocks.1[:, 0]"),
            capture(model, "head@input[0]") as last,
        ):
            out = f(inputs())
            seen, end = acts["blocks.0"], last["head@input[0]"]
            assert equal(out, model(inputs()).sin())
            assert equal(seen, acts["blocks.0"]) and equal(end, last["head@input[0]"])
    with suspend(model), ablate(model, "head"):
        assert not f(inputs()).any()


def test_a_thread_without_interventions_sees_none():
    model = make("Mlp")
    run = compiled(model)
    clean = run(inputs())
    seen = []
    for _ in range(2):
        with ablate(model, "head"):
            assert not run(inputs()).any()
            other = make("Mlp")

            def work(other=other):
                seen.append(run(inputs()))
                with ablate(other, "head"):  # as many sessions, of the same kind, on another model
                    other(inputs())
                    seen.append(run(inputs()))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert len(seen) == 4
    assert all(equal(out, clean) for out in seen)


def test_gradients_flow_through_a_compiled_intervention():
    model = make("Mlp")
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    vector = V.clone().requires_grad_()
    with steer(model, "blocks.1", vector), capture(model, "blocks.0") as acts:
        run(inputs()).sum().backward()
    expected = V.clone().requires_grad_()
    with steer(model, "blocks.1", expected):
        model(inputs()).sum().backward()
    assert equal(vector.grad, expected.grad)
    assert acts["blocks.0"].requires_grad


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # inductor itself uses what torch has deprecated
def test_with_the_default_backend():
    model = make("Mlp")
    run = torch.compile(model, fullgraph=True)
    clean = run(inputs())
    for i in range(2):
        with steer(model, "embed", V * i), capture(model, "blocks.*") as acts:
            out = run(inputs())
            compiled_acts = dict(acts)
            assert torch.allclose(out, model(inputs()), atol=1e-5)
        assert all(torch.allclose(compiled_acts[key], acts[key], atol=1e-5) for key in acts)
        assert torch.allclose(run(inputs()), clean)
    assert graphs() == 2


def test_what_cannot_be_traced_is_torchs_own_error():
    model = make("Mlp")
    run = compiled(model)
    with pytest.raises(torch._dynamo.exc.Unsupported), edit(model, "embed", lambda value: print(input()) or value):
        run(inputs())
    assert run(inputs()).shape == (5, 2)


@pytest.mark.parametrize("path", ["[:, 9]", "[..., -3]", "[[0, 9]]", "[:, :, 0]"])
def test_a_region_that_is_not_there_is_refused_as_in_eager_mode(path):
    model = nn.Tanh()
    for run in (torch.compile(model, backend="eager"), model):
        with pytest.raises(TreeMismatch) as caught, capture(model, path):
            run(torch.zeros(3, 2))
        assert str(caught.value) == f"capture at {path!r}: {path} is out of range for Tensor[3, 2] float32."


def test_a_region_that_is_empty_is_not_reached_and_one_that_is_there_is():
    model = make("Mlp")
    run = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for count in (3, 5, 2, 4, 6):
        try:
            with patch(model, "embed[3:]", 0.0):
                run(inputs()[:1].expand(count, -1))
        except SiteNotReached:
            assert count <= 3
        else:
            assert count > 3


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_a_changed_weight_is_there_in_every_call(inside):
    """Of one module in one forward, of the model within one context, and of two contexts after each other."""
    torch.manual_seed(0)
    linear, x, new = nn.Linear(4, 4), torch.randn(2, 4), torch.randn(4, 4)
    model = nn.Sequential(linear, nn.Tanh(), linear)

    def work(run):
        with patch(model, "0@weight", new):
            first = run(x) + run(2 * x)
        with patch(model, "0@weight", 2 * new):
            return first + run(x)

    compiled = torch.compile(work if inside else model, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(model) if inside else work(compiled), work(model))
