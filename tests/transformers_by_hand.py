"""Transformers written out by hand, with a place for a hook at each value: what `hooks.on(model)` has to equal.

They use the weights of a model of the `transformers` library and nothing else of it but rotary embeddings and masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_some
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate

At = Callable[..., Tensor]
"""`at(place, value)` or `at(place, value, layer=…)` is the value that goes on."""

gelu_new = partial(nn.functional.gelu, approximate="tanh")


def layer_norm(norm: Any, x: Tensor, at: At, place: str) -> Tensor:
    centred = at(f"{place}.post_mean_subtraction", x - x.mean(-1, keepdim=True))
    scale = at(f"{place}.scale", (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt())
    return at(f"{place}.post_scale", centred / scale) * norm.weight + norm.bias


def rms_norm(gain: Tensor, eps: float, x: Tensor, at: At, place: str) -> Tensor:
    scale = at(f"{place}.scale", (x.square().mean(-1, keepdim=True) + eps).sqrt())
    return at(f"{place}.post_scale", x / scale) * gain


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, at: At, causal: bool = True) -> Tensor:
    """From q, k, v `[batch, pos, head, d_head]` to what goes into the output projection."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    logits = torch.einsum("bqhd,bkhd->bqkh", q, k)
    if causal:
        logits = logits + torch.full(logits.shape[1:3], -1e30).triu(1).unsqueeze(-1)
    logits = at("attn.qk_logits", logits)
    powers = (logits - logits.amax(2, keepdim=True)).exp()
    pattern = powers / at("attn.qk_softmax_denominator", powers.sum(2, keepdim=True))
    pattern = at("attn.qk_probs", pattern)
    return at("attn.v_out", torch.einsum("bqkh,bkhd->bqhd", pattern, v)).flatten(2)


def projections(q: Tensor, k: Tensor, v: Tensor, at: At) -> list[Tensor]:
    """Queries and keys with half of the scale of their products each, and values."""
    half = q.shape[-1] ** -0.25
    return [at("attn.q", q * half), at("attn.k", k * half), at("attn.v", v)]


def in_layer(at: At, layer: int) -> At:
    return lambda place, value: at(place, value, layer=layer)


def plain(place: str, value: Tensor, layer: int | None = None) -> Tensor:
    return value


def gpt2(model: Any, ids: Tensor, at: At = plain) -> Tensor:
    core, n = model.transformer, model.config.n_head
    x = at("resid.post_emb", core.wte.weight[ids] + core.wpe.weight[: ids.shape[1]])
    for i, block in enumerate(core.h):
        here = in_layer(at, i)
        y = here("resid.torso.post_ln_attn", layer_norm(block.ln_1, x, here, "resid.torso.ln_attn"))
        qkv = (y @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)
        q, k, v = projections(*[heads(part, n) for part in qkv], here)
        y = attention(q, k, v, here) @ block.attn.c_proj.weight + block.attn.c_proj.bias
        x = here("resid.torso.post_attn", x + here("resid.torso.delta_attn", y))
        y = here("resid.torso.post_ln_mlp", layer_norm(block.ln_2, x, here, "resid.torso.ln_mlp"))
        y = here("mlp.post_act", gelu_new(here("mlp.pre_act", y @ block.mlp.c_fc.weight + block.mlp.c_fc.bias)))
        y = here("resid.torso.delta_mlp", y @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)
        x = here("resid.torso.post_mlp", x + y)
    x = at("resid.post_ln_f", layer_norm(core.ln_f, x, at, "resid.ln_f"))
    return at("logits", x @ model.lm_head.weight.T)


def gpt_neox(model: Any, ids: Tensor, at: At = plain) -> Tensor:
    core, n, parallel = model.gpt_neox, model.config.num_attention_heads, model.config.use_parallel_residual
    x = at("resid.post_emb", core.embed_in.weight[ids])
    cos, sin = core.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    for i, block in enumerate(core.layers):
        here = in_layer(at, i)
        y = here("resid.torso.post_ln_attn", layer_norm(block.input_layernorm, x, here, "resid.torso.ln_attn"))
        qkv = heads(block.attention.query_key_value(y), n).chunk(3, -1)
        q, k, v = projections(*qkv, here)
        q, k = rotate_some(q, k, cos, sin, unsqueeze_dim=2)
        delta = here("resid.torso.delta_attn", block.attention.dense(attention(q, k, v, here)))
        before = x if parallel else here("resid.torso.post_attn", x + delta)
        norm = block.post_attention_layernorm
        y = here("resid.torso.post_ln_mlp", layer_norm(norm, before, here, "resid.torso.ln_mlp"))
        y = here("mlp.post_act", nn.functional.gelu(here("mlp.pre_act", block.mlp.dense_h_to_4h(y))))
        y = here("resid.torso.delta_mlp", block.mlp.dense_4h_to_h(y))
        x = here("resid.torso.post_mlp", x + delta + y if parallel else before + y)
    x = at("resid.post_ln_f", layer_norm(core.final_layer_norm, x, at, "resid.ln_f"))
    return at("logits", x @ model.get_output_embeddings().weight.T)


