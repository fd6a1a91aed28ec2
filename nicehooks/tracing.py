"""Entering and leaving a context inside code that is being traced by `torch.compile`.

NOTE [Inside compiled code]
Dynamo follows what a traced function does to Python objects, and does it to them when the compiled function has run. So
entering a context in traced code puts the taps into the modules as it always does, and leaving takes them out again:
what is left to be done afterwards is nothing. Two things are different. What depends on the model and on text alone is
found out once, while Dynamo traces (`evaluated_while_tracing`). And rules go into a place of their own in a tap
(`Tap.traced`): nobody else sees them, so they need no session that is told from others.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from nicehooks import internals, sessions
from nicehooks.paths import ModulePath
from nicehooks.selection import Group, Site, Where, flat, select_groups


class _Place(NamedTuple):
    """What is known of a site before it is looked up in the code that is traced: the keys that lead to its module."""

    name: str
    keys: tuple[str, ...]
    path: ModulePath


def groups_of(model: nn.Module, where: Where, verb: str) -> list[Group]:
    """`select_groups`, in code that is being traced.

    The modules are looked up by that code itself, so that Dynamo knows where they come from and can guard them.
    """
    groups: list[Group] = []
    for item in flat(where):
        places, wild = _places_of(model, item, verb)
        sites = [Site(place.name, _module_at(model, place.keys), place.path, model) for place in places]
        groups.append(Group(item, sites, wild))
    return groups


def _module_at(model: nn.Module, keys: tuple[str, ...]) -> nn.Module:
    for key in keys:
        model = model._modules[key]  # pyright: ignore[reportAssignmentType]
    return model


@internals.evaluated_while_tracing
def _places_of(model: nn.Module, item: Where, verb: str) -> tuple[list[_Place], bool]:
    sessions.teach_dynamo()
    names = {id(module): name for name, module in model.named_modules()}
    (group,) = select_groups(model, [item], verb)
    return [_Place(site.name, _keys(names[id(site.module)]), site.path) for site in group.sites], group.wild


def _keys(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()
