"""Real models, trained ones too: what contexts show and change is what hand-written hooks do, exactly."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from by_hooks import arguments_by_hooks, changed_by_hook, on_residual, one_thread, outputs_by_hooks, put, same, state_of
from gallery.architectures import ARCHITECTURES, Architecture, answer, gpt2, llama, t5, tokens
from gallery.trained import Gated, minilm, silero_vad, smollm2, voice_encoder
from torch import Tensor, nn

from nicehooks import (
    KEEP,
    CheckpointWarning,
    SiteNotFound,
    UnsupportedModule,
    ablate,
    capture,
    captured,
    describe,
    edit,
    patch,
    select,
    sites,
    steer,
    suspend,
)

threads = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(params=ARCHITECTURES)
def arch(request: Any) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def model(arch: Architecture) -> Any:
    return arch.build()


def unchanged(value: Any) -> Any:
    return value


# --- capture ----------------------------------------------------------------------------------------------------------


def test_capture_sees_every_call_that_hooks_see(arch, model):
    inputs = arch.inputs(1)
    expected_output, expected = outputs_by_hooks(model, lambda: model(**inputs))
    with capture(model, "**", keep="all") as acts, capture(model, "**#*") as calls:
        output = model(**inputs)
    assert same(output, expected_output)
    assert list(acts) == list(expected)  # the very modules, in the order in which they finished
    for name, values in expected.items():
        assert same(list(acts[name]), values), name
        assert all(same(calls[f"{name}#{number}"], value) for number, value in enumerate(values)), name
    assert len(calls) == sum(map(len, expected.values()))


@pytest.mark.parametrize(("keep", "index"), [("first", 0), ("last", -1)])
def test_capture_keeps_the_call_that_was_asked_for(arch, model, keep, index):
    inputs = arch.inputs(1)
    _, expected = outputs_by_hooks(model, lambda: model(**inputs))
    with capture(model, "**", keep=keep) as acts:
        model(**inputs)
    assert {name for name in expected if not same(acts[name], expected[name][index])} == set()


def test_captured_values_are_the_models_own_tensors(arch, model):
    with capture(model, "**", keep="all") as acts:
        _, expected = outputs_by_hooks(model, lambda: model(**arch.inputs(1)))
    for name, values in expected.items():
        assert all(mine is theirs for mine, theirs in zip(acts[name], values, strict=True)), name


def test_capture_sees_every_argument_however_it_was_passed(arch, model):
    inputs = arch.inputs(1)
    expected = arguments_by_hooks(model, lambda: model(**inputs))
    with capture(model, "**@input", keep="all") as acts:
        model(**inputs)
    assert {f"{name}@input" for name in expected} == set(acts)
    for name, calls in expected.items():
        for arguments, bound in zip(acts[f"{name}@input"], calls, strict=True):
            given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
            given.pop("kwargs", None)
            assert set(arguments) == set(given), name
            assert all(same(arguments[key], value) for key, value in given.items()), name
            assert same(acts.calls(f"{name}@input[0]")[0], next(iter(calls[0].arguments.values()))), name


def test_sites_lists_what_a_run_calls(arch, model):
    inputs = arch.inputs(1)
    _, expected = outputs_by_hooks(model, lambda: model(**inputs))
    table = sites(model, **inputs)
    assert {record.path: record.calls for record in table if record.calls} == {n: len(v) for n, v in expected.items()}
    silent = {record.path for record in table if not record.calls}
    assert silent == {n for n, m in model.named_modules() if type(m).forward is not nn.Module.forward} - set(expected)


def test_capture_stops_the_forward_after_the_last_site(arch, model):
    inputs, (early, late) = arch.inputs(1), (arch.blocks[0], arch.blocks[-1])
    with capture(model, early) as whole:
        model(**inputs)
    with capture(model, "**", keep="all") as run, capture(model, early, stop=True) as acts:
        assert model(**inputs) is None
    assert same(acts[early], whole[early])
    assert not any(late.startswith(name) for name in run)  # neither the last block nor what contains it


# --- law 1: identity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["**", "**@input", "**#*"])
def test_an_edit_that_returns_its_input_changes_nothing(arch, model, where):
    inputs = arch.inputs(1)
    expected = model(**inputs)
    with edit(model, where, unchanged):
        assert same(model(**inputs), expected)
    with edit(model, where, lambda value: None):
        assert same(model(**inputs), expected)


def test_patching_with_what_was_captured_changes_nothing(arch, model):
    inputs = arch.inputs(1)
    with capture(model, "**#*") as acts:
        expected = model(**inputs)
    with patch(model, acts), capture(model, "**#*") as again:
        assert same(model(**inputs), expected)
    assert list(again) == list(acts)
    assert all(same(again[key], acts[key]) for key in acts)


def test_writing_a_part_back_changes_nothing(arch, model):
    inputs = arch.inputs(1)
    parts = [arch.heads, f"{arch.heads}[:, :, 2]", *(f"{block}[:, 1:4:2]" for block in arch.blocks)]
    with capture(model, parts) as acts:
        expected = model(**inputs)
    with patch(model, {path: value.clone() for path, value in acts.items()}):
        assert same(model(**inputs), expected)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])  # there is no dropout in a Llama
def test_dropout_draws_the_same_numbers_in_a_context(name):
    arch = ARCHITECTURES[name]
    model, inputs = arch.build().train(), arch.inputs(1)
    torch.manual_seed(5)
    expected = model(**inputs)
    torch.manual_seed(5)
    with capture(model, "**"), edit(model, "**@input", unchanged):
        output = model(**inputs)
    assert same(output, expected)
    assert not same(output, model(**inputs))  # so there was something to draw


# --- law 2: restoration -----------------------------------------------------------------------------------------------


def every_context(arch: Architecture, model: Any) -> list[Any]:
    block = arch.blocks[0]
    return [
        capture(model, "**", keep="all"),
        capture(model, "**@input"),
        capture(model, "**@weight"),
        edit(model, "**", unchanged),
        edit(model, f"{block}[:, -1]", torch.neg),
        ablate(model, f"{arch.heads}[:, :, 0]"),
        steer(model, block, torch.ones(32)),
        patch(model, {f"{on_residual(block, abs)[0]}@input[0]": 0.5}),
        suspend(model),
    ]


def test_a_context_leaves_no_trace(arch, model):
    inputs = arch.inputs(1)
    expected = model(**inputs)
    before = state_of(model)
    for context in every_context(arch, model):
        with context:
            assert state_of(model) != before or isinstance(context, suspend)
            model(**inputs)
        assert state_of(model) == before, context
    assert same(model(**inputs), expected)


def test_a_context_leaves_no_trace_after_an_error_inside_the_model(arch, model):
    inputs = arch.inputs(1)
    expected = model(**inputs)
    before = state_of(model)
    for context in every_context(arch, model):
        with pytest.raises(ZeroDivisionError), context, edit(model, arch.blocks[-1], lambda value: 1 / 0):
            model(**inputs)
        assert state_of(model) == before, context
    assert same(model(**inputs), expected)


def test_contexts_left_out_of_order_leave_no_trace(arch, model):
    inputs = arch.inputs(1)
    expected = model(**inputs)
    before = state_of(model)
    handles = [context.attach() for context in every_context(arch, model)]
    changed = model(**inputs)
    for handle in handles[::2] + handles[1::2]:
        handle.remove()
    assert state_of(model) == before
    assert not describe(model)
    assert same(changed, expected)  # `suspend` came last
    assert same(model(**inputs), expected)


def test_a_model_copied_inside_a_context_is_clean(arch, model):
    inputs, file = arch.inputs(1), io.BytesIO()
    expected = answer(model(**inputs))
    copies: list[Any] = []
    with ablate(model, *arch.blocks), patch(model, f"{arch.heads.partition('@')[0]}@weight", 0.0):
        assert not torch.equal(answer(model(**inputs)), expected)
        torch.save(model, file)
        file.seek(0)
        copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        assert all(torch.equal(answer(clean(**inputs)), expected) for clean in copies)
    for clean in copies:
        assert [names_of(module) for module in clean.modules()] == [names_of(module) for module in model.modules()]
        assert torch.equal(answer(clean(**inputs)), expected)


def names_of(module: nn.Module) -> tuple[type, set[str], type, type]:
    return type(module), set(vars(module)), type(module._parameters), type(module._buffers)


def test_a_model_saved_inside_a_context_is_clean(arch, model, tmp_path):
    """`save_pretrained` tells tied weights by their storage, and writes what `state_dict` says."""
    inputs = arch.inputs(1)
    expected = answer(model(**inputs))
    with ablate(model, *arch.blocks, "**@weight"):
        assert not torch.equal(answer(model(**inputs)), expected)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(answer(loaded(**inputs)), expected)


def test_the_signature_of_forward_is_what_it_was(arch, model):
    modules = [module for module in model.modules() if type(module).forward is not nn.Module.forward]
    before = [inspect.signature(module.forward) for module in modules]
    with edit(model, "**", unchanged), capture(model, "**@input"):
        during = [inspect.signature(module.forward) for module in modules]
        documented = model.forward.__doc__
        model(**arch.inputs(1))
    assert during == before
    assert documented == type(model).forward.__doc__


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


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_gradients_reach_captured_values(arch, model):
    inputs = arch.inputs(1)
    kept: list[Tensor] = []
    for block in arch.blocks:
        name, hook = on_residual(block, lambda value: kept.append(value) or value.retain_grad() or value)
        with changed_by_hook(model, name, hook):
            answer(model(**inputs)).square().mean().backward()
    with capture(model, arch.blocks) as acts:
        output = model(**inputs)
    gradients = torch.autograd.grad(answer(output).square().mean(), acts.values())
    for gradient, by_hand in zip(gradients, kept, strict=True):
        assert torch.equal(gradient, by_hand.grad)
        assert gradient.any()


def test_gradients_reach_patched_values_and_no_further(arch, model):
    inputs, block = arch.inputs(1), arch.blocks[0]
    value, by_hand = torch.ones(32, requires_grad=True), torch.ones(32, requires_grad=True)
    with changed_by_hook(model, *on_residual(block, lambda x: put(x, (slice(None), slice(None)), by_hand))):
        answer(model(**inputs)).square().mean().backward()
    model.zero_grad()
    with patch(model, block, value):
        answer(model(**inputs)).square().mean().backward()
    assert torch.equal(value.grad, by_hand.grad)
    first = on_residual(block, abs)[0]
    upstream = {n: p.grad for n, p in model.get_submodule(first).named_parameters() if p.grad is not None}
    # the first block of a T5 also makes the position bias of all others
    assert {name for name, gradient in upstream.items() if gradient.any()} <= {
        "layer.0.SelfAttention.relative_attention_bias.weight"
    }


def test_training_inside_a_context(arch):
    """A step of an optimizer inside a context, with one block ablated, is a step of a model with hooks."""
    losses: dict[str, list[float]] = {}
    for way in ("hooks", "contexts"):
        model, inputs = arch.build(), arch.inputs(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ablation = (
            ablate(model, f"{arch.blocks[0]}[:, 0]")
            if way == "contexts"
            else changed_by_hook(model, *on_residual(arch.blocks[0], lambda x: put(x, (slice(None), 0), 0.0)))
        )
        losses[way] = []
        with ablation:
            for _ in range(3):
                optimizer.zero_grad()
                loss = answer(model(**inputs)).square().mean()
                loss.backward()
                optimizer.step()
                losses[way].append(loss.item())
    assert losses["contexts"] == losses["hooks"]
    assert losses["hooks"][0] != losses["hooks"][-1]


def change_inside_a_block(kind: str, arch: Architecture, model: Any) -> Any:
    """A change that is made within a block, so within an activation-checkpointed region."""
    owner = arch.heads.partition("@")[0]
    if kind == "a head":
        return ablate(model, f"{arch.heads}[:, :, 1]")
    if kind == "an input":
        return edit(model, f"{owner}@input[0][:, 1]", torch.neg)
    if kind == "an output":
        return edit(model, f"{owner}[:, 1]", torch.neg)
    if kind == "a first call":
        return edit(model, f"{owner}[:, 1]", torch.neg, calls=0)
    if kind == "a weight":
        return edit(model, f"{owner}@weight", torch.neg)
    # "the last output": after it a block only adds, and backward need not run it to its end again
    block = on_residual(arch.blocks[1], abs)[0]
    with capture(model, "**") as acts:
        model(**arch.inputs(1))
    return edit(model, [name for name in acts if name.startswith(f"{block}.")][-1], torch.neg)


INSIDE_BLOCKS = ["a head", "an input", "an output", "the last output", "a first call", "a weight"]


def without_dropout(model: Any) -> Any:
    """`model` in training mode, where checkpointing acts, but with nothing left to chance."""
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    return model.train()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", INSIDE_BLOCKS)
def test_backward_of_a_checkpointed_model_inside_a_context(arch, use_reentrant, kind):
    """The backward pass runs each block again, under the same context: its edits are made again."""
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model, inputs = without_dropout(arch.build()), {**arch.inputs(1), "use_cache": False}
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        around = edit(model, f"{arch.blocks[0]}[:, 1]", lambda value: value * 2)
        inside = change_inside_a_block(kind, arch, model)
        with around, inside, capture(model, arch.blocks):
            answer(model(**inputs)).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, msg=lambda text, p=parameter: f"{p}: {text}")


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", INSIDE_BLOCKS)
def test_backward_of_a_checkpointed_model_outside_of_the_context_is_warned_of(arch, use_reentrant, kind):
    model, inputs = without_dropout(arch.build()), {**arch.inputs(1), "use_cache": False}
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    change = change_inside_a_block(kind, arch, model)
    with pytest.warns(CheckpointWarning, match="run backward in"), change:
        model(**inputs)
    with capture(model, "**"), edit(model, arch.blocks[0], lambda value: value * 2):  # neither is run again
        loss = answer(model(**inputs)).square().mean()
    loss.backward()


# --- torch.func -------------------------------------------------------------------------------------------------------


def on_example(arch: Architecture, model: Any) -> tuple[Callable[..., Any], Tensor]:
    """`run(f, x)` calls `f` (the model, or what stands for it) on one example, and a batch of such examples."""
    if arch.embeds is None:
        return lambda f, x: f(pixel_values=x[None]), arch.inputs(1)["pixel_values"].double()
    length = 5 if arch.embeds == "decoder_inputs_embeds" else 7
    xs = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    more = {"use_cache": False} if arch is not ARCHITECTURES["bert"] else {}
    more |= {"input_ids": tokens(1, batch=1)} if arch is ARCHITECTURES["t5"] else {}
    return lambda f, x: f(**{arch.embeds: x[None]}, **more), xs


def seen_by_library(arch: Architecture, model: Any) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    run, xs = on_example(arch, model)

    def seen(x: Tensor) -> dict[str, Tensor]:
        output, acts = run(captured(model, *arch.blocks, arch.heads), x)
        return {**acts, "answer": answer(output)}

    return seen, xs


def seen_by_hand(arch: Architecture, model: Any) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    run, xs = on_example(arch, model)

    def seen(x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles: list[Any] = []

        def hook(module: Any, args: Any, output: Any, path: str) -> None:
            found[path] = output[0] if path.endswith("[0]") else output

        for path in arch.blocks:
            module = model.get_submodule(path.removesuffix("[0]"))
            handles.append(module.register_forward_hook(partial(hook, path=path)))
        owner = model.get_submodule(arch.heads.partition("@")[0])
        handles.append(
            owner.register_forward_pre_hook(
                lambda module, args: found.update({arch.heads: args[0].unflatten(-1, (4, 8))})
            )
        )
        output = run(model, x)
        for handle in handles:
            handle.remove()
        return {**found, "answer": answer(output)}

    return seen, xs


def total(values: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sin().sum() for value in values.values()]).sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": lambda f, xs: torch.vmap(f)(xs),
    "grad": lambda f, xs: torch.func.grad(lambda x: total(f(x)))(xs[0]),
    "grad with activations": lambda f, xs: torch.func.grad(lambda x: (total(v := f(x)), v), has_aux=True)(xs[0]),
    "vjp": lambda f, xs: (pair := torch.func.vjp(f, xs[0])) and pair[1](pair[0])[0],
    "jvp": lambda f, xs: torch.func.jvp(f, (xs[0],), (xs[1],)),
    "jacrev": lambda f, xs: torch.func.jacrev(lambda x: {k: v.sum(-1) for k, v in f(x).items()})(xs[0]),
    "jacfwd": lambda f, xs: torch.func.jacfwd(lambda t: f(xs[0] + t * xs[1]))(torch.zeros((), dtype=torch.float64)),
    "vmap of grad": lambda f, xs: torch.vmap(torch.func.grad(lambda x: total(f(x))))(xs),
    "grad of vmap": lambda f, xs: torch.func.grad(lambda rows: total(torch.vmap(f)(rows)))(xs),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_captured_are_those_of_hooks(arch, model, transform):
    model.double()
    results = []
    for make in (seen_by_library, seen_by_hand):
        f, xs = make(arch, model)
        results.append(TRANSFORMS[transform](f, xs))
    mine, by_hand = (torch.utils._pytree.tree_leaves(dict_by_key(result)) for result in results)
    assert len(mine) == len(by_hand) > 0
    assert all(torch.equal(a, b) for a, b in zip(mine, by_hand, strict=True))
    assert any(value.any() for value in mine)


def dict_by_key(tree: Any) -> Any:
    """`tree` with the keys of every dict sorted: caches are in execution order, and here orders differ."""
    if isinstance(tree, dict):
        return {key: dict_by_key(tree[key]) for key in sorted(tree)}
    return tuple(map(dict_by_key, tree)) if isinstance(tree, tuple) else tree


def test_vmap_over_examples_is_a_loop_over_them(arch, model):
    seen, xs = seen_by_library(arch, model.double())
    stacked = torch.vmap(seen)(xs)
    for i, x in enumerate(xs):
        alone = seen(x)
        assert stacked.keys() == alone.keys()
        for path, value in alone.items():
            torch.testing.assert_close(stacked[path][i], value, rtol=1e-10, atol=1e-10)


def test_a_context_around_vmap_holds_the_whole_batch(arch, model):
    """Law 5: a cache that was entered outside receives the full batch, with the mapped dimension in front."""
    run, xs = on_example(arch, model.double())
    seen, _ = seen_by_library(arch, model)
    expected = torch.vmap(seen)(xs)
    with capture(model, *arch.blocks, arch.heads) as acts:
        torch.vmap(lambda x: answer(run(model, x)))(xs)
    assert {path: value.shape for path, value in acts.items()} == {p: expected[p].shape for p in acts}
    assert all(torch.equal(value, expected[path]) for path, value in acts.items())


@pytest.mark.parametrize("mapped", ["inputs", "patches", "both"])
def test_patches_under_vmap_are_a_loop(arch, model, mapped):
    run, xs = on_example(arch, model.double())
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def patched(x: Tensor, value: Tensor) -> Tensor:
        with patch(model, f"{arch.blocks[0]}[:, 2]", value):
            return answer(run(model, x))

    dims = {"inputs": (0, None), "patches": (None, 0), "both": (0, 0)}[mapped]
    rows = [(xs[i] if dims[0] == 0 else xs[0], values[i] if dims[1] == 0 else values[0]) for i in range(3)]
    result = torch.vmap(patched, in_dims=dims)(xs if dims[0] == 0 else xs[0], values if dims[1] == 0 else values[0])
    torch.testing.assert_close(result, torch.stack([patched(*row) for row in rows]), rtol=1e-10, atol=1e-10)
    assert not torch.equal(result[0], result[1])


def test_the_gradient_with_respect_to_a_steering_vector(arch, model):
    """Through `torch.func.grad`, against autograd through a hand-written hook."""
    run, xs = on_example(arch, model.double())
    block, vector = arch.blocks[0], torch.full((32,), 0.1, dtype=torch.float64)

    def loss(vector: Tensor) -> Tensor:
        with steer(model, block, vector, scale=2.0):
            return answer(run(model, xs[0])).square().sum()

    by_hand = vector.clone().requires_grad_()
    with changed_by_hook(model, *on_residual(block, lambda value: value + 2.0 * by_hand)):
        answer(run(model, xs[0])).square().sum().backward()
    gradient = torch.func.grad(loss)(vector)
    assert torch.equal(gradient, by_hand.grad)
    assert gradient.any()


def test_a_parameter_patch_under_vmap_is_an_ensemble(arch, model):
    run, xs = on_example(arch, model.double())
    path = f"{arch.heads.partition('@')[0]}@weight"
    (site,) = select(model, path)
    weights = torch.stack([site.module.weight.detach() * scale for scale in (0.5, 1.0, 2.0)])

    def member(weight: Tensor) -> Tensor:
        with patch(model, path, weight):
            return answer(run(model, xs[0]))

    expected = torch.stack([member(weight) for weight in weights])
    torch.testing.assert_close(torch.vmap(member)(weights), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(expected[1], answer(run(model, xs[0])))
    assert not torch.equal(expected[0], expected[1])


# --- what transformers itself shows and does --------------------------------------------------------------------------


def test_hidden_states_and_attentions_inside_a_context(arch, model):
    """`output_hidden_states` installs hooks of its own, inside our context at that; both see the same values."""
    inputs = {**arch.inputs(1), "output_hidden_states": True, "output_attentions": True}
    with capture(model, *arch.blocks, "**") as acts:
        output = model(**inputs)
    stack = "decoder_" if "decoder_hidden_states" in output else ""
    # the first hidden state is the embedding; the last one of a language model is there after the last norm
    assert len(output[f"{stack}hidden_states"]) == len(arch.blocks) + 1
    for block, hidden in zip(arch.blocks[:-1], output[f"{stack}hidden_states"][1:-1], strict=True):
        assert acts[block] is hidden
    inside_tuples = {id(leaf) for value in acts.values() if type(value) is tuple for leaf in value}
    assert len(output[f"{stack}attentions"]) == len(arch.blocks)
    assert all(id(attention) in inside_tuples for attention in output[f"{stack}attentions"])
    assert same(model(**inputs), output)


def test_hidden_states_show_what_a_context_changed(arch, model):
    inputs = {**arch.inputs(1), "output_hidden_states": True}
    with ablate(model, arch.blocks[0]):
        output = model(**inputs)
    key = "decoder_hidden_states" if "decoder_hidden_states" in output else "hidden_states"
    assert not output[key][1].any()
    assert model(**inputs)[key][1].any()


def test_hooks_that_transformers_installed_inside_a_context_stay(arch, model):
    """They are not ours: a context undoes only its own work, and the model runs as before."""
    inputs = {**arch.inputs(1), "output_hidden_states": True}
    with capture(model, "**"):
        first = model(**inputs)
    assert not any("forward" in vars(module) for module in model.modules())
    assert same(model(**inputs), first)


def test_attention_weights_are_patched(arch, model):
    """Element 1 of what an attention returns is for show; it can be read, and changing it changes nothing else."""
    attention = next(name for name, _ in model.named_modules() if name.lower().endswith(("attn", "attention")))
    inputs = arch.inputs(1)
    with capture(model, f"{attention}[-1]") as acts:
        expected = model(**inputs)
    weights = acts[f"{attention}[-1]"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    with ablate(model, f"{attention}[-1]"):
        assert same(answer(model(**inputs)), answer(expected))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_in_bfloat16(name, attention):
    torch.manual_seed(0)
    model = {"gpt2": gpt2, "llama": llama}[name](attn_implementation=attention, dtype="bfloat16").eval()
    model = model.to(torch.bfloat16)
    block, ids = ARCHITECTURES[name].blocks[1], tokens(1)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(6))
    with changed_by_hook(model, block, lambda x: put((x.float() + vector).bfloat16(), (slice(None), 0), vector)):
        expected = model(ids)
    with steer(model, block, vector), patch(model, f"{block}[:, 0]", vector), capture(model, block) as acts:
        output = model(ids)
    assert acts[block].dtype == output["logits"].dtype == torch.bfloat16
    assert same(output["logits"], expected["logits"])
    whole = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(8))
    with changed_by_hook(model, block, lambda x: whole.bfloat16()):
        expected = model(ids)
    for change in (patch(model, block, whole), edit(model, block, lambda value: whole)):
        with change:
            assert same(model(ids)["logits"], expected["logits"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_patching_between_modes(arch, model, mode):
    """Values that were captured under one mode stand in under no mode, and the other way round."""
    inputs, block = arch.inputs(1), arch.blocks[0]
    with mode(), capture(model, block) as acts:
        within = model(**inputs)
    with patch(model, acts):
        output = model(**inputs)
    with edit(model, block, lambda value: acts[block]), steer(model, block, acts[block][0, 0] * 0):
        again = model(**inputs)
        answer(again).sum().backward()  # autograd can work with them
    if mode in (torch.no_grad, torch.inference_mode):
        assert same(answer(output), answer(within).clone())
        assert same(answer(again), answer(within).clone())
    with capture(model, block) as plain:
        expected = answer(model(**inputs))
    with mode(), patch(model, {block: plain[block] * 2}), capture(model, block) as seen:
        model(**inputs)
    assert torch.equal(seen[block], (plain[block] * 2).to(seen[block].dtype))
    assert torch.equal(answer(model(**inputs)), expected)


def test_an_encoder_that_is_called_outside_of_the_model():
    model, inputs = ARCHITECTURES["t5"].build(), ARCHITECTURES["t5"].inputs(1)
    encoder = model.get_encoder()
    expected = encoder(inputs["input_ids"])
    with capture(model, "encoder") as acts:
        encoder(inputs["input_ids"])
    assert same(acts["encoder"], expected)
    with ablate(model, "encoder.block.0[0]"), capture(model, "encoder.block.*[0]") as blocks:
        ablated = encoder(inputs["input_ids"])
    assert not blocks["encoder.block.0[0]"].any()
    assert not same(ablated, expected)


class Louder(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 1.5


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_a_forward_that_accelerate_has_rebound(name):
    """`accelerate` puts a `forward` of its own into the module, as it does to offload one: it is called, and stays."""
    arch = ARCHITECTURES[name]
    model, inputs, block = arch.build(), arch.inputs(1), arch.blocks[1]
    clean = model(**inputs)
    add_hook_to_module(model.get_submodule(block), Louder())
    louder, before = model(**inputs), state_of(model)
    with capture(model, arch.blocks, f"{block}@input['hidden_states']", f"{block}@input[0]") as acts:
        assert same(model(**inputs), louder)
    assert same(acts[f"{block}@input[0]"], acts[arch.blocks[0]])
    assert same(acts[f"{block}@input['hidden_states']"], acts[arch.blocks[0]])
    with steer(model, block, torch.ones(32)), capture(model, block) as steered:
        assert not same(model(**inputs), louder)
    assert same(steered[block], acts[block] + 1)
    assert state_of(model) == before
    remove_hook_from_module(model.get_submodule(block))
    assert same(model(**inputs), clean)
    assert not same(answer(louder), answer(clean))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_a_forward_that_accelerate_rebinds_inside_a_context(name):
    """A context undoes only its own work: the other library's forward is still there afterwards, and still works."""
    arch = ARCHITECTURES[name]
    model, inputs, block = arch.build(), arch.inputs(1), arch.blocks[1]
    clean = model(**inputs)
    with steer(model, block, torch.ones(32)), capture(model, block) as steered:
        model(**inputs)
        add_hook_to_module(model.get_submodule(block), Louder())
    with capture(model, block) as louder:
        model(**inputs)
    with ablate(model, arch.blocks[0]):
        model(**inputs)
        with suspend(model), capture(model, block) as again:
            model(**inputs)
    remove_hook_from_module(model.get_submodule(block))
    with capture(model, block) as acts:
        assert same(model(**inputs), clean)
    assert same(steered[block], acts[block] + 1)
    assert same(louder[block], acts[block] * 1.5)
    assert same(again[block], louder[block])


