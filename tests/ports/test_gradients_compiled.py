"""The gradient ports around compiled models: backward comes back to the context that was around the forward."""

from __future__ import annotations

import gc
import threading
from contextlib import ExitStack

import pytest
import torch
import torch._dynamo
from torch.func import grad
from worlds import graphs, inputs, make, state

from nicehooks import SiteNotReached, ablate, capture, edit
from nicehooks.ports import compiled_gradients

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.slow]


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def backward(run, x, *contexts):
    """The gradient at `x` inside of the contexts, and what the captures among them saw."""
    x = x.clone().requires_grad_()
    with ExitStack() as stack:
        seen = [stack.enter_context(context) for context in contexts]
        run(x).sin().sum().backward()
    caches = [cache for cache in seen if isinstance(cache, dict)]
    return x.grad, {(number, key): value for number, cache in enumerate(caches) for key, value in cache.items()}


def agree(found, expected):
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert list(found[1]) == list(expected[1])
    assert all(torch.allclose(found[1][key], expected[1][key], atol=1e-5) for key in expected[1])


CASES = {
    "capture": lambda m: [capture(m, "blocks.*@grad", "head@input.grad[0]", "embed@grad[:, 0]")],
    "ablate": lambda m: [ablate(m, "blocks.2@grad")],
    "edit a part": lambda m: [edit(m, "blocks.1@grad[:, 0]", lambda gradient: gradient * 2)],
    "in order": lambda m: [
        capture(m, "blocks.1@grad"),
        edit(m, "blocks.1@grad", lambda gradient: gradient + 1),
        edit(m, "blocks.1@grad", lambda gradient: gradient * 3),
        capture(m, "blocks.1@grad[..., 1:]", "blocks.0@grad"),
    ],
    "input in order": lambda m: [
        edit(m, "head@input.grad[0]", lambda gradient: gradient + 1),
        edit(m, "head@input.grad[0]", lambda gradient: gradient * 3),
        capture(m, "head@input.grad[0]"),
    ],
}


def check(backend, cases):
    """Each case three times, as in eager code and with one graph; then none."""
    model = make("Mlp")
    run, before = compiled(model, backend), state(model)
    holders = set(compiled_gradients._sessions)
    for number, case in enumerate(cases):
        for shift in range(3):
            x = inputs() + shift
            agree(backward(run, x, *case(model)), backward(model, x, *case(model)))
            assert graphs() == number + 1
            assert state(model) == before
    agree(backward(run, inputs()), backward(model, inputs()))
    assert graphs() == len(cases) + 1
    gc.collect()
    assert set(compiled_gradients._sessions) <= holders


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_as_in_eager_code_and_compiled_once(backend):
    check(backend, list(CASES.values()))


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # inductor itself uses what torch has deprecated
def test_all_at_once_with_the_default_backend():
    check("inductor", [lambda m: [context for case in CASES.values() for context in case(m)]])


def test_frozen_parameters_and_inputs_without_gradients():
    model = make("Mlp").requires_grad_(False)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for f in (run, model):
        with capture(model, "blocks.1@grad") as acts:
            f(inputs()).sin().sum().backward()
        found.append(acts["blocks.1@grad"])
    assert torch.allclose(*found, atol=1e-6)


def test_what_was_captured_is_its_own_memory():
    """Compiled code writes to its buffers again."""
    model = make("Mlp")
    run = compiled(model)
    _, first = backward(run, inputs(), capture(model, "blocks.*@grad"))
    kept = {key: value.clone() for key, value in first.items()}
    backward(run, inputs() + 5, capture(model, "blocks.*@grad"))
    assert all(torch.equal(first[key], kept[key]) for key in kept)


def test_backward_after_leaving_does_nothing():
    model = make("Mlp")
    run, x, y = compiled(model), inputs().requires_grad_(), inputs().requires_grad_()
    context = ablate(model, "blocks.1@grad").__enter__()
    out = run(x)
    with pytest.raises(SiteNotReached, match="no gradient came by"):
        context.__exit__(None, None, None)
    with ablate(model, "blocks.0@grad"):  # another one that is active by then
        out.sum().backward()
        compiled(model)(inputs().requires_grad_()).sum().backward()
    model(y).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_a_thread_without_the_context_has_the_clean_gradient():
    model = make("Mlp")
    run = compiled(model)
    clean = backward(run, inputs())
    seen = []
    with ablate(model, "blocks.1@grad"):
        thread = threading.Thread(target=lambda: seen.append(backward(run, inputs())))
        thread.start()
        thread.join()
        changed = backward(run, inputs())
    agree(seen[0], clean)
    assert not torch.allclose(changed[0], clean[0])


def test_around_a_compiled_grad():
    model = make("Mlp")

    def f(x):
        return grad(lambda x: model(x).sin().sum())(x)

    run = compiled(f)
    for context in (lambda: capture(model, "blocks.1@grad"), lambda: ablate(model, "blocks.1@grad")):
        with context() as found:
            out = run(inputs())
        with context() as expected:
            assert torch.allclose(out, f(inputs()), atol=1e-6)
        if isinstance(expected, dict):
            assert torch.allclose(found["blocks.1@grad"], expected["blocks.1@grad"], atol=1e-6)


BATCHED = {
    "is_grads_batched": lambda out, x, basis: torch.autograd.grad(out, x, basis, is_grads_batched=True)[0],
    "vmap": lambda out, x, basis: torch.vmap(lambda one: torch.autograd.grad(out, x, one, retain_graph=True)[0])(basis),
}


@pytest.mark.parametrize(
    ("way", "backend"),
    [("is_grads_batched", "aot_eager"), ("is_grads_batched", "eager"), ("vmap", "eager")],  # torch refuses the others
)
def test_a_batch_of_gradients_is_captured_whole_and_changed_one_by_one(way, backend):
    """Two sites of one context, for an edit has to see which of them a gradient came by."""
    model, x = make("Mlp"), inputs()[0].requires_grad_()
    paths = ["blocks.1@grad", "embed@grad"]
    basis = torch.eye(len(model(x)))
    found = []
    for run in (compiled(model, backend), model):
        with edit(model, paths, lambda gradient: gradient / gradient.norm()), capture(model, paths) as acts:
            found.append((BATCHED[way](run(x), x, basis), dict(acts)))
    agree(*found)
    assert all(value.shape[0] == len(basis) for value in found[0][1].values())
