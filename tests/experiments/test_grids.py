"""Which axes the sites of a path make, what they are called, and in which order the cells are."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES
from torch import nn

from nicehooks import anatomy, capture
from nicehooks.experiments.grids import grid_of, stem_of, stems_of
from nicehooks.paths.grammar import ModulePath


def grid(model, where, *args, **kwargs):
    with torch.no_grad(), capture(model, *stems_of(model, where), keep="all") as seen:
        model(*args, **kwargs)
    return grid_of(model, where, seen)


def sizes(found):
    return {axis.name: len(axis.labels) for axis in found.axes}


@pytest.fixture(scope="module")
def gpt2():
    return ARCHITECTURES["gpt2"].build(), ARCHITECTURES["gpt2"].inputs(0)


@pytest.mark.parametrize(
    ("where", "axes"),
    [
        ("transformer.h.*", {"layer": 3}),
        ("transformer.h.*[:, *]", {"layer": 3, "position": 7}),
        ("transformer.h.*[*, *]", {"layer": 3, "example": 3, "position": 7}),
        ("transformer.h.*.attn.c_proj@input[0]/4[:, :, *]", {"layer": 3, "head": 4}),
        ("transformer.h.*.attn.c_proj@input[0]/4[:, *, *]", {"layer": 3, "position": 7, "head": 4}),
        ("transformer.h.*.mlp.c_fc@bias[*]", {"layer": 3, "neuron": 128}),
        ("transformer.h.*.ln_1@weight", {"layer": 3}),
        (["transformer.h.*.attn[0]", "transformer.h.*.mlp"], {"module": 2, "layer": 3}),
        (["transformer.h.{0,2}[:, 1]", "transformer.h.{0,2}[:, -1]"], {"layer": 2, "position": 2}),
        (["transformer.h.0[:, 1]", "transformer.h.1[:, 2]"], {"site": 2}),
        ("transformer.h.1", {"site": 1}),
        ("transformer.h.1[:, *]", {"position": 7}),
        ("**.attn[*]", {"layer": 3, "element": 2}),
    ],
)
def test_the_axes_of_a_path(gpt2, where, axes):
    model, inputs = gpt2
    assert sizes(grid(model, where, **inputs)) == axes


def test_cells_are_in_the_order_of_the_axes(gpt2):
    model, inputs = gpt2
    found = grid(model, [anatomy(model).z.head(head) for head in (2, 0)], **inputs)
    assert [axis.labels for axis in found.axes] == [("0", "1", "2"), ("2", "0")]
    assert found.sites[:3] == (
        "transformer.h.0.attn.c_proj@input[0]/4[:, :, 2]",
        "transformer.h.0.attn.c_proj@input[0]/4[:, :, 0]",
        "transformer.h.1.attn.c_proj@input[0]/4[:, :, 2]",
    )


def test_a_name_that_the_number_of_the_layer_decides_is_no_axis():
    class Layer(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.add_module(name, nn.Linear(2, 2))

        def forward(self, x):
            return x + next(self.children())(x)

    model = nn.Sequential(Layer("mixer"), Layer("attention"), Layer("mixer"))
    assert sizes(grid(model, "*.{mixer,attention}", torch.ones(1, 2))) == {"layer": 3}


def test_the_second_number_of_an_encoder_and_decoder_is_no_axis():
    architecture = ARCHITECTURES["t5"]
    found = grid(architecture.build(), "**.o@input[0]/4[:, :, *]", **architecture.inputs(0))
    assert sizes(found) == {"module": 3, "layer": 2, "head": 4}


def test_a_star_is_an_axis_where_there_is_one_index():
    model = nn.Sequential(nn.Linear(2, 1))
    assert sizes(grid(model, "*[:, *]", torch.ones(5, 2))) == {"layer": 1, "neuron": 1}


def test_positions_of_layers_of_different_width_are_one_axis_of_paths():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    found = grid(model, "*[:, *]", torch.ones(5, 2))
    assert found.sites == found.axes[0].labels == ("0[:, 0]", "0[:, 1]", "0[:, 2]", "1[:, 0]", "1[:, 1]")


def test_calls_and_elements_are_axes():
    relu = nn.ReLU()
    assert sizes(grid(nn.Sequential(relu, relu), "0#*[:, *]", torch.ones(2, 3))) == {"call": 2, "neuron": 3}
    assert sizes(grid(nn.LSTM(3, 4), "[1][*][0]", torch.ones(5, 2, 3))) == {"element": 2}


def test_a_wildcard_passes_over_what_is_not_reached():
    class Half(nn.ModuleList):
        def forward(self, x):
            return self[0](x)

    found = grid(Half([nn.Linear(2, 2), nn.Linear(2, 2)]), "*", torch.ones(1, 2))
    assert found.sites == ("0",)


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("h.3", "h.3"),
        ("h.3[:, 2]", "h.3"),
        ("h.3#1[0][:, 2]", "h.3#1[0]"),
        ("h.3@input['x']/4[:, :, *]", "h.3@input['x']/4"),
        ("h[*][:, 1]", "h"),
    ],
)
def test_the_value_around_a_site(path, stem):
    assert str(stem_of(ModulePath.parse(path))) == stem
