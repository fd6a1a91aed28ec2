"""`torch.export` inside a context: the program does what the model does there, and hands the activations out."""

from __future__ import annotations

import pytest
import torch
from gallery.calling import AroundCaptured
from torch import nn
from worlds import inputs, make, state

from nicehooks import UnsupportedModule, capture, patch, steer
from nicehooks.values import trees

V = torch.linspace(-1, 1, 6)

# Dynamo, which `strict=True` goes through, tells of the notes that a context takes while the model runs.
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")


def agree(found, expected):
    assert trees.structure_of(found) == trees.structure_of(expected)
    pairs = zip(trees.leaves(found), trees.leaves(expected), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def exported(model, strict):
    return torch.export.export(model, (inputs(),), strict=strict).module()


@pytest.mark.parametrize("strict", [False, True])
def test_an_intervened_model(strict):
    model = make("Mlp")
    before = state(model)
    with steer(model, "embed", V), patch(model, "blocks.1[:, 0]", 0.5):
        program = exported(model, strict)
    with steer(model, "embed", V), patch(model, "blocks.1[:, 0]", 0.5):
        expected = model(inputs() + 1)
    agree(program(inputs() + 1), expected)
    assert not torch.allclose(program(inputs()), model(inputs()))
    assert state(model) == before


@pytest.mark.parametrize("strict", [False, True])
def test_activations_are_outputs(strict):
    model = make("Mlp")
    before = state(model)
    with steer(model, "embed", V), capture(model, "blocks.*", "") as acts, capture(model, "embed[:, 0]") as more:
        program = exported(model, strict)
    assert list(acts) == list(more) == []  # what was there stands for values that the program computes
    with steer(model, "embed", V), capture(model, "blocks.*", "", "embed[:, 0]") as expected:
        out = model(inputs() + 1)
    found, activations = program(inputs() + 1)
    assert torch.allclose(found, out)
    assert set(activations) == set(expected)
    assert all(torch.allclose(activations[key], expected[key]) for key in expected)
    assert state(model) == before
    agree(exported(model, strict=False)(inputs()), model(inputs()))


@pytest.mark.parametrize("strict", [False, True])
def test_captured_inside_the_exported_module(strict):
    around = AroundCaptured(make("Mlp"))
    agree(exported(around, strict)(inputs() + 1), around(inputs() + 1))
    with steer(around.model, "embed", V):
        program = exported(around, strict=False)
        agree(program(inputs() + 1), around(inputs() + 1))


def test_a_part_of_what_is_exported_cannot_hand_anything_out():
    around = nn.Sequential(make("Mlp"), nn.Tanh())
    with pytest.raises(UnsupportedModule, match=r"captured\(model"), capture(around[0], "blocks.1"):
        exported(around, strict=False)
    agree(exported(around, strict=False)(inputs()), around(inputs()))


def test_dynamic_shapes():
    model = make("Mlp")
    batch = torch.export.Dim("batch", min=2, max=64)
    with steer(model, "embed[:, 0]", torch.ones(())), capture(model, "blocks.1[:, :2]"):
        program = torch.export.export(model, (inputs(),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(9, 4)
    with steer(model, "embed[:, 0]", torch.ones(())), capture(model, "blocks.1[:, :2]") as acts:
        expected = model(x)
    agree(program(x), (expected, dict(acts)))
