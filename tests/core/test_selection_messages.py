"""What is said where a path selects nothing: what is near, and the line to write, where there is no doubt."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from gallery.gpt import GPT
from torch import nn

from nicehooks import (
    NiceHooksError,
    SiteNotFound,
    ablate,
    capture,
    edit,
    patch,
    select,
    steer,
)

MODEL = GPT()
BLOCKS = [f"transformer.h.{i}" for i in range(12)]


NOTHING: dict[str, tuple[nn.Module, Any, str]] = {
    "a number too large": (
        MODEL.transformer,
        "h.33",
        """\
no module matches 'h.33' in Transformer.
  nearest names: h.0 … h.11""",
    ),
    "another family's name": (
        MODEL,
        "blocks.3",
        """\
no module matches 'blocks.3' in GPT.
  nearest names: transformer.h.0 … transformer.h.11
    select(model, "blocks.3")         # incorrect
    select(model, "transformer.h.3")  # correct""",
    ),
    "another family's wildcard": (
        MODEL,
        "blocks.*",
        """\
no module matches 'blocks.*' in GPT.
  nearest names: transformer.h.0 … transformer.h.11
    select(model, "blocks.*")         # incorrect
    select(model, "transformer.h.*")  # correct""",
    ),
    "a missing prefix": (
        MODEL,
        "h.3.attn@input[0]",
        """\
no module matches 'h.3.attn@input[0]' in GPT.
  nearest names: transformer.h.0.attn … transformer.h.11.attn
    select(model, "h.3.attn@input[0]")              # incorrect
    select(model, "transformer.h.3.attn@input[0]")  # correct""",
    ),
    "a parameter by its name in a state_dict": (
        MODEL,
        "transformer.h.3.attn.c_proj.weight[0]",
        """\
no module matches 'transformer.h.3.attn.c_proj.weight[0]' in GPT.
  weight is a parameter or buffer of 'transformer.h.3.attn.c_proj', and no module in it:
    select(model, "transformer.h.3.attn.c_proj.weight[0]")  # incorrect
    select(model, "transformer.h.3.attn.c_proj@weight[0]")  # correct""",
    ),
    "an input as an attribute": (
        MODEL,
        "transformer.h.3.input[:, -1]",
        """\
no module matches 'transformer.h.3.input[:, -1]' in GPT.
  input is a value of 'transformer.h.3', and no module in it:
    select(model, "transformer.h.3.input[:, -1]")     # incorrect
    select(model, "transformer.h.3@input[0][:, -1]")  # correct""",
    ),
    "a misspelt child": (
        MODEL,
        "transformer.h.3.mpl[:, -1]",
        """\
no module matches 'transformer.h.3.mpl[:, -1]' in GPT.
  nearest names: transformer.h.0.mlp … transformer.h.11.mlp
    select(model, "transformer.h.3.mpl[:, -1]")  # incorrect
    select(model, "transformer.h.3.mlp[:, -1]")  # correct""",
    ),
    "a prefix too much": (
        MODEL.transformer,
        "model.transformer.h.3.mlp",
        """\
no module matches 'model.transformer.h.3.mlp' in Transformer.
  nearest names: h.0.mlp … h.11.mlp
    select(model, "model.transformer.h.3.mlp")  # incorrect
    select(model, "h.3.mlp")                    # correct""",
    ),
    "another case": (
        MODEL,
        "Transformer.H.3",
        """\
no module matches 'Transformer.H.3' in GPT.
  nearest names: transformer.h.0 … transformer.h.11
    select(model, "Transformer.H.3")  # incorrect
    select(model, "transformer.h.3")  # correct""",
    ),
    "one of several alternatives": (
        MODEL,
        "transformer.h.{0,3,33}",
        """\
no module matches 'transformer.h.33' in GPT.
  nearest names: transformer.h.0 … transformer.h.11""",
    ),
    "a range that is too long": (
        MODEL,
        "transformer.h.{10..13}",
        """\
no module matches 'transformer.h.12' in GPT.
  nearest names: transformer.h.0 … transformer.h.11""",
    ),
    "a word that is like no name": (MODEL, "vision_tower", "no module matches 'vision_tower' in GPT."),
    "a number of another list": (MODEL, "experts.3", "no module matches 'experts.3' in GPT."),
    "one of many, without its number": (
        MODEL,
        "attn",
        """\
no module matches 'attn' in GPT.
  nearest names: transformer.h.0.attn … transformer.h.11.attn""",
    ),
    "another word for it": (
        MODEL,
        "transformer.h.3.self_attn",
        """\
no module matches 'transformer.h.3.self_attn' in GPT.
  nearest names: transformer.h.0.attn … transformer.h.11.attn""",
    ),
    "the opposite word": (
        nn.ModuleDict({"decoder": nn.Linear(2, 2)}),
        "encoder",
        "no module matches 'encoder' in ModuleDict.\n  nearest names: decoder",
    ),
    "a layer that is numbered in its name": (
        nn.ModuleDict({"layer1": nn.Linear(2, 2)}),
        "layer5",
        "no module matches 'layer5' in ModuleDict.\n  nearest names: layer1",
    ),
    "a part of a transformer": (
        MODEL,
        "resid_post[5][:, -1]",
        """\
no module matches 'resid_post[5][:, -1]' in GPT.
  resid_post is a part of a transformer, which anatomy(model) finds:
    select(model, "resid_post[5][:, -1]")               # incorrect
    select(model, anatomy(model).resid_post[5][:, -1])  # correct""",
    ),
    "a hook point of a transformer": (
        MODEL,
        "blocks.5.attn.hook_attn_scores",
        """\
no module matches 'blocks.5.attn.hook_attn_scores' in GPT.
  scores is a part of a transformer, which anatomy(model) finds:
    select(model, "blocks.5.attn.hook_attn_scores")  # incorrect
    select(model, anatomy(model).scores[5])          # correct""",
    ),
    "the hook points of all layers": (
        MODEL,
        "blocks.*.hook_resid_pre",
        """\
no module matches 'blocks.*.hook_resid_pre' in GPT.
  resid_pre is a part of a transformer, which anatomy(model) finds:
    select(model, "blocks.*.hook_resid_pre")  # incorrect
    select(model, anatomy(model).resid_pre)   # correct""",
    ),
    "a hook point that is no part": (
        MODEL,
        "blocks.0.ln1.hook_normalized",
        """\
no module matches 'blocks.0.ln1.hook_normalized' in GPT.
  it is the name of a hook point, as hooked(model) of nicehooks.hookpoints has them:
    hooked(model).run_with_cache(…)[1]["blocks.0.ln1.hook_normalized"]""",
    ),
    "one of two names": (
        MODEL,
        ["lm_head", "lmhead"],
        """\
no module matches 'lmhead' in GPT.
  nearest names: lm_head
    select(model, "lmhead")   # incorrect
    select(model, "lm_head")  # correct""",
    ),
    "a model without children": (nn.Linear(2, 2), "fc", "no module matches 'fc' in Linear."),
    "a list": (
        MODEL,
        "transformer.h",
        "'transformer.h' is a ModuleList, which is never called itself.\n  its children: 'transformer.h.*'",
    ),
    "a part of a list": (
        MODEL,
        "transformer.h[0]",
        "'transformer.h' is a ModuleList, which is never called itself.\n  its children: 'transformer.h.*[0]'",
    ),
    "a parameter that is not there": (
        MODEL,
        "transformer.h.3.mlp@wieght",
        "module 'transformer.h.3.mlp' (Linear) has no parameter 'wieght'; it has: weight, bias.",
    ),
    "a parameter that is None": (
        MODEL,
        "lm_head@bias",
        "module 'lm_head' (Linear) has no parameter 'bias'; it has: weight.",
    ),
    "a parameter of a module that has none": (
        MODEL,
        "transformer.h.3@weight",
        "module 'transformer.h.3' (Block) has no parameter 'weight'; it has: none of its own.",
    ),
    "a type": (MODEL, nn.LSTM, "LSTM selects no module that is ever called in GPT."),
    "a type that is no module": (MODEL, int, "int selects no module that is ever called in GPT."),
    "a regular expression": (
        MODEL,
        re.compile("blocks"),
        "re.compile('blocks') selects no module that is ever called in GPT.",
    ),
    "a predicate": (MODEL, lambda name, module: False, "<lambda> selects no module that is ever called in GPT."),
    "a module of another model": (MODEL, nn.ReLU(), "this ReLU selects no module that is ever called in GPT."),
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_is_selected_the_message_says_what_is_near(case: str) -> None:
    model, where, message = NOTHING[case]
    with pytest.raises(SiteNotFound) as caught:
        select(model, where)
    assert str(caught.value) == message
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, NiceHooksError)


