"""Small transformers that no table of families knows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gallery.attention import Attending, SelfAttention


class InsideOthers(nn.Module):
    """A language model among other things."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before = nn.Identity()
        self.parts = nn.ModuleDict({"lm/0": model})

    def forward(self, **inputs: Tensor) -> Any:
        return self.parts["lm/0"](**inputs)


class ParallelBlock(nn.Module):
    """Attention and an MLP of one layer, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out, self.mlp = SelfAttention(), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attn(x)) + self.mlp(x)


class Own(nn.Module):
    """A transformer without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ParallelBlock(), ParallelBlock())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


class AttentionOnly(nn.Module):
    """The transformer of "A Mathematical Framework for Transformer Circuits"."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(10, 8), nn.Sequential(Attending(), Attending())
        self.unembedding = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembedding(self.blocks(self.embedding(ids)))
