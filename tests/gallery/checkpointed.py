"""Regions that are computed again on the way back."""

from __future__ import annotations

from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedFunction(nn.Module):
    """A checkpointed region that is a function with two layers in it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(lambda y: self.b(self.a(y).sin()), x, use_reentrant=False).sin()


class Checkpointed(nn.Module):
    """A checkpointed region, reentrant or not, or with None the same without checkpointing."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
