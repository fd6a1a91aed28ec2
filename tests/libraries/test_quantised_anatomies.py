"""Quantised transformers: the anatomy of the plain one, what each head adds, and logits taken apart or refused."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from nicehooks import UnsupportedModule, ablate, anatomy, capture, direct_logit_attribution, head_results

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PARTS = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    return (
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        .eval()
        .requires_grad_(False)
    )


def in_eight_bits(model, head):
    """Linear layers of bitsandbytes; the unembedding too where `head`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (head or name != "lm_head"):
            new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new)
    return model.to("cpu").eval().requires_grad_(False)


def in_four_bits(model):
    """Linear layers of bitsandbytes, all but the unembedding; its kernel for a CPU takes 64 numbers and more."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new)
    return model.to("cpu").eval().requires_grad_(False)


def by_torchao(model):
    quantize_(model, Int8WeightOnlyConfig())
    return model


def captured_parts(model):
    parts = anatomy(model)
    ends = parts.resid_pre[0], parts.resid_post, parts.final_norm
    with capture(model, parts.attn_out, parts.mlp_out, parts.z, *ends) as cache:
        logits = model(input_ids=IDS).logits
    return parts, cache, logits


EXACT, TO_EIGHT_BITS = 1e-5, 1 / 127
"""How far what is computed twice is apart, beside the largest number: bitsandbytes rounds what a layer reads, or gives
(with four bits, to half precision), too."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "rounding"),
    [(by_torchao, EXACT), (lambda model: in_eight_bits(model, False), TO_EIGHT_BITS), (in_four_bits, TO_EIGHT_BITS)],
    ids=["torchao", "bitsandbytes, 8 bit", "bitsandbytes, 4 bit"],
)
def test_a_quantised_model_has_the_plain_anatomy_and_its_identities(plain, change, rounding):
    model = change(copy.deepcopy(plain))
    parts, cache, logits = captured_parts(model)
    for part in PARTS:
        assert list(parts[part]) == list(anatomy(plain)[part]), part
    out, results = cache[parts.attn_out[1]], head_results(model, cache, 1)
    assert (results.sum(2) - out).abs().max() < rounding * out.abs().max()
    with ablate(model, parts.z[1].head(1)), capture(model, parts.attn_out[1]) as without:
        model(input_ids=IDS)
    assert (out - without[parts.attn_out[1]] - results[:, :, 1]).abs().max() < rounding * out.abs().max()
    for per_head in (False, True):  # what heads alone are rounded by is in the rest
        terms = direct_logit_attribution(model, cache, 7, against=5, per_head=per_head)
        assert torch.allclose(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5], atol=1e-5)
        assert terms["rest"].abs().max() < (rounding if per_head else EXACT) * logits.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_an_unembedding_that_is_packed_is_refused_by_name(plain):
    model = in_eight_bits(copy.deepcopy(plain), True)
    _, cache, _ = captured_parts(model)
    with pytest.raises(UnsupportedModule, match=r"'lm_head@weight' is a .* packed in a form of its own"):
        direct_logit_attribution(model, cache, 7, against=5)
