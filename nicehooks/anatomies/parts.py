"""A part of a transformer, which is a path, and the same part of every layer, which is a sequence of paths."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

from nicehooks.errors import SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.ports import Port
from nicehooks.values.trees import STAR, show_step


@dataclass(frozen=True, eq=False, repr=False)
class Part(ModulePath):
    """The path of one part of a transformer: it goes wherever a path goes, and equals its own text.

    >>> z = Part.at("h.9.attn.c_proj@input[0]/12", what="z[9]", heads=12)
    >>> str(z.head(6)), str(z.head(6)[:, -1])
    ('h.9.attn.c_proj@input[0]/12[:, :, 6]', 'h.9.attn.c_proj@input[0]/12[:, :, 6][:, -1]')

    Attributes:
        what: how the part is asked for, `"z[9]"`.
        heads: how many heads it has, if it has heads.
        head_dim: the dimension that counts them.
    """

    what: str = ""
    heads: int | None = None
    head_dim: int = 2

    __iter__: Any = None  # pyright: ignore[reportIncompatibleMethodOverride]  # subscripts lengthen the path: without this, Python would try 0, 1, 2, … for ever

    @staticmethod
    def at(path: str | ModulePath, what: str = "", heads: int | None = None, head_dim: int = 2) -> Part:
        """The part at `path`."""
        read = ModulePath.parse(str(path))
        return Part(read.name, read.call, read.port, read.chain, what, heads, head_dim)

    def __getitem__(self, index: Any) -> Part:
        """The part with one more subscript, as on its value: `resid_post[5][:, -1]` is its last position."""
        step = show_step(plain(index))
        return Part.at(f"{self}{step}", f"{self.what}{step}")

    def head(self, index: int | slice | list[int]) -> Part:
        """One head (an int, without its dimension), or several (a slice or a list).

        For `k` and `v` under grouped-query attention these are the heads of keys and values.

        Raises:
            SiteNotFound: the part has no heads, or not so many.
        """
        if self.heads is None:
            raise SiteNotFound(NO_HEADS.format(what=self.what or self))
        index = plain(index)
        for one in [index] if isinstance(index, int) else index if isinstance(index, list) else []:
            if not -self.heads <= one < self.heads:
                raise SiteNotFound(f"{self.what} has {self.heads} heads, 0 … {self.heads - 1}, and no head {one}.")
        step = (*[slice(None)] * self.head_dim, index)
        return Part.at(f"{self}{show_step(step)}", f"{self.what}.head({index})")

    @property
    def each_head(self) -> Part:
        """One site per head: the part with a `*` in the place of the head.

        >>> Part.at("h.9.attn.c_proj@input[0]/12", what="z[9]", heads=12).each_head
        Part('h.9.attn.c_proj@input[0]/12[:, :, *]')
        """
        if self.heads is None:
            raise SiteNotFound(NO_HEADS.format(what=self.what or self))
        step = (*[slice(None)] * self.head_dim, STAR)
        return Part.at(f"{self}{show_step(step)}", f"{self.what}.each_head")

    @property
    def grad(self) -> Part:
        """The gradient at the same place.

        >>> Part.at("h.9.attn.c_proj@input[0]/12").grad, Part.at("h.9").grad, Part.at("h.9.attn@softmax()").grad
        (Part('h.9.attn.c_proj@input.grad[0]/12'), Part('h.9@grad'), Part('h.9.attn@softmax().grad'))
        """
        own = ModulePath(self.name, self.call, gradient_of(self.port), self.chain)
        return Part.at(own, f"{self.what}.grad", self.heads, self.head_dim)

    def __eq__(self, other: object) -> bool:
        return str(self) == other if isinstance(other, str) else super().__eq__(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"Part({str(self)!r})"

    def __reduce__(self) -> Any:
        return Part.at, (str(self), self.what, self.heads, self.head_dim)


class Parts(tuple[Part, ...]):
    """One part of every layer: a sequence of paths, which goes wherever several paths go.

    >>> both = Parts([Part.at("h.0", "resid_post[0]"), Part.at("h.1", "resid_post[1]")], "resid_post")
    >>> both[-1], len(both[1:]), both.at[:, -1]
    (Part('h.1'), 1, Parts('h.0[:, -1]', 'h.1[:, -1]'))

    Where some layers have no such part, the others are found by the numbers of their layers all the same.

    Attributes:
        what: how the sequence is asked for, `"resid_post"`.
        layers: the layers that have the part, by number.
        n_layers: how many layers there are, with and without it.
    """

    what: str
    layers: tuple[int, ...]
    n_layers: int

    def __new__(
        cls, parts: Iterable[Part], what: str = "", numbers: tuple[tuple[int, ...], int] | None = None
    ) -> Parts:
        """A sequence of `parts`; `what` is how they are asked for, `numbers` those of their layers, and of all."""
        made = super().__new__(cls, parts)
        made.what = what
        made.layers, made.n_layers = numbers or (tuple(range(len(made))), len(made))
        return made

    @overload
    def __getitem__(self, index: SupportsIndex) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> Parts: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._slice(index)
        try:
            number = operator.index(index)
        except TypeError:
            raise SiteNotFound(LAYER_FIRST.format(what=self.what, step=show_step(index))) from None
        if not -self.n_layers <= number < self.n_layers:
            raise SiteNotFound(
                NO_LAYER.format(what=self.what, count=self.n_layers, last=self.n_layers - 1, index=index)
            )
        number %= self.n_layers
        if number not in self.layers:
            raise SiteNotFound(
                NOT_IN_LAYER.format(what=self.what, index=number, layers=", ".join(map(str, self.layers)))
            )
        return super().__getitem__(self.layers.index(number))

    def _slice(self, index: slice) -> Parts:
        """The layers in the slice that have the part; they are numbered from there on."""
        chosen = range(self.n_layers)[index]
        there = [(place, layer) for place, layer in enumerate(chosen) if layer in self.layers]
        every = (super(Parts, self).__getitem__(self.layers.index(layer)) for _, layer in there)
        return Parts(every, f"{self.what}{show_step(index)}", (tuple(place for place, _ in there), len(chosen)))

    @property
    def at(self) -> AtIndex:
        """The same subscript in every layer: `resid_post.at[:, -1]`."""
        return AtIndex(self)

    @property
    def grad(self) -> Parts:
        """The gradients in every layer; see `Part.grad`."""
        return self._each(lambda part: part.grad, ".grad")

    @property
    def each_head(self) -> Parts:
        """One site per head in every layer, layers × heads; see `Part.each_head`."""
        return self._each(lambda part: part.each_head, ".each_head")

    def head(self, index: int | slice | list[int]) -> Parts:
        """The head `index` in every layer; see `Part.head`."""
        return self._each(lambda part: part.head(index), f".head({index})")

    def _each(self, change: Callable[[Part], Part], more: str) -> Parts:
        return Parts(map(change, self), f"{self.what}{more}", (self.layers, self.n_layers))

    def __repr__(self) -> str:
        return f"Parts({', '.join(map(repr, map(str, self)))})"

    def __reduce__(self) -> Any:
        return Parts, (list(self), self.what, (self.layers, self.n_layers))


class AtIndex:
    """Takes the same subscript of a part in every layer."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __getitem__(self, index: Any) -> Parts:
        more = f".at{show_step(plain(index))}"
        parts = self._parts
        return Parts((part[index] for part in parts), f"{parts.what}{more}", (parts.layers, parts.n_layers))


def plain(index: Any) -> Any:
    """`index` in numbers of Python's own: those that a tensor or an array holds are written in a path like others."""
    if isinstance(index, tuple | list):
        return type(index)([plain(each) for each in index])
    if isinstance(index, slice):
        return slice(plain(index.start), plain(index.stop), plain(index.step))
    return index.tolist() if hasattr(index, "tolist") else index


def gradient_of(port: Port) -> Port:
    """The port of the gradient of what is at `port`.

    Raises:
        PathError: it has none.
    """
    return ModulePath.parse(f"{port}{'.' if str(port) else '@'}grad").port


NO_HEADS = (
    "{what} is not split into heads (q, k, v, scores, pattern and z are).\n"
    "  A part of it has its head taken before other subscripts: z[3].head(5)[:, -1]"
)

NO_LAYER = "{what}[{index}]: there are {count} layers, 0 … {last}."

NOT_IN_LAYER = "{what}[{index}]: layer {index} has none; the layers that have one: {layers}."

LAYER_FIRST = (
    "{what}{step}: the first subscript of {what} is the layer, a number or a slice; those of the value come after it:\n"
    "    {what}[0]{step}"
)
