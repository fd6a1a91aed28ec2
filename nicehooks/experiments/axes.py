"""The cells of a grid, and the axes along which their paths differ.

NOTE [How paths become axes]
A path is taken apart into columns: the part of the anatomy that it is, its name with the numbers left out (`h.*.attn`),
each number in the name, the number of the call, each item of its subscripts. The columns that differ between the cells
are the axes, if there is a cell for each combination of their labels. Otherwise the grid is ragged, and has one axis,
of paths; so it has where only some of the paths have a number of a layer. A `*` is an axis even where there is only one
index. A name, or a second number in it, that another column decides is no axis: in a hybrid model the number of the
layer says whether it is a `mixer` or an `attention`, and a part says where in one projection it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from nicehooks.core.selection import Site
from nicehooks.experiments.effects import Axis, is_grid
from nicehooks.paths.grammar import ModulePath
from nicehooks.values.trees import Chain


class Cell(NamedTuple):
    """One cell of a grid: a place that one intervention of many acts at.

    Attributes:
        site: where it was selected; its path may have a `*` still.
        path: of the cell, without any `*`.
        stem: the path of the value around it that is recorded: the path up to its first subscript of a tensor.
        chain: the subscripts that lead from there to the cell.
        columns: what tells it from others; see NOTE [How paths become axes].
    """

    site: Site
    path: ModulePath
    stem: ModulePath
    chain: Chain
    columns: tuple[Column, ...]

    @property
    def comes_by(self) -> bool:
        """Whether what is there comes by in a call of the module, and is no parameter of it."""
        return not self.path.port.name or "()" in str(self.path.port)


class Column(NamedTuple):
    """What a path says in one place: `position`, say, is `3`.

    Attributes:
        place: the same for the columns that are compared with each other.
        name: of the axis that it may become.
        label: what the path says there.
        starred: whether the path that was asked for has a `*` there.
    """

    place: str
    name: str
    label: str
    starred: bool


class Grid(NamedTuple):
    """The cells of an experiment in the order of `values.flatten()`, and their axes."""

    cells: tuple[Cell, ...]
    axes: tuple[Axis, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the cells."""
        return tuple([str(cell.path) for cell in self.cells])


def with_axes(cells: list[Cell], wild: bool) -> Grid:
    """The cells in order, with the axes that their columns give."""
    columns = _by_place(cells)
    kept = [column for column in columns.values() if _varies(column) or _is_asked_for(column, wild)]
    kept = [column for column in kept if not _is_decided(column, kept)]
    rows = list(zip(*[[item.label for item in column] for column in kept], strict=True))
    absent = any([item.label == ABSENT for column in kept for item in column])
    if not rows or absent or not is_grid(rows):
        return Grid(tuple(cells), (Axis("site", tuple([str(cell.path) for cell in cells])),))
    labels = [tuple(dict.fromkeys([item.label for item in column])) for column in kept]
    names = _once_each([column[0].name for column in kept])
    at = dict(zip(rows, cells, strict=True))
    return Grid(tuple([at[row] for row in product(*labels)]), tuple(map(Axis, names, labels)))


def _by_place(cells: list[Cell]) -> dict[str, list[Column]]:
    """The columns of all cells; one that a cell does not have is empty there."""
    having = [{column.place: column for column in cell.columns} for cell in cells]
    places = sorted({place: None for of in having for place in of}, key=_rank)
    empty = {place: next(of[place] for of in having if place in of) for place in places}
    return {place: [of.get(place, empty[place]._replace(label=ABSENT)) for of in having] for place in places}


ABSENT = ""
"""The label where a cell does not have a column that others have."""


def _rank(place: str) -> tuple[int, str]:
    kinds = ("part", "module", "number", "call", "step")
    return kinds.index(place.split()[0]), place


def _varies(column: Iterable[Column]) -> bool:
    return len({item.label for item in column}) > 1


def _is_asked_for(column: list[Column], wild: bool) -> bool:
    return column[0].starred or (wild and column[0].place == "number 0")


def _is_decided(column: list[Column], others: list[list[Column]]) -> bool:
    """Whether the part or the name follows from its first number, or another number or a subscript from these."""
    place = column[0].place
    by = DECIDED_BY.get(place.split()[0], ())
    return (
        place != "number 0"
        and not column[0].starred
        and any([_decides(other, column) for other in others if other[0].place in by])
    )


DECIDED_BY = {
    "part": ("number 0",),
    "module": ("number 0", "part"),
    "number": ("number 0", "part", "module"),
    "step": ("part",),
}
"""By the kind of a column, the places of those that may decide it."""


def _decides(one: list[Column], other: list[Column]) -> bool:
    pairs = {(a.label, b.label) for a, b in zip(one, other, strict=True)}
    return len(pairs) == len({a for a, _ in pairs})


def _once_each(names: list[str]) -> list[str]:
    """The names, with a number behind those that came before."""
    return [name if name not in names[:at] else f"{name} {names[:at].count(name) + 1}" for at, name in enumerate(names)]
