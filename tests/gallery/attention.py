"""Attention in several ways to write it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gallery.calling import Trip


class SelfAttention(nn.Module):
    """Attention of two heads from one map to queries, keys and values; whoever calls it maps its result on."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(-2)


class Attending(nn.Module):
    """A layer that is all attention, without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.query, self.key, self.value))
        return x + self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class ScoresAttention(nn.Module):
    """Attention in one function and one method."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x):
        return functional.softmax(self.scores(self.query(x)), dim=-1) @ x

    def scores(self, query):
        return query @ query.T


class Fused(nn.Module):
    """Fused attention and nothing else."""

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x)


class FusedCausal(nn.Module):
    """The same with a mask."""

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Flexible(nn.Module):
    """Flexible attention, compiled as `flex` is, with a score that is changed and a mask."""

    def __init__(self, flex, score_mod=None, block_mask=None, **options):
        super().__init__()
        self.flex, self.options = flex, {"score_mod": score_mod, "block_mask": block_mask, **options}

    def forward(self, q, k, v):
        return self.flex(q, k, v, **self.options)


class Softmaxes(nn.Module):
    """Calls softmax twice in its own forward, once of them in a method; its child calls it too."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Softmax(-1)

    def _attn(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores * 2, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self._attn(torch.softmax(self.child(x), dim=-1)) * 3


class Projected(nn.Module):
    """Attention whose child makes queries, keys and values, and calls a softmax, too."""

    def __init__(self):
        super().__init__()
        self.project = Projection()
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.project(x)
        pattern = functional.softmax(self._scores(q, k), dim=-1)
        return self.out(pattern @ v) + 1.0

    def _scores(self, q, k):
        return torch.matmul(q, k.transpose(-1, -2)) * 0.5


class Projection(nn.Module):
    """Queries, keys and values, by way of a matmul and a softmax."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12))

    def forward(self, x):
        return torch.softmax(torch.matmul(x, self.weight), dim=-1).chunk(3, dim=-1)


class AroundProjected(nn.Module):
    """A model around the attention."""

    def __init__(self):
        super().__init__()
        self.attention = Projected()

    def forward(self, x):
        return self.attention(x)


class Mixer(nn.Module):
    """Calls torch functions and a method, one module twice; two modules have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.key.weight
        self.trip = Trip()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-1, -2))

    def forward(self, x: Tensor) -> Tensor:
        pattern = torch.softmax(self.scores(self.query(x), self.key(x)), dim=-1)
        return self.out(self.out(self.trip(torch.matmul(pattern, x))))
