"""Modules that return trees, each of its own kind."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from gallery.returning import Constant, GivesStates, Nothing
from gallery.values import Box, Couple, Encoded, Output, Pair


class SeveralKinds(nn.Module):
    """`plus` is called twice; `tree` returns a tuple, `out` a `ModelOutput`; they run in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.out = GivesStates(lambda x: Output(logits=x + 20, states=(x, None)))
        self.tree = GivesStates(lambda x: (x, [x + 10, None]))
        self.plus = GivesStates(lambda x: x + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plus(self.plus(x))
        self.tree(x)
        return self.out(x).logits


class Couples(nn.Module):
    """Returns a named tuple."""

    def forward(self, x):
        return Couple(x * 2, [x, None])


class HasCouples(nn.Module):
    """Looks whether the named tuple is still one."""

    def __init__(self):
        super().__init__()
        self.part = Couples()

    def forward(self, x):
        out = self.part(x)
        assert type(out) is Couple and out.rest[1] is None
        return out.first + out.rest[0]


class WithWords(nn.Module):
    """Returns what is no tensor, too."""

    def forward(self, x):
        return x * 2, None, {"count": 3, "name": "mixed"}


class UsesWords(nn.Module):
    """Uses a number that came with a tensor, and calls what returns nothing."""

    def __init__(self):
        super().__init__()
        self.mixed = WithWords()
        self.nothing = Nothing()

    def forward(self, x):
        doubled, _, more = self.mixed(x)
        self.nothing(x)
        return doubled * more["count"]


class EachKind(nn.Module):
    """One module for each kind of value; `block` runs twice, once with its argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.pair = GivesStates(lambda x: Pair(x, x + 1))
        self.data = GivesStates(lambda x: Encoded(x, x[:, 0]))
        self.dict = GivesStates(lambda x: {"b": x, "a": x + 1})
        self.nested = GivesStates(lambda x: (x, (x + 1, [x + 2, None])))
        self.block = GivesStates(lambda x: x + 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = layer(x)
        for name in ("pair", "data", "dict", "nested"):
            self.get_submodule(name)(x)
        return self.block(hidden_states=self.block(x))


class Fixed(nn.Module):
    """`pair` returns a tuple, `fc` a tensor of 2 × 3, `out` a `ModelOutput`, `nothing` None."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.pair = Constant((tensor, None))
        self.out = Constant(Output(logits=tensor))
        self.nothing = Constant(None)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x), self.pair(x), self.out(x), self.nothing(x)


class Nest(nn.Module):
    """Returns every kind of container, in each other."""

    def forward(self, x: Tensor) -> Any:
        return Pair(x, [x * 2, None]), OrderedDict(b=x * 3, a=(x * 4,)), {"box": Box((x * 5, None))}


class Nested(nn.Module):
    """Takes apart what `Nest` returns, and looks whether each container is what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.nest = Nest()

    def forward(self, x: Tensor) -> Tensor:
        pair, ordered, boxed = self.nest(self.inner(x))
        assert type(pair) is Pair and type(ordered) is OrderedDict and type(boxed["box"]) is Box
        return pair.left + pair.right[0] + ordered["b"] + ordered["a"][0] + boxed["box"].content[0]
