"""Models that read what goes on inside another model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nicehooks import anatomy, capture


class ReadsHeads(nn.Module):
    """A transformer whose output is a linear function of what the heads of its last layer hand on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.z = anatomy(inner).z[-1]
        self.direction = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: Tensor) -> Tensor:
        with capture(self.inner, self.z) as seen:
            self.inner(ids)
        return (seen[self.z][:, -1] * self.direction).sum((-1, -2))