def test_one_name_too_many_is_answered_with_the_right_one():
    model = ARCHITECTURES["gpt2"].build()
    with pytest.raises(SiteNotFound, match=r'capture\(model, "transformer\.h\.\*"\) +# correct'):
        capture(model, "h.*").__enter__()
    with pytest.raises(SiteNotFound, match=r"nearest names: transformer\.h\.0 … transformer\.h\.2"):
        capture(model, "transformer.h.33").__enter__()


# --- SmolLM2: a trained language model --------------------------------------------------------------------------------

# The tokens of "When Mary and John went to the store, John gave a drink to", and of the same with the names exchanged.
CLEAN = torch.tensor([[2427, 5099, 284, 2322, 3514, 288, 260, 4249, 28, 2322, 4502, 253, 5968, 288]])
CORRUPTED = torch.tensor([[2427, 2322, 284, 5099, 3514, 288, 260, 4249, 28, 5099, 4502, 253, 5968, 288]])
MARY, JOHN = 5099, 2322


@pytest.fixture
def smol() -> Any:
    model = smollm2()
    before = state_of(model)
    with torch.no_grad():
        yield model
    assert state_of(model) == before


def preference(output: Any) -> float:
    """How much more likely " Mary" is than " John", in logits."""
    last = output["logits"][0, -1]
    return (last[MARY] - last[JOHN]).item()


