"""A small transformer that shows its values at hook points, written as one writes it for TransformerLens."""

from __future__ import annotations

import torch
from torch import nn

from nicehooks.hookpoints import HookedRootModule, HookPoint


class HookedAttention(nn.Module):
    """Attention that shows each of its steps at a hook point."""

    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.W_qkv = nn.Linear(d_model, 3 * d_model)
        self.W_O = nn.Linear(d_model, d_model)
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.W_qkv(x).chunk(3, -1))
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        scores = self.hook_attn_scores(torch.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5)
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("...hqk,...khd->...qhd", pattern, v))
        return self.W_O(z.flatten(-2))


class HookedBlock(nn.Module):
    """Attention and an MLP around the residual stream, and a hook point that is never reached."""

    def __init__(self, d_model, heads):
        super().__init__()
        self.attn = HookedAttention(d_model, heads)
        self.mlp = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.Tanh(), nn.Linear(2 * d_model, d_model))
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.hook_never = HookPoint()

    def forward(self, x):
        x = self.hook_resid_pre(x)
        x = x + self.hook_attn_out(self.attn(x))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(x)))


class Toy(HookedRootModule):
    """Takes `[batch, pos, 4]`, or `[pos, 4]` inside of `vmap`."""

    def __init__(self, d_model=8, heads=2, layers=2):
        super().__init__()
        self.embed = nn.Linear(4, d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(HookedBlock(d_model, heads) for _ in range(layers))
        self.unembed = nn.Linear(d_model, 5)
        self.received: list[str] = []  # the names of arguments that it did not ask for
        self.setup()

    def forward(self, x, return_type="logits", **rest):
        self.received[:] = sorted(rest)
        x = self.hook_embed(self.embed(x))
        for block in self.blocks:
            x = block(x)
        logits = self.unembed(x)
        return logits.square().mean() if return_type == "loss" else logits


def toy(**sizes):
    torch.manual_seed(0)
    return Toy(**sizes).eval()


def inputs(batch=3, pos=5):
    return torch.randn(batch, pos, 4, generator=torch.Generator().manual_seed(1))


# --- places in it ---

MLP = "blocks.0.hook_mlp_out"
POST = "blocks.1.hook_resid_post"
Z = "blocks.1.attn.hook_z"
