"""Modules that hand on a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Cell(nn.Module):
    """The step of an LSTM as two linear maps: torch's own `lstm_cell` has no batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.from_input = nn.Linear(4, 12)
        self.from_hidden = nn.Linear(3, 12)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        forget, keep, show, new = (self.from_input(x) + self.from_hidden(state[0])).chunk(4, -1)
        cell = forget.sigmoid() * state[1] + keep.sigmoid() * new.tanh()
        hidden = show.sigmoid() * cell.tanh()
        return hidden, (hidden, cell)


class Recurrent(nn.Module):
    """An LSTM cell that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        state = (torch.zeros_like(x[..., :3]), torch.ones_like(x[..., :3]))
        _, state = self.cell(x, state)
        hidden, _ = self.cell(x, state)
        return hidden[..., :2]
