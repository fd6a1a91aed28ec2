"""The ports of parameters and buffers: `@weight`."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.core.rules import Action, OutputRule, SiteRule
from nicehooks.core.selection import Census, Site, has_forward
from nicehooks.core.tap import Frame, Rule
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.ports.overrides import Override, StandIn

FLAT_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
"""What an `nn.RNNBase` derives from its parameters and keeps in its `__dict__` (torch 2.4 … 2.13)."""


class ParameterRule(SiteRule):
    """A parameter or buffer, while the model or a module that holds it runs."""

    __slots__ = ("is_swapped", "places")

    def __init__(self, site: Site, action: Action, when: When, places: list[tuple[nn.Module, str]]) -> None:
        super().__init__(site, action, when)
        self.is_swapped = False
        self.places = [(weakref.ref(module), name) for module, name in places]

    def modules(self) -> list[nn.Module]:
        """The modules that hold the tensor."""
        return [reference() for reference, _ in self.places]  # pyright: ignore[reportReturnType] (they hold each other)

    def before(self, frame: Frame) -> None:
        if not Override.is_open(self):
            self.number(frame)
            old = getattr(self.site.module, self.path.port.name)
            new = self.through(frame, old)
            places = [(reference(), name) for reference, name in self.places]
            frame.enter(Override(self, places, None if new is old else new))  # pyright: ignore[reportArgumentType]
        if self.action.changes and not torch.compiler.is_compiling():
            self.note_checkpoint(search=not self.session.checkpointed)
        module = frame.tap.module()
        if isinstance(module, nn.RNNBase) and any([module is holder for holder in self.modules()]):
            frame.module = frame.enter(
                StandIn(module, {"_flat_weights": torch_private.flat_weights(module)}, FLAT_WEIGHTS)
            )

    def after(self, frame: Frame) -> None:
        pass


class AttributeRule(SiteRule):
    """A tensor that a pre-hook of the module computes and keeps as a plain attribute, as `weight_norm` does."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        self.number(frame)
        name = self.path.port.name
        old = getattr(frame.module, name)
        new = self.through(frame, old)
        if new is not old:
            frame.module = frame.enter(StandIn(frame.module, {name: new}))

    def after(self, frame: Frame) -> None:
        pass


def parameter_rules(site: Site, action: Action, when: When, root: nn.Module) -> list[tuple[nn.Module, Rule]]:
    """The rules for a site that is a parameter; see `ports.rules_for`."""
    owner, name = site.module, site.path.port.name
    if when.numbers_calls:
        raise UnsupportedModule(f"{str(site)!r}: a parameter has no calls; choose the steps of the model with steps=.")
    if name in getattr(owner, "parametrizations", {}):
        return [(owner.parametrizations[name], OutputRule(site, action, when))]  # type: ignore[index]
    if name in vars(owner):
        return [(owner, AttributeRule(site, action, when))]
    places = _places(owner, name, root)
    holders = [module for module, _ in places]
    around = [module for module in root.modules() if any(m is holder for m in module.modules() for holder in holders)]
    modules = {id(module): module for module in (root, *around, *holders)}
    rule = ParameterRule(site, action, when, places)
    return [(module, rule) for module in modules.values() if has_forward(module)]


def _places(owner: nn.Module, name: str, root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module and name below `root` that holds the very tensor which `owner` holds as `name`."""
    tensor = getattr(owner, name)
    modules = {id(module): module for module in (*Census(root).names.values(), owner)}
    places = [(owner, name)]
    for module in modules.values():
        for table in (module._parameters, module._buffers):
            places += [(module, n) for n, t in table.items() if t is tensor and not (module is owner and n == name)]
    return places
