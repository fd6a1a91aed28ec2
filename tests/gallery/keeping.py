"""Layers that keep something from call to call, each in another way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gallery.own_transformers import WIDTH, Inline, OwnTransformer


class KeepsLast(Inline):
    """It keeps what it has read: bound anew, counted, and written into a buffer and into a tensor that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.count, self.written = 0, torch.zeros(WIDTH)
        self.register_buffer("cache", torch.zeros(4, WIDTH))
        self.register_buffer("table", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.count, self.first_seen = x, self.count + 1, x[0]
        self.get_buffer("cache")[:2].copy_(x[0, :2])
        self.written += x[0, 0]
        self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return super().forward(x)


class HooksItself(Inline):
    """At its first call it registers a hook, and remembers that in a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.has_hook = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_hook:
            self.mlp.register_forward_hook(lambda module, args, output: 2 * output)
            self.has_hook = True
        return super().forward(x)


class KeepsObject(Inline):
    """It keeps an object, and counts beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.count = None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.kept, self.count = self.kept or object(), self.count + 1
        return super().forward(x)


class ReplacesItself(Inline):
    """At its first call it makes another MLP, and remembers that in a flag."""

    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make, self.is_made = mlp, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_made:
            self.mlp, self.is_made = self.make(), True
        return super().forward(x)


class BatchNormed(Inline):
    """Its norms are over batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OverBatches(), OverBatches()


class OverBatches(nn.BatchNorm1d):
    """A batch norm whose channels are last; it takes the means of its batch and keeps them, in evaluation too."""

    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        kept = self.running_mean, self.running_var
        normed = nn.functional.batch_norm(input.transpose(1, 2), *kept, self.weight, self.bias, training=True)
        return normed.transpose(1, 2)


def keeping(block: Callable[[], nn.Module]) -> OwnTransformer:
    """A transformer of such layers."""
    torch.manual_seed(0)
    return OwnTransformer(block).requires_grad_(False)
