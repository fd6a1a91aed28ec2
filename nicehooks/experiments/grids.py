"""The grid of an experiment: its cells, a path each, and the axes along which their paths differ.

NOTE [How paths become axes]
A path is taken apart into columns: its name with the numbers left out (`h.*.attn`), each number in the name, the number
of the call, each item of its subscripts. The columns that differ between the cells are the axes, if there is a cell for
each combination of their labels. Otherwise the grid is ragged, and has one axis, of paths. A `*` is an axis even where
there is only one index. A name, or a second number in it, that another column decides is no axis: in a hybrid model the
number of the layer says whether it is a `mixer` or an `attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.core.selection import Group, Site, Where, select_groups
from nicehooks.errors import SiteNotFound, SiteNotReached, TreeMismatch
from nicehooks.experiments.effects import Axis, is_grid
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.ports import EVERY_CALL
from nicehooks.values import trees
from nicehooks.values.trees import STAR, Chain, Heads, Rows, items_of


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


def grid_of(model: nn.Module, where: Where, seen: ActivationCache, verb: str = "sweep") -> Grid:
    """The grid of the sites that `where` selects in `model`, each `*` in it filled in.

    >>> import torch
    >>> from nicehooks import capture
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with capture(model, *stems_of(model, "*[:, *]"), keep="all") as seen:
    ...     _ = model(torch.ones(5, 2))
    >>> grid = grid_of(model, "*[:, *]", seen)
    >>> grid.axes
    (Axis(name='layer', labels=('0', '1')), Axis(name='neuron', labels=('0', '1', '2')))
    >>> grid.sites[:3]
    ('0[:, 0]', '0[:, 1]', '0[:, 2]')

    Args:
        model: any module.
        where: paths, sites, … (see `select`).
        seen: the values at `stems_of(model, where)`, captured with `keep="all"`.
        verb: who asks, for messages.
    """
    found: dict[str, Cell] = {}
    wild = False
    for group in select_groups(model, where, verb):
        sites = [one for site in group.sites for one in _each_call_in_forward(site, seen)]
        reached = [site for site in sites if not group.wild or str(_recorded_at(site)) in seen]
        wild = wild or group.wild
        for cell in [cell for site in reached for cell in _cells_at(site, seen)]:
            found.setdefault(str(cell.path), cell)
    return _with_axes(list(found.values()), wild)


def stems_of(model: nn.Module, where: Where, verb: str = "sweep") -> list[Group]:
    """The sites of the values around those that `where` selects: what `capture` takes to have each `*` filled in."""
    groups = select_groups(model, where, verb)
    if not any([group.sites for group in groups]):
        raise SiteNotFound(f"{verb}(model, where, …): where selects nothing, so there is no effect to measure.")
    return [group._replace(sites=[site.at(_recorded_at(site)) for site in group.sites]) for group in groups]


def stem_of(path: ModulePath) -> ModulePath:
    """The path of the value that `path` has its region in: up to the first subscript of a tensor.

    >>> str(stem_of(ModulePath.parse("h.3.attn@input[0]/12[:, :, *]"))), str(stem_of(ModulePath.parse("lstm[0][:, 1]")))
    ('h.3.attn@input[0]/12', 'lstm[0]')
    """
    keys = [isinstance(step, Heads | Rows | str) or type(step) is int for step in path.chain]
    count = keys.index(False) if False in keys else len(keys)
    return replace(path, chain=path.chain[:count])


def _recorded_at(site: Site) -> ModulePath:
    return replace(stem_of(site.path), call=None)


def _each_call_in_forward(site: Site, seen: ActivationCache) -> Iterator[Site]:
    """`site`, or where it is every call of a function, or every use of a parameter, that of each."""
    if site.path.port.call != EVERY_CALL:
        yield site
        return
    for key in seen.select(str(_recorded_at(site))):
        yield site.at(replace(ModulePath.parse(key), call=site.path.call, chain=site.path.chain))


# --- cells ------------------------------------------------------------------------------------------------------------


def _cells_at(site: Site, seen: ActivationCache) -> Iterator[Cell]:
    """A cell for each call and for each index that the path of `site` has a `*` for."""
    stem = stem_of(site.path)
    values = seen.calls(_recorded_at(site))
    every = site.path.call == EVERY_CALL
    last: Any = len(values) - 1 if site.path.call is None else site.path.call
    if not every and last >= len(values):
        raise SiteNotReached(NOT_SO_OFTEN.format(path=site, count=len(values)))
    for call in range(len(values)) if every else [last]:
        at, value = replace(stem, call=call if every else site.path.call), values[call]
        named, dimensions = tuple(_columns_of_name(site, at)), _names_of_dimensions(at, value)
        for chain in _chains_at(site, value, site.path.chain[len(stem.chain) :]):
            path = replace(at, chain=(*stem.chain, *chain))
            yield Cell(site, path, at, chain, (*named, *_columns_of_chain(site, at, chain, value, dimensions)))


NOT_SO_OFTEN = "{path!s} was never reached: its module was called, but only {count} times in a run."


def _chains_at(site: Site, value: Any, chain: Chain) -> list[Chain]:
    """The chains that `chain` stands for in `value`, each of which leads to something."""
    try:
        chains = list(trees.each_index(value, chain))
        trees.get(value, chains[0] if chains else ())
    except TreeMismatch as error:
        raise TreeMismatch(f"{str(site)!r}: {error}.") from None
    return chains


def _columns_of_name(site: Site, stem: ModulePath) -> Iterator[Column]:
    """What the name of a cell says, and the number of its call, place by place."""
    parts = stem.plain_name.split(".")
    skeleton = ".".join(["*" if part.isdigit() else part for part in parts])
    yield Column("module", "module", f"{skeleton}{stem.port}{stem.subscripts}", False)
    for count, (before, number) in enumerate(_numbers_in(parts)):
        yield Column(f"number {count}", before, number, False)
    yield Column("call", "call", str(stem.call), site.path.call == EVERY_CALL)


def _columns_of_chain(
    site: Site, stem: ModulePath, chain: Chain, value: Any, names: tuple[str, ...]
) -> Iterator[Column]:
    """What the `chain` from a `stem` to a cell says, place by place; `names` are those of the dimensions of `value`."""
    asked = site.path.chain[len(stem.chain) :]
    for number, (step, own) in enumerate(zip(asked, chain, strict=True)):
        items = items_of(own)
        for place, (star, item) in enumerate(zip(items_of(step), items, strict=True)):
            name = names[place] if place < len(names) else "element"
            yield Column(f"step {number} item {place}", name, _shown_label(item), star is STAR)
        if number + 1 < len(chain):
            was_tensor, value = isinstance(value, Tensor), trees.get(value, (own,))
            names = _left(names, items) if was_tensor else _names_of_dimensions(replace(stem, chain=()), value)


def _numbers_in(parts: list[str]) -> Iterator[tuple[str, str]]:
    """Each number in a name: the first is that of a layer, the others are called by what stands before them."""
    before = "layer"
    for at, part in enumerate(parts):
        if part.isdigit():
            yield before, part
            before = "index"
        elif at + 1 < len(parts) and parts[at + 1].isdigit() and before != "layer":
            before = part.removesuffix("s")


_NAMES = {
    1: ("neuron",),
    2: ("example", "neuron"),
    3: ("example", "position", "neuron"),
    4: ("example", "channel", "row", "column"),
}
_OF_CALLS = {**_NAMES, 4: ("example", "head", "query", "key")}


def _names_of_dimensions(path: ModulePath, value: Any) -> tuple[str, ...]:
    """What the dimensions of the tensor at `path` mean, as far as its port and their number tell."""
    if not isinstance(value, Tensor):
        return ()
    if path.chain and isinstance(path.chain[-1], Heads):
        return (*_NAMES.get(value.ndim - 1, ())[:-1], "head", "neuron")
    is_call = str(path.port).endswith(")") or ")." in str(path.port)
    if path.port.name and not is_call:  # a parameter
        return ("row", "column") if value.ndim == 2 else _NAMES.get(value.ndim, ()) if value.ndim == 1 else ()
    return (_OF_CALLS if is_call else _NAMES).get(value.ndim, ())


def _left(names: tuple[str, ...], items: Sequence[Any]) -> tuple[str, ...]:
    """The names of the dimensions that an index leaves."""
    taken = {place for place, item in enumerate(items) if type(item) is int}
    return tuple([name for place, name in enumerate(names) if place not in taken])


def _shown_label(item: Any) -> str:
    return item if isinstance(item, str) else trees.show_step(item).strip("[]")


# --- axes -------------------------------------------------------------------------------------------------------------


def _with_axes(cells: list[Cell], wild: bool) -> Grid:
    """The cells in order, with the axes that their columns give."""
    columns = _by_place(cells)
    kept = [column for column in columns.values() if _varies(column) or _is_asked_for(column, wild)]
    kept = [column for column in kept if not _is_decided(column, kept)]
    rows = list(zip(*[[item.label for item in column] for column in kept], strict=True))
    if not rows or not is_grid(rows):
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
    return {place: [of.get(place, empty[place]._replace(label="")) for of in having] for place in places}


def _rank(place: str) -> tuple[int, str]:
    kinds = ("module", "number", "call", "step")
    return kinds.index(place.split()[0]), place


def _varies(column: Iterable[Column]) -> bool:
    return len({item.label for item in column}) > 1


def _is_asked_for(column: list[Column], wild: bool) -> bool:
    return column[0].starred or (wild and column[0].place == "number 0")


def _is_decided(column: list[Column], others: list[list[Column]]) -> bool:
    """Whether the name follows from its first number, or another number from that or from the name."""
    place = column[0].place
    by = {"module": ("number 0",), "number": ("number 0", "module")}.get(place.split()[0], ())
    return place != "number 0" and any([_decides(other, column) for other in others if other[0].place in by])


def _decides(one: list[Column], other: list[Column]) -> bool:
    pairs = {(a.label, b.label) for a, b in zip(one, other, strict=True)}
    return len(pairs) == len({a for a, _ in pairs})


def _once_each(names: list[str]) -> list[str]:
    """The names, with a number behind those that came before."""
    return [name if name not in names[:at] else f"{name} {names[:at].count(name) + 1}" for at, name in enumerate(names)]