VERBS: dict[str, Any] = {
    'capture(model, "{path}")': lambda path: capture(MODEL, path),
    'ablate(model, "{path}")': lambda path: ablate(MODEL, path),
    'patch(model, "{path}", …)': lambda path: patch(MODEL, path, 0.0),
    'edit(model, "{path}", …)': lambda path: edit(MODEL, path, lambda value: value),
    'steer(model, "{path}", …)': lambda path: steer(MODEL, path, torch.zeros(4)),
}


@pytest.mark.parametrize("call", VERBS)
def test_the_line_to_write_is_the_callers_own(call: str) -> None:
    """On entry, with the verb that was used and the arguments that it needs; making the context does nothing."""
    context = VERBS[call]("blocks.3")
    with pytest.raises(SiteNotFound) as caught, context:
        raise AssertionError("not reached")
    wrong, right = call.format(path="blocks.3"), call.format(path="transformer.h.3")
    assert str(caught.value).splitlines()[2:] == [f"    {wrong:<{len(right)}}  # incorrect", f"    {right}  # correct"]


def test_a_path_that_matches_nothing_raises_beside_good_ones() -> None:
    """And leaves nothing behind."""
    before = [dict(vars(module)) for module in MODEL.modules()]
    with pytest.raises(SiteNotFound), capture(MODEL, "**", "lm_head", "nope"):
        raise AssertionError("not reached")
    with pytest.raises(SiteNotFound), patch(MODEL, {"lm_head": 0.0, "nope": 0.0}):
        raise AssertionError("not reached")
    assert [dict(vars(module)) for module in MODEL.modules()] == before


