"""Real models beside what `transformers` and `accelerate` show and do themselves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from by_hooks import (
    changed_by_hook,
    put,
    same,
    state_of,
)
from gallery.architectures import ARCHITECTURES, answer, gpt2, llama, tokens
from torch import Tensor, nn

from nicehooks import (
    SiteNotFound,
    ablate,
    capture,
    edit,
    patch,
    steer,
    suspend,
)

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
