"""One module at several places, one parameter of several modules, and modules that hold or call themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TiedToEmbedding(nn.Module):
    """One submodule under two names, and tied weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.again = self.embed
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.again(self.embed(x)))


class ThreeNames(nn.Module):
    """`a`, `b` and `group.c` are one module; `a.0` is therefore `b.0` and `group.c.0`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.ReLU())
        self.b = self.a
        self.group = nn.ModuleDict({"c": self.a})

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class HoldsItself(nn.Module):
    """A module that holds itself, and a child that holds its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.me = self
        self.child = nn.Module()
        self.child.forward = lambda x: x
        self.child.parent = self
        self.layer = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.child(x))


class Tied(nn.Module):
    """The embedding is the head; one block is there under two names; a parent reads a child's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.reader = Reader()

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.again(self.block(x))
        return self.head(self.reader(x))


class Reader(nn.Module):
    """Never calls its child."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return x @ self.hidden.weight


class CallsItself(nn.Module):
    """Calls itself, twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, depth=2):
        x = self.layer(x)
        return self(x, depth - 1) * 2 if depth else x


class SharesList(nn.Module):
    """Two modules that own one list of parameters, and hand a parameter to a child and to a method."""

    def __init__(self, weights=None):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4)]) if weights is None else weights
        self.inner = SharesList(self.weights) if weights is None else None

    def forward(self, x):
        x = x if self.inner is None else self.inner(x)
        return self.add(x, self.weights[0])

    def add(self, x, weight):
        return x + weight


class Thrice(nn.Module):
    """Calls one block three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x)))
