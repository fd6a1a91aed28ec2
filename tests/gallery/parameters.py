"""Modules that use parameters of their own in their forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Autoencoder(nn.Module):
    """A sparse autoencoder, with parameters that it uses itself."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(4, 6))
        self.W_dec = nn.Parameter(torch.randn(6, 4))
        self.b_enc = nn.Parameter(torch.randn(6))
        self.b_dec = nn.Parameter(torch.randn(4))

    def forward(self, x):
        acts = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        return acts @ self.W_dec + self.b_dec


class CarefulAutoencoder(nn.Module):
    """The same, and looks at shapes and converts, which counts for no use of a parameter."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(4, 6))
        self.W_dec = nn.Parameter(torch.randn(6, 4))
        self.b_enc = nn.Parameter(torch.randn(6))
        self.b_dec = nn.Parameter(torch.randn(4))

    def forward(self, x):
        assert self.W_enc.shape[0] == x.shape[-1] and self.b_dec.dim() == 1  # no uses: their results are no tensors
        pre = (x - self.b_dec.to(x.dtype)) @ self.W_enc + self.b_enc
        return torch.relu(pre) @ self.W_dec + self.b_dec


class SameNames(nn.Module):
    """Uses a parameter of its own, and children that have one of the same name, or the same one."""

    def __init__(self):
        super().__init__()
        self.autoencoder = CarefulAutoencoder()
        self.b_dec = self.autoencoder.b_dec
        self.scales = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.shifts = nn.ParameterDict({"up": torch.randn(4)})

    def forward(self, x):
        x = self.autoencoder(x) * self.b_dec
        for scale in self.scales:
            x = x * scale
        return torch.stack([x, self.shifts["up"].expand_as(x)]).sum(0)


class Weighted(nn.Module):
    """Uses its weight twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = x @ self.weight
        return x + self.weight


class NormsByFunction(nn.Module):
    """Keeps running statistics that a function of torch overwrites."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


class Reads(nn.Module):
    """Multiplies by its weight, which it gets at by a function of itself."""

    def __init__(self, read: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read(self)


class CountsItsCalls(nn.Module):
    """Assigns one of its buffers anew in each forward, beside another one that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.scale + self.calls


class CallsItsChild(nn.Module):
    """Calls its child as a function of the child's parameters."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.child, dict(self.child.named_parameters()), (x,))
