"""Law 1. No intervention, an edit that returns its input, and a patch with the captured value change no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves as leaves
from worlds import MODELS, WORLDS, inputs, make, same

from nicehooks import ablate, capture, edit, patch, suspend


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def capturing(model, x):
    with capture(model, "**"):
        return model(x)


def editing(model, x):
    with edit(model, "**", lambda value: value):
        return model(x)


def editing_inputs(model, x):
    with edit(model, "**@input[0]", lambda value: value):
        return model(x)


def editing_nothing(model, x):
    with edit(model, "**", lambda value: None):
        return model(x)


def editing_parameters(model, x):
    with edit(model, "**@weight", lambda value: value):
        return model(x)


def patching(model, x):
    """Inside a transform the captured values are live: gradients flow through the patched ones all the same."""
    with capture(model, "**", clone=True) as acts:
        model(x)
    with patch(model, {key: value for key, value in acts.items() if isinstance(value, Tensor)}):
        return model(x)


def patching_parts(model, x):
    with capture(model, "**") as acts:
        model(x)
    parts = {f"{key}[..., 1:]": value[..., 1:] for key, value in acts.items() if isinstance(value, Tensor)}
    with patch(model, parts):
        return model(x)


DERIVATIVES = ("grad", "jvp", "jacrev", "vmap_grad")
WAYS = [capturing, editing, editing_inputs, editing_nothing, editing_parameters, patching, patching_parts]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_inside_a_world(model, world, way):
    if way in (patching, patching_parts) and type(model).__name__ == "Thrice":
        return  # its block has three values in one forward: to patch them all with the last is no identity
    clean = world(model, inputs())
    found = world(lambda x: way(model, x), inputs())
    if way is patching_parts and world.__name__ in DERIVATIVES:  # the same sum of gradients, in another order
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(leaves(found), leaves(clean), strict=True))
    else:
        assert same(found, clean)


@pytest.mark.parametrize("way", [capturing, editing, editing_inputs], ids=lambda way: way.__name__)
def test_around_a_world(model, world, way):
    clean = world(model, inputs())
    contexts = {
        "capturing": lambda: capture(model, "**"),
        "editing": lambda: edit(model, "**", lambda value: value),
        "editing_inputs": lambda: edit(model, "**@input[0]", lambda value: value),
    }
    with contexts[way.__name__]():
        assert same(world(model, inputs()), clean)


def test_suspended(model, world):
    clean, plain = world(model, inputs()), model(inputs())
    with ablate(model, "**"):
        assert not same(model(inputs()), plain)
        with suspend(model):
            assert same(world(model, inputs()), clean)
            with suspend(model):
                assert same(world(model, inputs()), clean)
        assert not same(model(inputs()), plain)
    assert same(world(model, inputs()), clean)


def test_suspend_lets_later_ones_act(model):
    with ablate(model, "", value=1.0):
        assert model(inputs()).all()
        with suspend(model), ablate(model, ""):
            assert not model(inputs()).any()


def test_it_would_be_noticed(model, world):
    """The laws above can fail: an edit that is not the identity is seen in every world."""
    clean = world(model, inputs())
    with edit(model, "", lambda value: value * value + 1):
        assert not same(world(model, inputs()), clean)


def test_captured_values_are_the_models_own(model):
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
    with capture(model, "**") as acts:
        model(inputs())
    assert list(acts) == list(seen)
    assert all(acts[name] is out for name, out in seen.items())


def test_nothing_is_copied(model):
    """Law 8: what is captured shares its storage with what the model made."""
    with capture(model, "**") as acts, torch.no_grad():
        out = model(inputs())
    assert acts[""] is out
