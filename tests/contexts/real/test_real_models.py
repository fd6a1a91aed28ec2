"""Real models: what contexts show is what hand-written hooks see, exactly, and nothing stays behind."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from by_hooks import (
    arguments_by_hooks,
    on_residual,
    outputs_by_hooks,
    same,
    state_of,
    unchanged,
)
from gallery.architectures import ARCHITECTURES, Architecture, answer
from torch import nn

from nicehooks import (
    ablate,
    capture,
    describe,
    edit,
    patch,
    sites,
    steer,
    suspend,
)

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