def llama(model: Any, ids: Tensor, at: At = plain, offset: float = 0.0, act: Any = nn.functional.silu) -> Tensor:
    core, eps = model.model, model.config.rms_norm_eps
    factor = model.config.hidden_size**0.5 if offset else 1.0
    x = at("resid.post_emb", core.embed_tokens.weight[ids] * factor)
    cos, sin = core.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    for i, block in enumerate(core.layers):
        here, attn, mlp = in_layer(at, i), block.self_attn, block.mlp
        y = rms_norm(block.input_layernorm.weight + offset, eps, x, here, "resid.torso.ln_attn")
        y = here("resid.torso.post_ln_attn", y)
        q, k, v = projections(
            heads(attn.q_proj(y), model.config.num_attention_heads),
            heads(attn.k_proj(y), model.config.num_key_value_heads),
            heads(attn.v_proj(y), model.config.num_key_value_heads),
            here,
        )
        q, k = rotate(q, k, cos, sin, unsqueeze_dim=2)
        y = here("resid.torso.delta_attn", attn.o_proj(attention(q, k, v, here)))
        x = here("resid.torso.post_attn", x + y)
        y = rms_norm(block.post_attention_layernorm.weight + offset, eps, x, here, "resid.torso.ln_mlp")
        y = here("resid.torso.post_ln_mlp", y)
        y = here("mlp.post_act", act(here("mlp.pre_act", mlp.gate_proj(y))) * mlp.up_proj(y))
        x = here("resid.torso.post_mlp", x + here("resid.torso.delta_mlp", mlp.down_proj(y)))
    x = at("resid.post_ln_f", rms_norm(core.norm.weight + offset, eps, x, at, "resid.ln_f"))
    return at("logits", x @ model.lm_head.weight.T)


def gemma(model: Any, ids: Tensor, at: At = plain) -> Tensor:
    return llama(model, ids, at, offset=1.0, act=gelu_new)


def bert(model: Any, ids: Tensor, at: At = plain) -> Tensor:
    """The norm stands after the addition."""
    core, n = model.bert, model.config.num_attention_heads
    x = core.embeddings.word_embeddings.weight[ids] + core.embeddings.position_embeddings.weight[: ids.shape[1]]
    x = core.embeddings.LayerNorm(x + core.embeddings.token_type_embeddings.weight[0])
    x = at("resid.post_emb", x)
    for i, block in enumerate(core.encoder.layer):
        here, attn = in_layer(at, i), block.attention
        q, k, v = projections(
            heads(attn.self.query(x), n), heads(attn.self.key(x), n), heads(attn.self.value(x), n), here
        )
        y = here("resid.torso.delta_attn", attn.output.dense(attention(q, k, v, here, causal=False)))
        x = here("resid.torso.post_attn", x + y)
        x = here("resid.torso.post_ln_attn", layer_norm(attn.output.LayerNorm, x, here, "resid.torso.ln_attn"))
        y = here("mlp.post_act", nn.functional.gelu(here("mlp.pre_act", block.intermediate.dense(x))))
        x = here("resid.torso.post_mlp", x + here("resid.torso.delta_mlp", block.output.dense(y)))
        x = here("resid.torso.post_ln_mlp", layer_norm(block.output.LayerNorm, x, here, "resid.torso.ln_mlp"))
    head = model.cls.predictions
    x = head.transform.LayerNorm(nn.functional.gelu(head.transform.dense(x)))
    return at("logits", x @ head.decoder.weight.T + head.decoder.bias)


def opt(model: Any, ids: Tensor, at: At = plain) -> Tensor:
    core, n = model.model.decoder, model.config.num_attention_heads
    x = at("resid.post_emb", core.embed_tokens.weight[ids] + core.embed_positions.weight[2 : 2 + ids.shape[1]])
    for i, block in enumerate(core.layers):
        here, attn = in_layer(at, i), block.self_attn
        y = layer_norm(block.self_attn_layer_norm, x, here, "resid.torso.ln_attn")
        y = here("resid.torso.post_ln_attn", y)
        q, k, v = projections(heads(attn.q_proj(y), n), heads(attn.k_proj(y), n), heads(attn.v_proj(y), n), here)
        x = here("resid.torso.post_attn", x + here("resid.torso.delta_attn", attn.out_proj(attention(q, k, v, here))))
        y = here("resid.torso.post_ln_mlp", layer_norm(block.final_layer_norm, x, here, "resid.torso.ln_mlp"))
        y = here("mlp.post_act", here("mlp.pre_act", block.fc1(y)).relu())
        y = here("resid.torso.delta_mlp", block.fc2(y))
        x = here("resid.torso.post_mlp", x + y)
    x = at("resid.post_ln_f", layer_norm(core.final_layer_norm, x, at, "resid.ln_f"))
    return at("logits", x @ model.lm_head.weight.T)
