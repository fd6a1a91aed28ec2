"""A model with a module of two arguments, one of them by name, and two results; and what hooks on it must leave."""

from __future__ import annotations

from torch import nn
from worlds import state

from nicehooks import describe


class Two(nn.Module):
    """Takes two tensors and an option, returns two tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, y, scale=1.0):
        return self.inner(x) * y * scale, y.sin()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.two = Two()
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.first(x)
        left, right = self.two(h, h * 2, scale=0.5)
        return self.relu(left) + right


def unchanged(model):
    before = state(model)
    return lambda: state(model) == before and not describe(model)
