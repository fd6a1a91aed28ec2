"""A tiny model of each architecture of the `transformers` library, from its own default config made small."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

LAYERS = 3

SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_mem_blocks", "depth"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("dim_model", "word_embed_proj_dim", "lru_width", "attention_hidden_size", "d_embed"), 32),
    **dict.fromkeys(("embed_dim", "d_latents", "qk_channels", "v_channels", "projection_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "dff", "moe_intermediate_size", "ffn_hidden", "mlp_dim"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "hidden_dim", "d_inner", "dense_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 100),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "index_topk"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "ssm_state_size", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "image_size", "mamba_d_head", "mamba_head_dim", "index_head_dim"), 16
    ),
    **dict.fromkeys(("rotary_dim", "attention_window", "sliding_window", "patch_size", "chunk_size"), 4),
    **dict.fromkeys(("mamba_chunk_size", "mamba_n_heads", "mamba_num_heads", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "n_kv_heads", "type_vocab_size", "mamba_expand"), 2),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "mamba_n_groups", "n_groups"), 1),
    "linear_num_value_heads": 4,
    "mamba_d_ssm": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "entity_vocab_size": 50,
    "entity_emb_size": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "num_mel_bins": 8,
    "num_latents": 8,
}
"""What is small, by the names of settings."""

EVERY_OTHER = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
AXIAL = {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24], "attn_layers": ["local", "lsh", "local"]}
ENGLISH = {"default_language": "en_XX", "languages": ["en_XX"]}
ONE_STAGE = {
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 32,
    "patch_size": 2,
}

OWN: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": {"num_hidden_layers": 4, "layer_group_size": 2},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention", "mamba"]},
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "KimiLinearForCausalLM": EVERY_OTHER,
    "Qwen3_5ForCausalLM": EVERY_OTHER,
    "Qwen3_5MoeForCausalLM": EVERY_OTHER,
    "Qwen3NextForCausalLM": EVERY_OTHER,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local", "global"], 1]]},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16},
    "ReformerModelWithLMHead": {"is_decoder": True, **AXIAL},
    "ReformerForMaskedLM": {"is_decoder": False, **AXIAL},
    "XmodForCausalLM": ENGLISH,
    "XmodForMaskedLM": ENGLISH,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "EsmForMaskedLM": {"vocab_size": 100, "pad_token_id": 0, "mask_token_id": 3},
    "Ernie4_5_MoeForCausalLM": {"moe_k": 2},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "PerceiverForMaskedLM": {"num_blocks": 1, "num_self_attends_per_block": 3},
    "SwinModel": ONE_STAGE,
    "Swinv2Model": ONE_STAGE,
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "MinistralForCausalLM": {"head_dim": 8},
    "NemotronForCausalLM": {"head_dim": 8},
    "Qwen2VLForConditionalGeneration": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
}
"""What a config needs besides, by the class of the model."""


def architectures(*mappings: str) -> dict[str, str]:
    """Each class of models in these mappings of `transformers`, with the type of model that it is for."""
    found: dict[str, str] = {}
    for mapping in mappings:
        for kind, classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in classes if isinstance(classes, tuple | list) else [classes]:
                found.setdefault(name, kind)
    return found


def tiny(name: str, **settings: Any) -> Any:
    """A model of the class called `name`, in evaluation mode; biases and norms are not what they start as."""
    kind = getattr(transformers, name)
    config = kind.config_class
    torch.manual_seed(0)
    model: nn.Module = kind(config(**_merged(_merged(_small(config()), OWN.get(name, {})), settings)))
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e7, f"{name} is not tiny"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:  # not tables of sines
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return model.eval().requires_grad_(False)


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with what `other` says, inside of inner configs too."""
    both = {key: _merged(one[key], value) for key, value in other.items() if isinstance(value, dict) and key in one}
    return {**one, **other, **both}


def _small(default: Any, depth: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        inner = default.__dict__.get(name)
        if isinstance(inner, transformers.PreTrainedConfig) and depth < 4:
            found[name] = _small(inner, depth + 1)
        elif name == "num_key_value_heads":  # as many as heads where it has as many, and else half of them
            found[name] = 4 if value is None or value == default.__dict__.get("num_attention_heads") else 2
        elif name == "pad_token_id" or (name in SIZES and isinstance(value, int | float) and value is not True):
            found[name] = SIZES[name]
    return found
