"""Modules with methods of their own."""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    """Has methods of every sort, a property, and what is no method."""

    scale = 2.0
    table = ("no", "method")

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def mix(self, q, k, by=1.0):
        return self.proj(q) * k * by

    @staticmethod
    def act(x):
        return x.sin()

    @classmethod
    def scaled(cls, x):
        return x * cls.scale

    @property
    def width(self):
        return 4

    def forward(self, x):
        return self.scaled(self.act(self.mix(x, k=x)))


class Overriding(Attention):
    """Has a method over the one of its base."""

    def mix(self, q, k, by=1.0):
        return super().mix(q, k, by) + 1


class OtherScale(Attention):
    """Has another attribute that a class method reads."""

    scale = 3.0


class Methods(nn.Module):
    """A static method, and a class method that calls it."""

    @staticmethod
    def halved(x, by=2):
        return x / by

    @classmethod
    def more(cls, x):
        return cls.halved(x) + 1

    def forward(self, x):
        return self.more(self.halved(x))


class AsksItself(nn.Module):
    """Calls a method of its own, and one that every module has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def scaled(self, x):
        return x * self.get_parameter("weight")

    def forward(self, x):
        return self.scaled(x)


class Underscored(nn.Module):
    """Has a method with two underscores at the end of its name."""

    def _mix__(self, x):
        return x + 1

    def forward(self, x):
        return self._mix__(x)
