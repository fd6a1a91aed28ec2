"""A small random transformer of every family that `anatomy` knows, with weights that all have an effect."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from gallery.architectures import VOCABULARY, tokens
from torch import Tensor, nn

SIZES = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
NO_MLP_SIZE = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
OPT = {**NO_MLP_SIZE, "ffn_dim": 48}


def _maker(kind: str, config: str, **settings: Any) -> Callable[[str], Any]:
    def make(attention: str) -> Any:
        return getattr(transformers, kind)(getattr(transformers, config)(**settings, attn_implementation=attention))

    return make


MAKERS: dict[str, Callable[[str], Any]] = {
    "gpt2": _maker("GPT2LMHeadModel", "GPT2Config", **NO_MLP_SIZE, n_inner=48),
    "gpt_neox": _maker("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, use_parallel_residual=False),
    "gpt_neox_parallel": _maker("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    "llama": _maker("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "mistral": _maker("MistralForCausalLM", "MistralConfig", **GROUPED),
    "qwen2": _maker("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": _maker("Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "gemma": _maker("GemmaForCausalLM", "GemmaConfig", **GROUPED),
    "gemma2": _maker("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, final_logit_softcapping=5.0),
    "gemma3": _maker("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED),
    "bert": _maker("BertForMaskedLM", "BertConfig", **SIZES),
    "opt": _maker("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=32),
    "opt_projected": _maker("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=24),
    "opt_post_norm": _maker("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=24, do_layer_norm_before=False),
}

EAGER_ALONE = ("gemma2",)
"""What transformers has no fused attention for."""

BODIES = [
    (family, attention)
    for family in MAKERS
    for attention in ("eager", "sdpa")
    if attention == "eager" or family not in EAGER_ALONE
]

LAYER = 1
"""The layer that tests look at."""


@functools.cache
def body(family: str, attention: str = "sdpa") -> Any:
    """A model in evaluation mode; biases and norms are not what they are initialised with. No test may change it."""
    torch.manual_seed(0)
    model = MAKERS[family](attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 if parameter.ndim == 1 else 0.0)
    return model.eval().requires_grad_(False)


def padded(model: nn.Module) -> dict[str, Tensor]:
    """Two examples of seven positions; the second one has two positions of padding on the left."""
    ids = tokens(0, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}
