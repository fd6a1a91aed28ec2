"""The models that trees of hooks are bound to in the tests, each with its forward by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers_by_hand as by_hand
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 30,
}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OPT: dict[str, Any] = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 24,
    "num_attention_heads": 4,
    "vocab_size": 30,
}

MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=30, **NO_TOKENS)),
        by_hand.gpt2,
    ),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **NO_TOKENS)), by_hand.gpt_neox),
    "gpt_neox_sequential": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **NO_TOKENS, use_parallel_residual=False)),
        by_hand.gpt_neox,
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **NO_TOKENS, num_key_value_heads=2)), by_hand.llama),
    "gemma": (
        lambda: GemmaForCausalLM(GemmaConfig(**SMALL, **NO_TOKENS, num_key_value_heads=2, head_dim=4)),
        by_hand.gemma,
    ),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL)), by_hand.bert),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**OPT, **NO_TOKENS, max_position_embeddings=16)), by_hand.opt),
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@cache
def made(family: str, implementation: str) -> Any:
    """A model whose weights are large enough that every value matters."""
    torch.manual_seed(0)
    model = MODELS[family][0]().eval()
    model.set_attn_implementation(implementation)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


each_model = pytest.mark.parametrize(
    ("family", "implementation"), [(family, how) for family in MODELS for how in ("eager", "sdpa")]
)


def small() -> Any:
    return made("gpt2", "eager")
