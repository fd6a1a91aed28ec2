"""Models that are shown in listings, module by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Returns None beside its value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.fc(x), None


class Model(nn.Module):
    """A list of blocks, an activation that is shared and called twice, a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 2)
        self.h = nn.ModuleList([Block(), Block()])
        self.act = nn.ReLU()
        self.same = self.act
        self.unused = nn.Dropout()
        self.register_buffer("mask", torch.ones(2))

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.emb(ids)
        for block in self.h:
            x = self.act(block(x)[0])
        return {"x": x * scale, "ids": ids}


class Mixing(nn.Module):
    """Calls torch functions of several sorts, methods of its own, another module, and what returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def scores(self, x: Tensor) -> Tensor:
        return self.scaled(x @ x.T, by=2.0)

    @staticmethod
    def scaled(x: Tensor, by: float) -> Tensor:
        return x * by

    @classmethod
    def named(cls, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, cls.__name__

    def width(self, x: Tensor) -> int:
        return x.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        pattern = torch.softmax(self.scores(self.fc(x)), dim=-1)
        return self.named(torch.add(torch.matmul(pattern, x), x))[0] - self.width(x)