@pytest.mark.slow
def test_smollm2_capture_sees_what_hooks_see(smol):
    expected_output, outputs = outputs_by_hooks(smol, lambda: smol(CLEAN))
    arguments = arguments_by_hooks(smol, lambda: smol(CLEAN))
    o_proj = arguments["model.layers.7.self_attn.o_proj"][0].arguments["input"]
    expected = {
        **{f"model.layers.{i}": outputs[f"model.layers.{i}"][0] for i in range(30)},
        "model.layers.7@input[0]": outputs["model.layers.6"][0],
        "model.layers.7.self_attn@input['hidden_states']": outputs["model.layers.7.input_layernorm"][0],
        "model.layers.7.self_attn@input[0][:, -1]": outputs["model.layers.7.input_layernorm"][0][:, -1],
        "model.layers.7.self_attn[0]": outputs["model.layers.7.self_attn"][0][0],
        "model.layers.7.self_attn.o_proj@input[0]": o_proj,
        "model.layers.7.self_attn.o_proj@input[0]/9": o_proj.reshape(1, 14, 9, 64),
        "model.layers.7.self_attn.o_proj@input[0]/9[:, :, 4]": o_proj[..., 256:320],
        "model.layers.7.self_attn.k_proj/3[0, 5, 2]": outputs["model.layers.7.self_attn.k_proj"][0][0, 5, 128:],
        "model.layers.29[:, -1]": outputs["model.layers.29"][0][:, -1],
        "model.layers.29[0, -3]": outputs["model.layers.29"][0][0, -3],
        "model.rotary_emb[1]": outputs["model.rotary_emb"][0][1],
        "model['last_hidden_state']": outputs["model.norm"][0],
        "['logits']": expected_output["logits"],
        "['logits'][:, -1]": expected_output["logits"][:, -1],
        "lm_head": expected_output["logits"],
    }
    with capture(smol, list(expected)) as acts:
        output = smol(CLEAN)
    assert same(output, expected_output)
    assert set(acts) == set(expected)
    assert {path for path in expected if not same(acts[path], expected[path])} == set()
    with capture(smol, "**") as everything:
        smol(CLEAN)
    assert list(everything) == list(outputs)
    assert all(same(everything[name], values[-1]) for name, values in outputs.items())


