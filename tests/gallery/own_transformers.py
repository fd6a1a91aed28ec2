"""Transformers as people write them themselves: attention in the forward of a layer, dicts, tables used twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, WORDS = 32, 4, 50


class Vectors(nn.Module):
    """An RMSNorm whose gain has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(1 + 0.2 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


class Neurons(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Inline(nn.Module):
    """A layer whose attention is lines of its own forward; a subclass says which."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Neurons()
        self.a, self.b, self.c, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, `[batch, pos, head, d_head]`."""
        return [each(x).unflatten(-1, (HEADS, -1)) for each in (self.a, self.b, self.c)]

    def attended(self, x: Tensor) -> Tensor:
        """What attention adds."""
        q, k, v = (each.transpose(1, 2) for each in self.heads(x))
        return self.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.first(x))
        return x + self.mlp(self.second(x))


class SideBySide(Inline):
    """Both branches read what the layer reads, and are added one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attended(self.first(x)) + self.mlp(self.second(x))


class InEinsums(Inline):
    """Positions stand before heads, and keys before queries."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        pattern = torch.einsum("bkhd,bqhd->bhqk", k, q).div(8**0.5).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(2))


class OfTensors(Inline):
    """Projections are parameters, per head, as in the libraries of this field; values come before the pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.2 * torch.randn(3, HEADS, WIDTH, 8))
        self.o = nn.Parameter(0.2 * torch.randn(HEADS, 8, WIDTH))

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bpm,hmd->bphd", x, w) for w in self.w)
        pattern = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5).softmax(-1)
        return torch.einsum("bqhd,hdm->bqm", torch.einsum("bkhd,bhqk->bqhd", v, pattern), self.o)


class WithoutSoftmax(Inline):
    """Linear attention."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.heads(x))
        return self.out(((q.sigmoid() @ k.sigmoid().mT).tril() @ v).transpose(1, 2).flatten(2))


class InDicts(Inline):
    """It reads and gives a dict."""

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {**given, "hidden": super().forward(given["hidden"])}


class BranchAlone(Inline):
    """It gives what is added, and another adds it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attended(self.first(x))


class BranchAndStream(Inline):
    """It gives a branch and the stream, which the next norm adds."""

    def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        stream = stream + x
        stream = stream + self.attended(self.first(stream))
        return self.mlp(self.second(stream)), stream


class Weighed(Inline):
    """What it adds is multiplied as it is added."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attended(self.first(x)), alpha=0.5)
        return torch.add(x, self.mlp(self.second(x)), alpha=2.0)


def called(block: nn.Module, x: Any) -> Any:
    """One layer after the other, by its sort."""
    if isinstance(block, InDicts):
        return block(x if isinstance(x, dict) else {"hidden": x})
    if isinstance(block, BranchAndStream):
        return block(*x) if isinstance(x, tuple) else block(x, torch.zeros_like(x))
    return x + block(x) if isinstance(block, BranchAlone) else block(x)


class OwnTransformer(nn.Module):
    """A language model without a config, and a table of tokens that unembeds, too; a list of no usual name."""

    def __init__(self, block: Callable[[], nn.Module], norm: Callable[[], nn.Module] = Vectors) -> None:
        super().__init__()
        self.table, self.pile, self.last = nn.Embedding(WORDS, WIDTH), nn.ModuleList([block(), block()]), norm()

    def forward(self, ids: Tensor) -> Tensor:
        x: Any = self.table(ids)
        for block in self.pile:
            x = called(block, x)
        x = x["hidden"] if isinstance(x, dict) else sum(x) if isinstance(x, tuple) else x
        return functional.linear(self.last(x), self.table.weight)
