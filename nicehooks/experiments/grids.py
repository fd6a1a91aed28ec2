"""The grid of an experiment: a cell for each site, each `*` in it filled in; see NOTE [How paths become axes]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nicehooks.anatomies.parts import Part
from nicehooks.caches.cache import ActivationCache
from nicehooks.core.selection import Group, Site, Where, select_groups
from nicehooks.errors import SiteNotFound, SiteNotReached, TreeMismatch
from nicehooks.experiments.axes import Cell, Column, Grid, with_axes
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.ports import EVERY_CALL
from nicehooks.values import trees
from nicehooks.values.trees import STAR, Chain, Heads, Rows, items_of


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
    return with_axes(list(found.values()), wild)


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
    if isinstance(site.path, Part) and site.path.what:
        yield Column("part", "part", site.path.what.partition("[")[0], False)
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
            if isinstance(own, Heads):
                names = (*names[:-1], "head", "neuron")
                continue
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
    if value.ndim == 2 and not value.is_floating_point() and not value.is_complex():  # tokens, or their mask
        return ("example", "position")
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