def smol_changes() -> dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]]:
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    layer = "model.layers.12"
    heads = "model.layers.7.self_attn.o_proj"
    return {
        "patch a position": (
            lambda m: patch(m, f"{layer}[:, -1]", vector),
            (layer, lambda x: put(x, (slice(None), -1), vector)),
        ),
        "ablate a head": (
            lambda m: ablate(m, f"{heads}@input[0]/9[:, :, 4]"),
            (heads, lambda x: put(x, (..., slice(256, 320)), 0.0), "input"),
        ),
        "ablate an mlp": (lambda m: ablate(m, "model.layers.3.mlp"), ("model.layers.3.mlp", torch.zeros_like)),
        "ablate an attention": (
            lambda m: ablate(m, "model.layers.3.self_attn[0]"),
            ("model.layers.3.self_attn", lambda value: (torch.zeros_like(value[0]), *value[1:])),
        ),
        "steer": (lambda m: steer(m, layer, vector, scale=2.0), (layer, lambda x: x + 2.0 * vector)),
        "edit": (
            lambda m: edit(m, f"{layer}[..., ::2]", torch.neg),
            (layer, lambda x: put(x, (..., slice(None, None, 2)), -x[..., ::2])),
        ),
        "edit the answer": (
            lambda m: edit(m, "['logits']", lambda logits: logits.softmax(-1)),
            ("", lambda output: type(output)({**output, "logits": output["logits"].softmax(-1)})),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", smol_changes())
def test_smollm2_changes_are_what_hooks_do(smol, name):
    change, by_hand = smol_changes()[name]
    with changed_by_hook(smol, *by_hand):
        expected = smol(CLEAN)
    with change(smol):
        output = smol(CLEAN)
    assert same(output, expected)
    assert not same(output["logits"], smol(CLEAN)["logits"])


@pytest.mark.slow
def test_smollm2_all_changes_at_once(smol):
    pairs = [pair for name, pair in smol_changes().items() if name != "edit the answer"]
    with ExitStack() as hooks:
        for _, by_hand in pairs:
            hooks.enter_context(changed_by_hook(smol, *by_hand))
        expected = smol(CLEAN)
    handles = [change(smol).attach() for change, _ in pairs]
    output = smol(CLEAN)
    for handle in handles:
        handle.remove()
    assert same(output["logits"], expected["logits"])


@pytest.mark.slow
def test_smollm2_activation_patching_moves_the_answer(smol):
    """The known result: the subject's second mention in the early layers, the last position in the late ones."""
    with capture(smol, "model.layers.*") as clean:
        right = preference(smol(CLEAN))
    wrong = preference(smol(CORRUPTED))
    assert right > 1 > -1 > wrong

    def restored(layer: int, position: int) -> float:
        site = f"model.layers.{layer}[:, {position}]"
        with patch(smol, {site: clean[site]}):
            return (preference(smol(CORRUPTED)) - wrong) / (right - wrong)

    assert restored(5, 9) > 0.5
    assert abs(restored(5, -1)) < 0.1
    assert restored(29, -1) == pytest.approx(1.0, abs=1e-4)
    assert restored(29, 9) == 0.0


@pytest.mark.slow
def test_smollm2_tied_embeddings(smol):
    for owner in ("lm_head", "model.embed_tokens"):
        with ablate(smol, f"{owner}@weight[{MARY}]"), capture(smol, "model.embed_tokens[0, 1]") as acts:
            logits = smol(CLEAN)["logits"]
        assert not acts["model.embed_tokens[0, 1]"].any()  # " Mary" is the second token of the sentence
        assert not logits[..., MARY].any()


# --- MiniLM: a trained encoder ----------------------------------------------------------------------------------------

TEXTS = ["A man is playing a guitar.", "Someone plays an instrument on the stage.", "The stock market fell sharply."]


def sentence_vectors(model: Any, tokenized: Any) -> Tensor:
    """What all-MiniLM-L6-v2 makes of sentences: the mean over their tokens, of length 1."""
    mask = tokenized["attention_mask"][..., None]
    hidden = model(**tokenized).last_hidden_state
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture
def mini() -> Any:
    model, tokenizer = minilm()
    before = state_of(model)
    with torch.no_grad():
        yield model, tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert state_of(model) == before


def test_minilm_capture_sees_what_hooks_see(mini):
    model, batch = mini
    vectors, expected = outputs_by_hooks(model, lambda: sentence_vectors(model, batch))
    arguments = arguments_by_hooks(model, lambda: model(**batch))
    with capture(model, "**", "encoder.layer.3.attention.output.dense@input[0]/12", "**@input") as acts:
        assert same(sentence_vectors(model, batch), vectors)
    assert all(same(acts[name], values[-1]) for name, values in expected.items())
    dense = arguments["encoder.layer.3.attention.output.dense"][0].arguments["input"]
    assert same(acts["encoder.layer.3.attention.output.dense@input[0]/12"], dense.reshape(*dense.shape[:-1], 12, 32))
    assert same(acts["encoder.layer.3@input['hidden_states']"], expected["encoder.layer.2"][0])
    assert same(acts["encoder.layer.5[:, 0]"], expected["encoder.layer.5"][0][:, 0])
    assert same(acts["['pooler_output']"], expected["pooler"][0])
    assert same(acts["['last_hidden_state'][1, :3]"], expected["encoder.layer.5"][0][1, :3])
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]  # it is the trained model


MINI_CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "ablate a head": (
        lambda m: ablate(m, "encoder.layer.3.attention.output.dense@input[0]/12[:, :, 7]"),
        ("encoder.layer.3.attention.output.dense", lambda x: put(x, (..., slice(224, 256)), 0.0), "input"),
    ),
    "ablate a layer's intermediate": (
        lambda m: ablate(m, "encoder.layer.2.intermediate[..., 100:200]", value=0.1),
        ("encoder.layer.2.intermediate", lambda x: put(x, (..., slice(100, 200)), 0.1)),
    ),
    "steer one example": (
        lambda m: steer(m, "encoder.layer.4[1]", torch.linspace(-1, 1, 384), scale=3.0),
        ("encoder.layer.4", lambda x: put(x, 1, x[1] + 3.0 * torch.linspace(-1, 1, 384))),
    ),
    "exchange two examples": (
        lambda m: edit(m, "encoder.layer.0", lambda x: x[[2, 1, 0]]),
        ("encoder.layer.0", lambda x: x[[2, 1, 0]]),
    ),
}


