"""How modules are called, how they call others, and which they never call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import captured


class Adds(nn.Module):
    """Two arguments, of which the first may be left out."""

    def forward(self, x: Tensor | None = None, y: Any = None) -> Tensor:
        return y if x is None else x + y


class AddsByName(nn.Module):
    """Gives one argument by position and one by name, and calls a module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.adds = Adds()
        self.twice = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.adds(x, y=2 * x)))


class Idle(nn.Module):
    """Never calls its child."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return x * 2


class Clash(nn.Module):
    """Takes arguments of the names that options of `run` have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, return_activations=1, model_kwargs=0, model=0):
        return self.inner(x) * return_activations + model_kwargs + model


class AroundCaptured(nn.Module):
    """A model whose forward is a captured one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        output, activations = captured(self.model, "blocks.*", "head@input[0]")(x)
        return output.sin(), activations


class Calls(nn.Module):
    """Is called, but not as modules are: nothing that stands in for its forward would be asked."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + 5

    def forward(self, x: Tensor) -> Tensor:
        return x


class CallsSuper(nn.Module):
    """Is called as it likes, and asks the call of modules."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x + 5)

    def forward(self, x: Tensor) -> Tensor:
        return x


def logged(call: Any) -> Any:
    def log(*args: Any) -> Any:
        return call(*args)

    return log


class CallsForward(CallsSuper):
    """Is called as it likes, and asks its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        return self.forward(x)


class CallsDecorated(CallsSuper):
    """Is called by way of a decorator."""

    __call__ = logged(CallsSuper.__call__)


class CallsBound(CallsSuper):
    """Goes by an attribute of the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.run = self.forward

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


class Half(nn.Module):
    """Calls one of its two layers, and has a third that nobody calls."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.rest = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return self.used(x)


class NamedAsPorts(nn.Module):
    """Has children whose names are words of the path language, and takes any arguments."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(4, 4)
        self.input = nn.Linear(4, 4)
        self.forward_ = nn.Linear(4, 4)
        self.grad = nn.Linear(4, 4)

    def forward(self, *args, **kwargs):
        return self.output(self.input(args[0])) + self.forward_(kwargs["other"]) + self.grad(args[1])


class TwoArguments(nn.Module):
    """Takes two tensors and an option, returns two tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, y, scale=1.0):
        return self.inner(x) * y * scale, y.sin()


class CallsTwo(nn.Module):
    """A module of two arguments, one of them by name, and two results, between plain ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.two = TwoArguments()
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.first(x)
        left, right = self.two(h, h * 2, scale=0.5)
        return self.relu(left) + right


class Boom(Exception):
    """What the test itself raises."""


class Trip(nn.Module):
    """Raises where it stands, when told."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if Trip.armed:
            raise Boom
        return x * 1


class BreaksInTheMiddle(nn.Module):
    """Calls functions, then what ends the graph of a compiler, then functions again."""

    def forward(self, x: Tensor) -> Tensor:
        early = nn.functional.softmax(x, -1) + x.tanh()
        torch._dynamo.graph_break()
        return early.tanh()
