"""The worlds in which a law has to hold, and the models on which it is tried."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from nicehooks.values import trees

Fn = Callable[[Tensor], Any]


def eager(f: Fn, x: Tensor) -> Any:
    return f(x)


def no_grad(f: Fn, x: Tensor) -> Any:
    with torch.no_grad():
        return f(x)


def inference_mode(f: Fn, x: Tensor) -> Any:
    with torch.inference_mode():
        return f(x)


def autocast(f: Fn, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return f(x)


def vmap(f: Fn, x: Tensor) -> Any:
    return torch.vmap(f)(x)


def grad(f: Fn, x: Tensor) -> Any:
    return torch.func.grad(lambda x: total(f(x)))(x)


def jvp(f: Fn, x: Tensor) -> Any:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))


def jacrev(f: Fn, x: Tensor) -> Any:
    return torch.func.jacrev(f)(x[:2])


def vmap_grad(f: Fn, x: Tensor) -> Any:
    return torch.vmap(torch.func.grad(lambda row: total(f(row))))(x)


WORLDS = {w.__name__: w for w in (eager, no_grad, inference_mode, autocast, vmap, grad, jvp, jacrev, vmap_grad)}


def total(tree: Any) -> Tensor:
    """A scalar that depends on every tensor of `tree`."""
    leaves = [leaf for leaf in trees.leaves(tree) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.float().sin().sum() for leaf in leaves]).sum()


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    x, y = trees.leaves(a), trees.leaves(b)
    if type(a) is not type(b) or trees.structure_of(a) != trees.structure_of(b):
        return False
    return all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in zip(x, y, strict=True))


# --- models -----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Box:
    content: Any
    note: str = "kept"


class Mlp(nn.Module):
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


class Nest(nn.Module):
    """Returns every kind of container, in each other."""

    def forward(self, x: Tensor) -> Any:
        return Pair(x, [x * 2, None]), OrderedDict(b=x * 3, a=(x * 4,)), {"box": Box((x * 5, None))}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.nest = Nest()

    def forward(self, x: Tensor) -> Tensor:
        pair, ordered, boxed = self.nest(self.inner(x))
        assert type(pair) is Pair and type(ordered) is OrderedDict and type(boxed["box"]) is Box
        return pair.left + pair.right[0] + ordered["b"] + ordered["a"][0] + boxed["box"].content[0]


class Thrice(nn.Module):
    """Calls one block three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x)))


class Normed(nn.Module):
    """Layer norm and a gate that takes keyword arguments alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(value=self.norm(x), by=x)


class Gate(nn.Module):
    def forward(self, value: Tensor, by: Tensor, scale: float = 1.0) -> Tensor:
        return value * by.sigmoid() * scale


MODELS: dict[str, Callable[[], nn.Module]] = {kind.__name__: kind for kind in (Mlp, Nested, Thrice, Normed)}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def inputs() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    """How many graphs Dynamo has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def state(model: nn.Module) -> Any:
    """Everything that a context must leave as it was, by identity."""
    return [
        (name, id(module), type(module), {k: id(v) for k, v in vars(module).items()}, list(vars(module)))
        for name, module in model.named_modules()
    ] + [(name, id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()]


# --- transforms of a function of `inputs()` ---------------------------------------------------------------------------

AROUND: dict[str, Callable[[Fn], Any]] = {
    "vmap": lambda f: torch.func.vmap(f)(inputs()),
    "vmap(vmap)": lambda f: torch.func.vmap(torch.func.vmap(f))(inputs()[None]),
    "grad": lambda f: torch.func.grad(lambda x: total(f(x)))(inputs()),
    "jvp": lambda f: torch.func.jvp(f, (inputs(),), (inputs(),)),
    "jacrev": lambda f: torch.func.jacrev(f)(inputs()),
    "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(lambda x: total(f(x))))(inputs()),
}
