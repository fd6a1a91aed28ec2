"""A part of a transformer, which is a path, and the same part of every layer, which is a sequence of paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

from nicehooks.errors import SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.values.trees import show_step


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
        step = show_step(index)
        return Part.at(f"{self}{step}", f"{self.what}{step}")

    def head(self, index: int | slice | list[int]) -> Part:
        """One head (an int, without its dimension), or several (a slice or a list).

        For `k` and `v` under grouped-query attention these are the heads of keys and values.

        Raises:
            SiteNotFound: the part has no heads, or not so many.
        """
        if self.heads is None:
            raise SiteNotFound(NO_HEADS.format(what=self.what or self))
        for one in [index] if isinstance(index, int) else index if isinstance(index, list) else []:
            if not -self.heads <= one < self.heads:
                raise SiteNotFound(f"{self.what} has {self.heads} heads, 0 … {self.heads - 1}, and no head {one}.")
        step = (*[slice(None)] * self.head_dim, index)
        return Part.at(f"{self}{show_step(step)}", f"{self.what}.head({index})")

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
    >>> both[-1], len(both[1:])
    (Part('h.1'), 1)
    """

    what: str

    def __new__(cls, parts: Iterable[Part], what: str = "") -> Parts:
        """A sequence of `parts`; `what` is how they are asked for."""
        made = super().__new__(cls, parts)
        made.what = what
        return made

    @overload
    def __getitem__(self, index: SupportsIndex) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> Parts: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Parts(super().__getitem__(index), f"{self.what}{show_step(index)}")
        try:
            return super().__getitem__(index)
        except IndexError:
            raise SiteNotFound(
                NO_LAYER.format(what=self.what, count=len(self), last=len(self) - 1, index=index)
            ) from None
        except TypeError:
            raise SiteNotFound(LAYER_FIRST.format(what=self.what, step=show_step(index))) from None

    def head(self, index: int | slice | list[int]) -> Parts:
        """The head `index` in every layer; see `Part.head`."""
        return self._each(lambda part: part.head(index), f".head({index})")

    def _each(self, change: Callable[[Part], Part], more: str) -> Parts:
        return Parts(map(change, self), f"{self.what}{more}")

    def __repr__(self) -> str:
        return f"Parts({', '.join(map(repr, map(str, self)))})"

    def __reduce__(self) -> Any:
        return Parts, (list(self), self.what)


NO_HEADS = (
    "{what} is not split into heads (q, k, v, scores, pattern and z are).\n"
    "  A part of it has its head taken before other subscripts: z[3].head(5)[:, -1]"
)

NO_LAYER = "{what}[{index}]: there are {count} layers, 0 … {last}."

LAYER_FIRST = (
    "{what}{step}: the first subscript of {what} is the layer, a number or a slice; those of the value come after it:\n"
    "    {what}[0]{step}"
)
