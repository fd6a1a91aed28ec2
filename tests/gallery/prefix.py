"""A model whose value at a position depends on the tokens up to it, and on no padding: rows can be traced by it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 8


class PrefixModel(nn.Module):
    """A model in which what is at a position depends on the tokens up to it, and on no padding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(100, WIDTH)
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
            self.pair = _Pair()
            self.unembed = nn.Linear(WIDTH, 100)
        self.last = 0
        """How often its last module ran."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        x = x.cumsum(1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        self.last += 1
        return self.unembed(self.pair(x)[0])


class _Pair(nn.Module):
    """Returns a tensor, and another one in a dict."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"twice": 2 * x}
