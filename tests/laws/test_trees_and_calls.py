"""Law 6, and calls and steps: structures are rebuilt with their types intact, shared modules have many calls."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gallery.calling import NamedAsPorts
from gallery.returning import Around
from gallery.shared import CallsItself
from gallery.values import Box, Pair
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from worlds import inputs, make, same

from nicehooks import KEEP, SiteNotReached, TreeMismatch, ablate, capture, edit, patch, steer


@dataclass(frozen=True)
class Frozen:
    value: Any
    rest: Any = None


STRUCTURES = {
    "tuple": (lambda x: (x, x + 1), "[1]"),
    "nested tuple with None": (lambda x: (x, (None, (x + 1, None))), "[1][1][0]"),
    "named tuple by name": (lambda x: Pair(x, x + 1), "['right']"),
    "named tuple by position": (lambda x: Pair(x, x + 1), "[1]"),
    "list": (lambda x: [x, x + 1], "[-1]"),
    "dict": (lambda x: {"b": x, "a": x + 1}, "['a']"),
    "dict with numbers": (lambda x: {7: x, 3: x + 1}, "[3]"),
    "ordered dict": (lambda x: OrderedDict(b=x, a=x + 1), "['a']"),
    "dataclass": (lambda x: Box((x, x + 1)), "['content'][1]"),
    "frozen dataclass": (lambda x: Frozen(x, x + 1), "['rest']"),
    "ModelOutput": (lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, x + 1)), "['hidden_states'][1]"),
    "ModelOutput by position": (lambda x: BaseModelOutput(last_hidden_state=x + 1), "[0]"),
    "torch.return_types": (lambda x: torch.max(torch.stack([x, x + 1]), 0), "[0]"),
}


@pytest.fixture(params=STRUCTURES)
def structure(request):
    make_value, part = STRUCTURES[request.param]
    return Around(make_value), part, make_value(inputs())


def test_captured_whole_and_in_part(structure):
    model, part, value = structure
    with capture(model, "inner", f"inner{part}", f"inner{part}[:, 1]") as acts:
        out = model(inputs())
    assert acts["inner"] is out
    assert type(acts["inner"]) is type(value)
    assert torch.equal(acts[f"inner{part}"], inputs() + 1)
    assert torch.equal(acts[f"inner{part}[:, 1]"], inputs()[:, 1] + 1)
    with capture(model, "inner") as acts:
        model(inputs())
    assert torch.equal(acts[f"inner{part}[:, 1]"], inputs()[:, 1] + 1)


@pytest.mark.parametrize("way", ["edit", "patch", "patch a column"])
def test_changed_in_part_and_rebuilt(structure, way):
    model, part, value = structure
    context = {
        "edit": lambda: edit(model, f"inner{part}", lambda value: value * 0 + 5),
        "patch": lambda: patch(model, f"inner{part}", torch.full((5, 4), 5.0)),
        "patch a column": lambda: patch(model, f"inner{part}[:, 0]", 5.0),
    }[way]()
    with context:
        out = model(inputs())
    changed = inputs() + 1
    changed[:, 0 if way == "patch a column" else slice(None)] = 5.0
    with capture(model, "inner") as acts, patch(model, f"inner{part}", changed):
        expected = model(inputs())
    assert type(out) is type(value)
    assert same(out, expected)
    assert type(acts["inner"]) is type(value)
    with capture(model, f"inner{part}") as after:
        model(inputs())
    assert torch.equal(after[f"inner{part}"], inputs() + 1)


def test_a_tree_of_values_replaces_leaf_by_leaf():
    model = Around(lambda x: (x, {"a": x + 1, "b": None}, Pair(x, 3)))
    with patch(model, "inner", (KEEP, {"a": 7.0, "b": KEEP}, Pair(torch.zeros(4), KEEP))):
        first, second, third = model(inputs())
    assert torch.equal(first, inputs())
    assert (second["a"] == 7).all() and second["b"] is None
    assert not third.left.any() and third.right == 3
    with patch(model, "inner[1]", {"a": 7.0}):
        assert (model(inputs())[1]["a"] == 7).all()
    with ablate(model, "inner"):
        first, second, third = model(inputs())
    assert not first.any() and not second["a"].any() and second["b"] is None and third.right == 3
    with pytest.raises(TreeMismatch, match=r"\(in element 1\)"), patch(model, "inner", (KEEP, {"c": 1.0}, KEEP)):
        model(inputs())


def test_a_module_that_returns_none():
    model = Around(lambda x: None)
    with capture(model, "inner") as acts, edit(model, "inner", lambda value: value):
        assert model(inputs()) is None
    assert acts["inner"] is None and "inner" in acts
    with (
        pytest.raises(TreeMismatch, match=r"\[0\] needs a tensor or a container, not None"),
        capture(model, "inner[0]"),
    ):
        model(inputs())


def test_star_is_one_site_per_index():
    model = Around(lambda x: (x, x + 1))
    with capture(model, "inner[*]", "inner[0][:, *]", "inner[*][*, 0]") as acts:
        model(inputs())
    assert list(acts)[:2] == ["inner[0]", "inner[1]"]
    assert list(acts)[2:6] == [f"inner[0][:, {i}]" for i in range(4)]
    assert len(acts) == 2 + 4 + 10
    sites = []
    with edit(model, "inner[1][:, *]", lambda value, site: sites.append(str(site))):
        model(inputs())
    assert sites == [f"inner[1][:, {i}]" for i in range(4)]
    with patch(model, "inner[0][*, 0]", 3.0):
        assert (model(inputs())[0][:, 0] == 3).all()


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_an_argument_is_found_however_it_was_passed():
    model = make("Normed")
    clean = model(inputs())
    for path in ("gate@input['by']", "gate@input[1]", "gate@input[-1]"):
        with capture(model, path) as acts:
            model(inputs())
        assert torch.equal(acts[path], inputs())
        with patch(model, path, 0.0):
            assert torch.equal(model(inputs()), model.norm(inputs()) * 0.5)
    with capture(model, "norm@input['input']", "norm@input[0]", "@input['x']") as acts:
        model(inputs())
    assert all(torch.equal(value, inputs()) for value in acts.values())
    assert same(model(inputs()), clean)


def test_an_argument_that_was_not_passed_has_its_default():
    model = make("Normed")
    with capture(model, "gate@input['scale']", "gate@input[2]") as acts:
        clean = model(inputs())
    assert list(acts.values()) == [1.0, 1.0]
    with patch(model, "gate@input['scale']", 2.0):
        assert torch.equal(model(inputs()), clean * 2)
    with (
        pytest.raises(TreeMismatch, match=r"gate@input\['nothing'\].*'value', 'by'"),
        capture(model, "gate@input['nothing']"),
    ):
        model(inputs())


def test_all_arguments_at_once():
    model = make("Normed")
    with capture(model, "gate@input") as acts:
        clean = model(inputs())
    assert list(acts["gate@input"]) == ["value", "by"]
    assert acts["gate@input[1]"] is acts["gate@input['by']"] is acts["gate@input"][1]
    with edit(model, "gate@input", lambda args: {"value": args["value"] * 2}):
        assert torch.allclose(model(inputs()), clean * 2)


def test_names_that_are_words_of_the_language():
    model = NamedAsPorts()
    x = inputs()
    with capture(model, "*", "input@input[0]", "@input[1]", "@input['other']", "output@weight") as acts:
        model(x, x + 1, other=x + 2)
    assert list(acts) == [
        "@input[1]",
        "@input['other']",
        "output@weight",
        "input@input[0]",
        "input",
        "output",
        "forward_",
        "grad",
    ]
    assert torch.equal(acts["@input[1]"], x + 1)
    assert torch.equal(acts["@input['other']"], x + 2)
    with patch(model, {"@input[0]": 0.0, "@input['other']": 0.0, "@input[1]": 0.0}):
        assert torch.allclose(model(x, x, other=x), model(x * 0, x * 0, other=x * 0))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_heads_split_the_last_dimension():
    model = nn.Sequential(nn.Linear(4, 12), nn.Identity())
    x = torch.randn(2, 3, 4)
    with capture(model, "0/3", "0/3[:, :, 1]", "1@input[0]/3[:, -1, 2]") as acts:
        out = model(x)
    assert torch.equal(acts["0/3"], out.reshape(2, 3, 3, 4))
    assert torch.equal(acts["0/3[:, :, 1]"], out[..., 4:8])
    assert torch.equal(acts["1@input[0]/3[:, -1, 2]"], out[:, -1, 8:])
    with ablate(model, "0/3[:, :, 1]"):
        ablated = model(x)
    assert not ablated[..., 4:8].any()
    assert torch.equal(ablated[..., :4], out[..., :4]) and torch.equal(ablated[..., 8:], out[..., 8:])


# --- calls and steps --------------------------------------------------------------------------------------------------


def test_keep():
    model = make("Thrice")
    values = [inputs()]
    for _ in range(3):
        values.append(model.block(values[-1]))
    for keep, expected in {"first": values[1], "last": values[3]}.items():
        with capture(model, "block", keep=keep) as acts:
            model(inputs())
        assert torch.equal(acts["block"], expected)
    with capture(model, "block", "block@input[0]", keep="all") as acts:
        model(inputs())
        model(inputs())
    assert len(acts["block"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(acts["block"], values[1:] * 2, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(acts.calls("block@input[0]"), values[:3] * 2, strict=True))
    assert torch.equal(acts["block[:, 0]"][2], values[3][:, 0])


def test_calls_by_number():
    model = make("Thrice")
    with capture(model, "block#*", "block#1[:, 0]", "block#2@input[0]") as acts:
        model(inputs())
    assert list(acts) == ["block#0", "block#1", "block#1[:, 0]", "block#2@input[0]", "block#2"]
    assert torch.equal(acts["block#1"], model.block(acts["block#0"]))
    assert len(acts.calls("block")) == 3
    with patch(model, "block#1", 0.0):
        out = model(inputs())
    assert torch.equal(out, model.block(torch.zeros(5, 4)))
    with ablate(model, "block", calls=1):
        assert torch.equal(model(inputs()), out)
    with (
        ablate(model, "block", calls=slice(0, 2)),
        ablate(model, "block", calls=[0]),
        ablate(model, "block", calls=lambda k: k < 2),
    ):
        assert torch.equal(model(inputs()), out)
    with pytest.raises(SiteNotReached), capture(model, "block#3"):
        model(inputs())


def test_a_module_that_calls_itself():
    """Calls are numbered as they begin, and end in the other order."""
    model = CallsItself()
    with capture(model, "#*", "layer#*", "#*@input[0]") as acts:
        out = model(inputs())
    assert torch.equal(acts["#0"], out) and torch.equal(acts["#1"] * 2, out) and torch.equal(acts["#2"] * 4, out)
    assert list(acts).index("#2") < list(acts).index("#1") < list(acts).index("#0")
    assert torch.equal(acts["#1@input[0]"], acts["layer#0"])
    with patch(model, "#1", 1.0):
        assert (model(inputs()) == 2).all()
    with capture(model, "", keep="all") as acts:
        model(inputs())
        model(inputs())
    assert len(acts[""]) == 6
    with ablate(model, "layer", steps=1, calls=2):
        first, second = model(inputs()), model(inputs())
    assert torch.equal(first, out) and not second.any()


def test_steps():
    model = make("Mlp")
    clean = model(inputs())
    for steps, hit in [
        (1, [1]),
        (slice(2, None), [2, 3]),
        (slice(0, 4, 2), [0, 2]),
        ([0, 3], [0, 3]),
        (range(2), [0, 1]),
        (lambda step: step % 2, [1, 3]),
    ]:
        with steer(model, "head", torch.ones(2), steps=steps):
            outs = [model(inputs()) for _ in range(4)]
        assert [i for i, out in enumerate(outs) if not torch.equal(out, clean)] == hit
        with patch(model, "head@bias", 7.0, steps=steps):
            outs = [model(inputs()) for _ in range(4)]
        assert [i for i, out in enumerate(outs) if not torch.equal(out, clean)] == hit


# --- what capture can do besides --------------------------------------------------------------------------------------


def test_detach_clone_to_and_map():
    model = make("Mlp")
    with (
        capture(model, "head") as plain,
        capture(model, "head", detach=True) as detached,
        capture(model, "head", clone=True) as cloned,
    ):
        model(inputs())
    assert plain["head"].requires_grad and not detached["head"].requires_grad
    assert detached["head"].data_ptr() == plain["head"].data_ptr() != cloned["head"].data_ptr()
    with capture(model, "*", to=torch.float64) as acts, capture(model, "head", to=("cpu", torch.float16)) as half:
        model(inputs())
    assert {value.dtype for value in acts.values()} == {torch.float64}
    assert half["head"].dtype == torch.float16
    with capture(model, "*", map=lambda value: value.mean(0)) as acts:
        model(inputs())
    assert acts["head"].shape == (2,)
    with capture(model, "blocks.*", map=lambda value, site: (str(site), value.norm())) as acts:
        model(inputs())
    assert acts["blocks.2"][0] == "blocks.2"


def test_stop_ends_the_forward_when_all_was_seen():
    model = make("Mlp")
    calls = []
    model.head.register_forward_hook(lambda *args: calls.append(args))
    with capture(model, "embed", "blocks.1", stop=True) as acts:
        assert model(inputs()) is None
        assert model(inputs()) is None
    assert list(acts) == ["embed", "blocks.1"] and not calls
    with capture(model, "embed") as outer, capture(model, "blocks.0", stop=True) as acts:
        assert model(inputs()) is None
    assert list(outer) == ["embed"]
    thrice = make("Thrice")
    with capture(thrice, "block#1", stop=True) as acts:
        assert thrice(inputs()) is None
    assert list(acts) == ["block#1"]
    with capture(model, "**", stop=True):
        assert model(inputs()) is None


def test_stop_inside_a_transform():
    model = make("Mlp")

    def head_input(x):
        with capture(model, "blocks.2", stop=True) as acts:
            model(x)
        return acts["blocks.2"]

    with capture(model, "blocks.2") as acts:
        model(inputs())
    assert torch.allclose(torch.vmap(head_input)(inputs()), acts["blocks.2"], atol=1e-6)


def test_edit_sees_the_site_and_may_leave_the_value():
    model = make("Mlp")
    clean = model(inputs())
    seen = []

    def note(value, *, site):
        seen.append((site.name, str(site), site.module))

    with edit(model, ["blocks.*", "head@input[0]"], note):
        assert torch.equal(model(inputs()), clean)
    assert seen == [(f"blocks.{i}", f"blocks.{i}", model.blocks[i]) for i in range(3)] + [
        ("head", "head@input[0]", model.head)
    ]