@pytest.mark.parametrize("name", MINI_CHANGES)
def test_minilm_changes_are_what_hooks_do(mini, name):
    model, batch = mini
    change, by_hand = MINI_CHANGES[name]
    with changed_by_hook(model, *by_hand):
        expected = model(**batch)
    with change(model):
        output = model(**batch)
    assert same(output, expected)
    assert not same(output, model(**batch))


# --- Resemblyzer: a trained LSTM with nested tuples -------------------------------------------------------------------


@pytest.fixture
def voice() -> Any:
    model = voice_encoder()
    before = state_of(model)
    yield model, torch.randn(2, 20, 40, generator=torch.Generator().manual_seed(0))
    assert state_of(model) == before
    model.zero_grad(set_to_none=True)


LSTM_PARTS: dict[str, Callable[[Any], Any]] = {
    "lstm": lambda value: value,
    "lstm[0]": lambda value: value[0],
    "lstm[0][:, -1]": lambda value: value[0][:, -1],
    "lstm[1]": lambda value: value[1],
    "lstm[1][0]": lambda value: value[1][0],
    "lstm[1][0][:, -1]": lambda value: value[1][0][:, -1],
    "lstm[1][0][-1]": lambda value: value[1][0][-1],
    "lstm[-1][-1][..., 3:7]": lambda value: value[1][1][..., 3:7],
    "lstm[0]/8[:, :, 5]": lambda value: value[0][..., 160:192],
}


