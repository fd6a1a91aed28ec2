"""Feed-forward models, and layers that are a little different from those of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OwnNorm(nn.LayerNorm):
    """Norms of libraries are classes of their own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


class Odd(nn.Module):
    """A normalization that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)


class Named(nn.Module):
    """Modules in sequences, lists, and an empty dict; and a method that one may put another over."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.b = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.c = nn.ModuleDict()

    def helper(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.b[1](self.b[0](self.a(x))))


class OtherReLU(nn.ReLU):
    """A ReLU of another class."""


class Matmul(nn.Module):
    """A linear map in an operation that autocast knows under `vmap`, too; `nn.Linear` is not one in every torch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x.unsqueeze(-2) @ torch.ones(4, 3)).squeeze(-2)


class FlatLayer(nn.Module):
    """Flattens all but the last dimension before its MLP, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.reshape(-1, 4)).view(*x.shape[:-1], 6)


class CallsFlat(nn.Module):
    """Calls the layer by the name of its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = FlatLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x=x) * 2


class Mlp(nn.Module):
    """An MLP with a residual stream: the model that most laws are tried on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Normed(nn.Module):
    """Layer norm and a gate that takes keyword arguments alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(value=self.norm(x), by=x)


class Gate(nn.Module):
    """Takes an argument with a default, which is no tensor."""

    def forward(self, value: Tensor, by: Tensor, scale: float = 1.0) -> Tensor:
        return value * by.sigmoid() * scale


class Adds(nn.Module):
    """Adds a number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number


class AddsTenfold(Adds):
    """Adds ten times the number."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 10 * self.number
