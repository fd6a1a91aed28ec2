"""The worlds in which a law has to hold, and the models on which it is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from gallery.plain import Mlp, Normed
from gallery.shared import Thrice
from gallery.trees import Nested
from torch import Tensor, nn

from nicehooks import describe
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


def unchanged(model):
    before = state(model)
    return lambda: state(model) == before and not describe(model)


# --- transforms of a function of `inputs()` ---------------------------------------------------------------------------

AROUND: dict[str, Callable[[Fn], Any]] = {
    "vmap": lambda f: torch.func.vmap(f)(inputs()),
    "vmap(vmap)": lambda f: torch.func.vmap(torch.func.vmap(f))(inputs()[None]),
    "grad": lambda f: torch.func.grad(lambda x: total(f(x)))(inputs()),
    "jvp": lambda f: torch.func.jvp(f, (inputs(),), (inputs(),)),
    "jacrev": lambda f: torch.func.jacrev(f)(inputs()),
    "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(lambda x: total(f(x))))(inputs()),
}