@pytest.mark.parametrize("path", LSTM_PARTS)
def test_the_parts_of_an_lstm(voice, path):
    model, mels = voice
    embeds, expected = outputs_by_hooks(model, lambda: model(mels))
    with capture(model, path) as acts:
        assert same(model(mels), embeds)
    assert same(acts[path], LSTM_PARTS[path](expected["lstm"][0]))
    with edit(model, path, lambda part: part), patch(model, acts):
        assert same(model(mels), embeds)


def test_every_layer_of_an_lstm_is_a_site(voice):
    model, mels = voice
    with capture(model, "lstm[1][*][*]") as acts:
        model(mels)
    assert list(acts) == [f"lstm[1][{i}][{layer}]" for i in range(2) for layer in range(3)]
    assert {value.shape for value in acts.values()} == {(2, 256)}
    with capture(model, "lstm[0][:, -1]") as last:
        model(mels)
    assert same(acts["lstm[1][0][2]"], last["lstm[0][:, -1]"])


@pytest.mark.parametrize(
    ("change", "by_hand"),
    [
        (
            lambda m: ablate(m, "lstm[1][0][-1, :, :128]"),
            lambda value: (value[0], (put(value[1][0], (-1, slice(None), slice(128)), 0.0), value[1][1])),
        ),
        (
            lambda m: edit(m, "lstm[1][0][:, -1]", lambda hidden: hidden * 2),
            lambda value: (value[0], (put(value[1][0], (slice(None), -1), value[1][0][:, -1] * 2), value[1][1])),
        ),
        (
            lambda m: patch(m, "lstm", (KEEP, (0.5, KEEP))),
            lambda value: (value[0], (torch.full_like(value[1][0], 0.5), value[1][1])),
        ),
        (
            lambda m: edit(m, "lstm", lambda value: (value[0] + 1, (-value[1][0], value[1][1]))),
            lambda value: (value[0] + 1, (-value[1][0], value[1][1])),
        ),
        (
            lambda m: ablate(m, "lstm"),
            lambda value: (torch.zeros_like(value[0]), tuple(map(torch.zeros_like, value[1]))),
        ),
    ],
    ids=["ablate half", "edit an example", "patch with a tree", "edit the tree", "ablate the tree"],
)
def test_changes_inside_nested_tuples(voice, change, by_hand):
    model, mels = voice
    with changed_by_hook(model, "lstm", by_hand):
        expected, outputs = outputs_by_hooks(model, lambda: model(mels))
    with change(model), capture(model, "lstm") as acts:
        output = model(mels)
    assert torch.equal(output.nan_to_num(9.0), expected.nan_to_num(9.0))  # an embedding of zeros has no direction
    assert same(acts["lstm"], outputs["lstm"][0])
    assert not torch.equal(output, model(mels))


