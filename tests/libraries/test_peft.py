"""PEFT: adapters are modules like others, and the model inside of the wrapper is what counts steps."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nicehooks import ablate, anatomy, capture, describe, edit, patch

IDS = torch.tensor([[3, 1, 4]])
BLOCK = "base_model.model.transformer.h.1"
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, **NO_TOKENS))
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_adapters_are_modules(model):
    clean = model(IDS).logits
    with capture(model, "**.lora_A.default", "**.c_attn", BLOCK) as acts:
        model(IDS)
    assert len(acts) == 5 and acts[f"{BLOCK}.attn.c_attn.lora_A.default"].shape == (1, 3, 2)
    with ablate(model, "**.lora_B.default"):
        without = model(IDS).logits
    with model.disable_adapter():
        assert torch.allclose(without, model(IDS).logits, atol=1e-6)
    assert torch.equal(model(IDS).logits, clean) and not torch.allclose(without, clean) and not describe(model)


def test_weights_of_adapters(model):
    with patch(model, "**.lora_B.default@weight", 0.0):
        without = model(IDS).logits
    with model.disable_adapter():
        assert torch.allclose(without, model(IDS).logits, atol=1e-6)


def test_parts_of_the_model_inside(model):
    with capture(model, anatomy(model).resid_post) as acts:
        model(IDS)
    assert list(acts) == ["base_model.model.transformer.h.0", BLOCK]


def test_gradients_of_adapters(model):
    with capture(model, f"{BLOCK}@grad") as acts:
        model(IDS).logits.sum().backward()
    assert acts[f"{BLOCK}@grad"].any()


def test_merging_inside_of_a_context(model):
    clean = model(IDS).logits
    with ablate(model, f"{BLOCK}.mlp"):
        here = model(IDS).logits
        model.merge_adapter()
        assert torch.allclose(model(IDS).logits, here, atol=1e-5)
        model.unmerge_adapter()
    assert torch.allclose(model(IDS).logits, clean, atol=1e-5)


def test_generation(model):
    with capture(model, BLOCK, keep="all") as acts:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert [value.shape[1] for value in acts.calls(BLOCK)] == [3, 1, 1]
    seen = []
    inside = model.base_model.model  # `generate` of the wrapper never calls the wrapper itself
    with edit(inside, "transformer.h.1", lambda value: seen.append(value.shape[1]), steps=1):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert seen == [1]
