"""Toys of single tests about other systems, and of random programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gallery.returning import Gives
from nicehooks.values import trees


class Coder(nn.Module):
    """A layer, and a weight that the forward itself uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.W_enc = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc1(x) @ self.W_enc


class Idle(Coder):
    """Its layer is never called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W_enc


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]


def total(value: Any) -> Tensor:
    return sum((leaf.sin() * number for number, leaf in enumerate(tensors_in(value), 1)), torch.zeros(()))


class Summed(nn.Module):
    """What comes out of it depends on every leaf."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.nest = Gives(make)

    def forward(self, x: Tensor) -> Tensor:
        return total(self.nest(x * 2))
