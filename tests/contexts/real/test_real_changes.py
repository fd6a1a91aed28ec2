"""Real models: values, arguments and parameters are changed as hand-written hooks change them."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
from by_hooks import (
    changed_by_hook,
    on_residual,
    put,
    same,
    state_of,
)
from gallery.architectures import ARCHITECTURES, answer, gpt2, llama, t5, tokens
from torch import Tensor

from nicehooks import (
    ablate,
    capture,
    edit,
    patch,
    steer,
    suspend,
)

# --- changing values --------------------------------------------------------------------------------------------------


def test_the_residual_stream_of_another_run_gives_that_runs_answer(arch, model):
    here, there = arch.inputs(1), arch.inputs(2)
    with capture(model, arch.blocks[-1]) as acts:
        expected = answer(model(**there))
    with patch(model, acts):
        assert torch.equal(answer(model(**here)), expected)
    assert not torch.equal(answer(model(**here)), expected)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(
    ("subscript", "change", "by_hand"),
    [
        ("[:, -1]", lambda m, path: ablate(m, path), lambda x: put(x, (slice(None), -1), 0.0)),
        ("[:, 2:4]", lambda m, path: ablate(m, path, value=1.5), lambda x: put(x, (slice(None), slice(2, 4)), 1.5)),
        ("[0]", lambda m, path: edit(m, path, torch.neg), lambda x: put(x, 0, -x[0])),
        ("[1, 3, ::5]", lambda m, path: patch(m, path, 7), lambda x: put(x, (1, 3, slice(None, None, 5)), 7.0)),
        ("[..., 3]", lambda m, path: edit(m, path, torch.abs), lambda x: put(x, (..., 3), x[..., 3].abs())),
        ("", lambda m, path: steer(m, path, torch.arange(32.0), scale=0.25), lambda x: x + 0.25 * torch.arange(32.0)),
    ],
    ids=["ablate position", "ablate positions", "edit example", "patch numbers", "edit feature", "steer"],
)
def test_a_change_of_the_residual_stream_is_what_a_hook_does(arch, model, layer, subscript, change, by_hand):
    inputs, block = arch.inputs(1), arch.blocks[layer]
    with changed_by_hook(model, *on_residual(block, by_hand)):
        expected = model(**inputs)
    with capture(model, block) as clean:
        model(**inputs)
    with change(model, f"{block}{subscript}"), capture(model, block) as changed:
        output = model(**inputs)
    assert same(output, expected)
    assert not torch.equal(changed[block], clean[block])


@pytest.mark.parametrize("head", range(4))
def test_ablating_a_head_is_what_a_hook_does(arch, model, head):
    inputs = arch.inputs(1)
    with changed_by_hook(
        model, arch.heads.partition("@")[0], lambda x: put(x, (..., slice(8 * head, 8 * head + 8)), 0.0), where="input"
    ):
        expected = model(**inputs)
    with ablate(model, f"{arch.heads}[:, :, {head}]"):
        output = model(**inputs)
    assert same(output, expected)
    assert not torch.equal(answer(output), answer(model(**inputs)))


def test_changes_add_up_in_the_order_in_which_they_were_entered(arch, model):
    inputs, block = arch.inputs(1), arch.blocks[0]

    def double_then_shift(value: Tensor) -> Tensor:
        return value * 2 + 1

    with changed_by_hook(model, *on_residual(block, double_then_shift)):
        expected = model(**inputs)
    with edit(model, block, lambda value: value * 2), capture(model, block) as between:
        with steer(model, block, torch.ones(32)), capture(model, block) as after:
            output = model(**inputs)
    assert same(output, expected)
    assert same(after[block], between[block] + 1)


def test_suspend_shows_the_clean_model(arch, model):
    inputs = arch.inputs(1)
    expected = model(**inputs)
    with ablate(model, *arch.blocks):
        with suspend(model):
            assert same(model(**inputs), expected)
        assert not same(model(**inputs), expected)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed_by", ["keyword", "position"])
@pytest.mark.parametrize("spelled_by", ["keyword", "position"])
def test_the_input_of_the_model_is_found_however_it_is_passed(arch, model, passed_by, spelled_by):
    here, there = arch.inputs(1), arch.inputs(2)
    name = next(iter(here))
    rest = {key: value for key, value in here.items() if key != name}
    path = f"@input['{name}']" if spelled_by == "keyword" else "@input[0]"
    expected = model(**{**here, name: there[name]})
    with patch(model, path, there[name]), capture(model, "@input") as acts:
        output = model(**here) if passed_by == "keyword" else model(here[name], **rest)
    assert same(output, expected)
    assert same(dict(acts["@input"]), {**here, name: there[name]})


def test_an_argument_that_only_keywords_bring():
    model, ids = ARCHITECTURES["llama"].build(), tokens(1)

    def by_hand(module: Any, args: Any, kwargs: Any) -> Any:
        assert not args  # LlamaAttention is called with keywords alone
        return args, {**kwargs, "hidden_states": put(kwargs["hidden_states"], (slice(None), -1), 0.5)}

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(by_hand, with_kwargs=True)
    expected = model(ids)
    handle.remove()
    for path in ("model.layers.1.self_attn@input['hidden_states'][:, -1]", "model.layers.1.self_attn@input[0][:, -1]"):
        with patch(model, path, 0.5):
            assert same(model(ids), expected)
    assert not same(model(ids), expected)


def test_an_attention_mask_that_keywords_bring():
    model, ids = ARCHITECTURES["llama"].build(), tokens(1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with capture(model, "model.layers.*@input['attention_mask']") as masked:
        expected = model(ids, attention_mask=mask, position_ids=torch.arange(7)[None])
    with patch(model, masked), capture(model, "model.layers.*@input['attention_mask']") as again:
        output = model(ids)
    assert same(output["logits"], expected["logits"])
    assert all(same(again[key], masked[key]) for key in masked)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_argument_that_nobody_passed_has_its_default(name):
    model, ids = ARCHITECTURES[name].build(), tokens(1)
    with edit(model, "@input['logits_to_keep']", lambda number: number + 2):
        output = model(ids)
    assert output["logits"].shape == (3, 2, 97)
    assert same(output["logits"], model(ids, logits_to_keep=2)["logits"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("passed_by", ["keyword", "position", "keyword in another order"])
def test_a_number_is_the_position_of_an_argument_in_the_signature(name, passed_by):
    """Whatever else the caller passed, and in whatever order: the number and the name find the same argument."""
    model, ids = ARCHITECTURES[name].build(), tokens(1)
    mask, positions = torch.ones_like(ids), torch.arange(7).expand(3, 7)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    names = list(inspect.signature(model.forward).parameters)
    last = max(map(names.index, given))
    for place, argument in enumerate(names[: last + 1]):
        with capture(model, f"@input[{place}]") as by_number, capture(model, f"@input['{argument}']") as by_name:
            if passed_by == "keyword":
                model(**given)
            elif passed_by == "position":
                model(*(given.get(one) for one in names[: last + 1]))
            else:
                model(**dict(reversed(given.items())))
        assert by_name[f"@input['{argument}']"] is given.get(argument)
        assert by_number[f"@input[{place}]"] is given.get(argument)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_every_parameter_is_what_functional_call_makes_of_it(arch, model):
    """Under the first name that PyTorch knows; every other name is below."""
    inputs = arch.inputs(1)
    clean, before = answer(model(**inputs)), state_of(model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        value = torch.randn(parameter.shape, generator=generator)
        expected = torch.func.functional_call(model, {name: value}, (), inputs, tie_weights=True)
        with patch(model, f"{owner}@{own_name}", value), capture(model, f"{owner}@{own_name}") as acts:
            output = model(**inputs)
        assert same(output, expected), name
        assert same(acts[f"{owner}@{own_name}"], value), name
        with patch(model, f"{owner}@{own_name}", parameter.detach().clone()):
            assert torch.equal(answer(model(**inputs)), clean), name
    assert state_of(model) == before


TIED = {
    "gpt2": (gpt2, ["transformer.wte", "lm_head"]),
    "llama": (partial(llama, tie_word_embeddings=True), ["model.embed_tokens", "lm_head"]),
    "t5": (t5, ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize(("name", "owner"), [(name, owner) for name, (_, owners) in TIED.items() for owner in owners])
def test_tied_embeddings_are_patched_under_each_name(name, owner):
    make, owners = TIED[name]
    torch.manual_seed(0)
    model, inputs = make().eval(), ARCHITECTURES[name].inputs(1)
    weight = model.get_submodule(owner).weight
    assert all(model.get_submodule(other).weight is weight for other in owners)
    value = torch.randn(97, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)

    by_hand = copy.deepcopy(model)
    by_hand.get_submodule(owner).weight.data.copy_(value.detach())
    expected = by_hand(**inputs)
    answer(expected).square().mean().backward()

    before = state_of(model)
    with patch(model, f"{owner}@weight", value):
        inside = {other: model.get_submodule(other).weight for other in owners}
        output = model(**inputs)
        answer(output).square().mean().backward()
    assert same(answer(output), answer(expected))
    assert torch.equal(value.grad, by_hand.get_submodule(owner).weight.grad)
    assert weight.grad is None
    assert all(other is weight for other in inside.values())  # nothing is swapped outside of a forward
    assert state_of(model) == before


def test_one_row_of_a_tied_embedding():
    model, ids = gpt2().eval(), tokens(1)
    token = int(ids[0, 3])
    by_hand = copy.deepcopy(model)
    by_hand.lm_head.weight.data[token] = 0.0
    with ablate(model, f"lm_head@weight[{token}]"):
        output = model(ids)
    assert same(output["logits"], by_hand(ids)["logits"])
    assert not same(output["logits"], model(ids)["logits"])


@pytest.mark.parametrize(
    ("name", "owner", "buffer"),
    [("llama", "model.rotary_emb", "inv_freq"), ("bert", "embeddings", "token_type_ids")],
)
def test_a_buffer_is_patched(name, owner, buffer):
    arch = ARCHITECTURES[name]
    model, inputs = arch.build(), arch.inputs(1)
    value = getattr(model.get_submodule(owner), buffer)
    new = torch.ones_like(value) if not value.is_floating_point() else value * 3
    by_hand = copy.deepcopy(model)
    getattr(by_hand.get_submodule(owner), buffer).copy_(new)
    with patch(model, f"{owner}@{buffer}", new):
        output = model(**inputs)
    assert same(answer(output), answer(by_hand(**inputs)))
    assert not same(answer(output), answer(model(**inputs)))
