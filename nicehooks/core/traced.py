"""Entering and leaving a context inside code that is being traced by `torch.compile`.

NOTE [Inside compiled code]
Dynamo follows what a traced function does to Python objects, and does it to them when the compiled function has run. So
entering a context in traced code puts taps into the modules, and leaving takes them out again: what is left to be done
afterwards is nothing. Three things are different from eager code. What depends on the model and on text alone is found
out once, while Dynamo traces (`evaluated_while_tracing`). The rules are in a table of the thread, and not in the taps:
nobody else sees them, so they need no session that is told from others. And a module whose own tap is not in its place
gets one that lives as long as the traced code (`_TracedTap`): Dynamo can only guard what it knows the way to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from nicehooks import torch_private
from nicehooks.core.children import further_children
from nicehooks.core.frames import Rule, staged
from nicehooks.core.register import Pairs
from nicehooks.core.selection import Group, Site, Where, flat, select_groups
from nicehooks.core.sessions import HERE
from nicehooks.core.tap import acting_in_traced_code, is_bound, parameters_of
from nicehooks.core.walking import joined
from nicehooks.paths.grammar import ModulePath


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
        child: Any = model._modules[key] if key in model._modules else getattr(model, key)  # the module of a method
        model = child
    return model


@torch_private.evaluated_while_tracing
def _places_of(model: nn.Module, item: Where, verb: str) -> tuple[list[_Place], bool]:
    names = {id(module): name for name, module in model.named_modules()}
    names |= {id(m): joined(names[id(owner)], key) for owner in model.modules() for key, m in further_children(owner)}
    (group,) = select_groups(model, [item], verb)
    ways = [tuple(filter(None, names[id(site.module)].split("."))) for site in group.sites]
    places = [_Place(site.name, way, _unshared(site.path)) for way, site in zip(ways, group.sites, strict=True)]
    return places, group.wild


def _unshared(path: ModulePath) -> ModulePath:
    """A path that nobody else has: what Dynamo meets in two places it guards, and here it knows no way to the one."""
    own = replace(path, port=replace(path.port))
    str(own)  # is remembered, so that traced code need not find it out
    return own


# --- binding ----------------------------------------------------------------------------------------------------------


class _TracedTap:
    """Stands in for the forward of a module whose own tap is not in its place."""

    def __init__(self, module: nn.Module) -> None:
        self.of = module
        self.previous: Any = module.__dict__.get("forward")
        self.parameters = _parameters_at(module)
        self.attached: tuple[Rule, ...] = ()
        self.mixed = False

    def module(self) -> nn.Module:
        return self.of

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


def _traced_forward_of(tap: _TracedTap) -> Callable[..., Any]:
    return lambda *args, **kwargs: staged(tap, acting_in_traced_code(tap), args, kwargs)


@torch_private.evaluated_while_tracing
def _parameters_at(module: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    return parameters_of(inspect.signature(module.forward))


@torch_private.evaluated_while_tracing
def _has_tap(module: nn.Module) -> bool:
    return is_bound(module)


def bind_traced(pairs: Pairs, first: bool = False) -> None:
    """Adds each rule to its module: behind those that traced code has entered before, or before them."""
    for module, rule in reversed(pairs) if first else pairs:
        found = HERE.traced.get(id(module))
        forward, rules = (module.__dict__.get("forward"), ()) if found is None else found
        if found is None and not _has_tap(module):
            module.__dict__["forward"] = _traced_forward_of(_TracedTap(module))
        HERE.traced[id(module)] = (forward, (rule, *rules) if first else (*rules, rule))


def unbind_traced(pairs: Pairs) -> None:
    """Takes each rule away again; the last one to go puts the module's own forward back."""
    for module, rule in pairs:
        forward, rules = HERE.traced[id(module)]
        rules = tuple([other for other in rules if other is not rule])
        HERE.traced[id(module)] = (forward, rules)
        if rules:
            continue
        del HERE.traced[id(module)]
        if _has_tap(module):
            continue
        if forward is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = forward