def test_a_packed_sequence_stays_one(voice):
    """A `PackedSequence` is a named tuple with a constructor of its own."""
    model, mels = voice
    packed = nn.utils.rnn.pack_padded_sequence(mels, torch.tensor([20, 13]), batch_first=True)
    expected = model.lstm(packed)
    with capture(model.lstm, "[0]['data'][..., :8]") as acts, edit(model.lstm, "", unchanged):
        assert same(model.lstm(packed), expected)
    assert same(acts["[0]['data'][..., :8]"], expected[0].data[..., :8])
    with ablate(model.lstm, "[0]['data'][..., 8:]"):
        output, _ = model.lstm(packed)
    assert type(output) is nn.utils.rnn.PackedSequence
    padded, lengths = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    by_hand, _ = nn.utils.rnn.pad_packed_sequence(expected[0], batch_first=True)
    assert lengths.tolist() == [20, 13]
    assert torch.equal(padded, put(by_hand, (..., slice(8, None)), 0.0))


def test_every_weight_of_an_lstm_is_patched(voice):
    model, mels = voice
    clean = model(mels)
    for name, parameter in model.lstm.named_parameters():
        by_hand = copy.deepcopy(model)
        getattr(by_hand.lstm, name).data.mul_(0.5)
        with patch(model, f"lstm@{name}", parameter.detach() * 0.5), capture(model, f"lstm@{name}") as acts:
            output = model(mels)
        assert torch.equal(output, by_hand(mels)), name
        assert torch.equal(acts[f"lstm@{name}"], parameter * 0.5)
        assert not torch.equal(output, clean), name
        assert torch.equal(model(mels), clean), name


