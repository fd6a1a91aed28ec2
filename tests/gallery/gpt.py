"""The module tree of GPT-2, for paths and for what is said about wrong ones."""

from __future__ import annotations

from torch import Tensor, nn


class Attention(nn.Module):
    """Attention in name alone: returns a tuple, as that of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(4, 12)
        self.c_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.c_proj(self.c_attn(x)[..., :4]), None


class Block(nn.Module):
    """Attention, and an MLP on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attn(x)[0])


class Transformer(nn.Module):
    """An embedding and twelve blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.h = nn.ModuleList(Block() for _ in range(12))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return x


class GPT(nn.Module):
    """The names of GPT-2, and hardly anything behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer()
        self.lm_head = nn.Linear(4, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.transformer(ids))
