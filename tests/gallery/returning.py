"""Modules that return what they are told to, and modules around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gallery.values import WithDefault


class Gives(nn.Module):
    """Returns what `make` makes of its argument."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Around(nn.Module):
    """A module around `Gives`."""

    def __init__(self, make):
        super().__init__()
        self.inner = Gives(make)

    def forward(self, x):
        return self.inner(x)


class GivesStates(nn.Module):
    """`Gives`, with the argument that transformers have."""

    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, hidden_states: Tensor) -> Any:
        return self.fn(hidden_states)


class GivesOfFirst(nn.Module):
    """Makes nothing of its second argument."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor, extra: Any = None) -> Any:
        return self.make(x)


class HandsOver(nn.Module):
    """Hands over an argument that is a tree with what is no tensor, and goes on without what came back."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a = GivesOfFirst(make)

    def forward(self, x: Tensor) -> Tensor:
        self.a(x, extra={"mask": None, "of": WithDefault(x + 1, "text")})
        return x * 2


class Constant(nn.Module):
    """Returns the same value, whatever comes."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Any) -> Any:
        return self.value


class Nothing(nn.Module):
    """Returns None."""

    def forward(self, x):
        return None


class NothingStatic(nn.Module):
    """Returns None, in a static method."""

    @staticmethod
    def forward(x):
        return None


class InPair(nn.Module):
    """Returns its argument twice."""

    def forward(self, x):
        return x, x


class WithNone(nn.Module):
    """Returns None beside its value."""

    def forward(self, x):
        return x * 1, None


class Several(nn.Module):
    """Returns what is used, what is not, and what has no gradient."""

    def forward(self, x):
        return x * 2, x * 3, x.argmax(-1), "text"


class UsesOne(nn.Module):
    """Uses one of the values of `Several`, and calls a layer without using what it returns."""

    def __init__(self):
        super().__init__()
        self.several = Several()
        self.aside = nn.Linear(4, 4)

    def forward(self, x):
        self.aside(x)
        return self.several(x)[0]


class WithNoneAndNothing(nn.Module):
    """Returns None beside its value, and calls a module that returns nothing but None."""

    def __init__(self):
        super().__init__()
        self.pair = WithNone()
        self.nothing = NothingStatic()

    def forward(self, x):
        return self.pair(x)[0] if self.nothing(x) is None else None


class AroundAndUses(nn.Module):
    """`use` of what the module `m` makes of `x * 1`; with the argument, if it asks for that."""

    def __init__(self, m, use):
        super().__init__()
        self.m = m
        self.use = use

    def forward(self, x):
        x = x * 1
        return self.use(self.m(x), x)


class UsesTwice(nn.Module):
    """Gives its argument to `m`, and uses it again, before and after."""

    def __init__(self):
        super().__init__()
        self.m = Gives(lambda x: x * x)

    def forward(self, x):
        before = x.sin()
        return before + self.m(x) + 5 * x


class Joins(nn.Module):
    """Returns what `join` makes of its two arguments."""

    def __init__(self, join):
        super().__init__()
        self.join = join

    def forward(self, a, b):
        return self.join(a * 1, b * 1)


class UsesJoined(nn.Module):
    """Uses both values of `Joins`, in whatever they come."""

    def __init__(self, join):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.inner = Joins(join)

    def forward(self, x):
        found = self.inner(self.first(x), self.second(x))
        one, other = found if isinstance(found, tuple) else found.values()
        return one.sin() * (other[0] if isinstance(other, tuple) else other)


class Through(nn.Module):
    """Containers that return the very value of their child, and modules that return their very input."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Identity()))
        self.last = nn.Sequential(nn.Identity(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.outer(x))


class Yields(nn.Module):
    """A forward that is a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.child = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            yield self.child(x) * self.scale


class Awaited(nn.Module):
    """A forward that is a coroutine."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    async def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class GoesThrough(nn.Module):
    """Adds what its child yields."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.child(x))  # type: ignore[return-value]