def test_a_weight_of_an_lstm_that_requires_grad(voice):
    model, mels = voice
    by_hand = copy.deepcopy(model)
    value = (model.lstm.weight_hh_l0.detach() * 0.9).requires_grad_()
    by_hand.lstm.weight_hh_l0.data.copy_(value.detach())
    by_hand(mels)[:, 0].sum().backward()
    with patch(model, "lstm@weight_hh_l0", value):
        model(mels)[:, 0].sum().backward()
    assert torch.equal(value.grad, by_hand.lstm.weight_hh_l0.grad)
    assert model.lstm.weight_hh_l0.grad is None
    assert torch.equal(model.lstm.weight_ih_l2.grad, by_hand.lstm.weight_ih_l2.grad)


# --- silero-vad: TorchScript ------------------------------------------------------------------------------------------

REFUSED = "TorchScript runs its forward outside of Python"


@pytest.mark.parametrize(
    "attempt",
    [
        lambda model: capture(model, "**").__enter__(),
        lambda model: capture(model).__enter__(),
        lambda model: capture(model, "").__enter__(),
        lambda model: patch(model, "", 0.0).__enter__(),
        lambda model: ablate(model, "_model.decoder").attach(),
        lambda model: select(model, "_model"),
        lambda model: select(model, "_model.encoder.*"),
        lambda model: edit(model, "@input[0]", abs).__enter__(),
        lambda model: select(model, "_model.decoder.rnn@weight_ih"),
        lambda model: captured(model, "**")(torch.zeros(1, 512), 16000),
        lambda model: sites(model, torch.zeros(1, 512), 16000),
    ],
    ids=[
        "capture", "capture all", "root", "patch", "child", "select", "wildcard", "input", "parameter", "captured",
        "sites",
    ],
)  # fmt: skip
def test_torchscript_is_refused(attempt):
    with pytest.raises(UnsupportedModule, match=REFUSED):
        attempt(silero_vad())


def test_torchscript_inside_a_model_is_refused_by_name():
    model = Gated()
    for path in ("vad", "*", "vad@input[0]"):
        with pytest.raises(UnsupportedModule, match=rf"^'vad' is a RecursiveScriptModule: {REFUSED}"):
            capture(model, path).__enter__()
    with pytest.raises(UnsupportedModule, match=r"^'vad"):
        capture(model, "vad._model").__enter__()


def test_what_is_around_torchscript_is_seen():
    model, sound = Gated().eval(), torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.vad.reset_states()
        _, expected = outputs_by_hooks(model.gain, lambda: model(sound))
        model.vad.reset_states()
        with capture(model, "gain", "") as acts:
            output = model(sound)
    assert same(acts["gain"], expected[""][0])
    assert same(acts[""], output)


def test_a_wrong_name_beside_torchscript_is_answered():
    with pytest.raises(SiteNotFound, match="nearest names: gain"):
        capture(Gated(), "gian").__enter__()