def test_alternatives_are_strict_where_wildcards_are_not() -> None:
    """Each alternative of a brace has to match; a wildcard may match anything, but not nothing."""
    assert list(map(str, select(MODEL, "transformer.h.{0,1}*.mlp"))) == [
        f"transformer.h.{i}.mlp" for i in (0, 1, 10, 11)
    ]
    assert list(map(str, select(MODEL, "{transformer.*,lm_head}"))) == ["transformer.wte", "lm_head"]
    with pytest.raises(SiteNotFound, match=r"'transformer\.h\.12\*\.mlp'"):
        select(MODEL, "transformer.h.{0,12}*.mlp")
    with pytest.raises(SiteNotFound, match=r"'blocks\.\*'"):
        select(MODEL, "{transformer.*,blocks.*}")


def test_a_line_that_is_called_correct_selects_what_was_meant() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ModuleList([nn.Identity()]))
    model.register_parameter("input", nn.Parameter(torch.zeros(2)))
    rights = {"0.running_mean": "0@running_mean", "0.output[0]": "0[0]", "0.grad": "0@grad", "input": "@\\input"}
    for wrong, right in rights.items():
        with pytest.raises(SiteNotFound, match=re.escape(f'select(model, "{right}")')):
            select(model, wrong)
        assert list(map(str, select(model, right))) == [right]
    for wrong in ("output", "1.output", "0.weight@grad", "0.weight#1"):  # of what is never called, and of nothing
        with pytest.raises(SiteNotFound, match=r"^(?s:(?!.*correct))"):
            select(model, wrong)
