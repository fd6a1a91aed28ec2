"""Tensors that a module computes from its parameters before it uses them: parametrized ones, and those of pre-hooks."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from nicehooks import torch_private_tensors
from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Companion
from nicehooks.core.rules import Action, OutputRule, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.paths.ports import Port
from nicehooks.ports.overrides import Override, StandIn


class Parametrizations(Companion):
    """Notices when a parametrization is another one, or is taken away."""

    def moved(self) -> list[ParametrizedRule]:
        return [rule for rule in self.rules if rule.has_moved()]


class WhileRunning(Rule):
    """Says whether the model, or a module that holds a computed parameter, runs here; see `ParametrizedRule`."""

    __slots__ = ("index", "is_swapped")

    def __init__(self, site: Site) -> None:
        self.index = (id(site.module), site.path.port.name)  # of what is computed, as torch's own cache has it
        self.is_swapped = False

    def before(self, frame: Frame) -> None:
        if not Override.is_open(self):
            frame.enter(Override(self, [], None))
            frame.enter(torch_private_tensors.ComputedAnew(self.index))

    def after(self, frame: Frame) -> None:
        pass


class ParametrizedRule(OutputRule):
    """A parametrized tensor: what its parametrization computes while the model runs, or a module that holds it.

    Who reads it at other times, to make it a plain parameter again, say, gets the model's own.
    """

    companion = Parametrizations
    __slots__ = ("owner", "parametrization", "running")
    reusable = False
    output_only = False

    def __init__(self, site: Site, action: Action, when: When) -> None:
        super().__init__(site, action, when)
        self.running = WhileRunning(site)
        owner: Any = site.module
        self.owner, self.parametrization = weakref.ref(owner), weakref.ref(owner.parametrizations[site.path.port.name])

    def has_moved(self) -> bool:
        """Whether something else computes the tensor by now, or nothing."""
        parametrizations: Any = getattr(self.owner(), "parametrizations", {})
        name = self.path.port.name
        return name not in parametrizations or parametrizations[name] is not self.parametrization()

    def after(self, frame: Frame) -> None:
        if Override.is_open(self.running):
            super().after(frame)


class AttributeRule(SiteRule):
    """A tensor that a pre-hook of the module computes and keeps as a plain attribute, as `weight_norm` does."""

    __slots__ = ()
    reason = "the module that owns it was not called, and {name!r} is there only while it runs."

    def why_not_reached(self) -> str:
        return self.reason.format(name=self.path.port.name)

    def before(self, frame: Frame) -> None:
        self.number(frame)
        name = self.path.port.name
        old = getattr(frame.module, name)
        new = self.through(frame, old)
        if new is not old:
            frame.module = frame.enter(StandIn(frame.module, {name: new}))

    def after(self, frame: Frame) -> None:
        pass


def refuse_what_hooks_read(site: Site) -> None:
    """Raises `UnsupportedModule` for what a pre-hook of its module computes another tensor from.

    The pre-hook runs before the forward does, and so before anything that is around the forward alone.
    """
    module, name = site.module, site.path.port.name
    for computed in torch_private_tensors.made_by_pre_hooks(module):
        if name.startswith(f"{computed}_"):
            fix = str(site.at(replace(site.path, port=Port(site.path.port.kind, computed), chain=())))
            kind = type(module).__name__
            raise UnsupportedModule(READ_BY_HOOK.format(site=str(site), kind=kind, computed=computed, fix=fix))


READ_BY_HOOK = (
    "{site!r}: a pre-hook of this {kind} computes {computed!r} from it, before the forward begins in which it could be "
    "another one. Change what is computed, {fix!r}, or enter the context on a model that this module is a part of, and "
    "call that."
)
