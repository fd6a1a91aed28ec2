"""The ports of parameters and buffers: `@weight`."""

from __future__ import annotations

import inspect
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nicehooks import torch_private_tensors
from nicehooks.core.census import has_parameter, parameter_names
from nicehooks.core.frames import Frame
from nicehooks.core.register import Companion, Pairs, PortKind, register_port
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Session
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.paths.names import unescape
from nicehooks.paths.ports import Port, Words
from nicehooks.ports.computed_weights import AttributeRule, ParametrizedRule, refuse_what_hooks_read
from nicehooks.ports.holders import Holders, Holding, as_ids
from nicehooks.ports.overrides import Override, StandIn
from nicehooks.ports.tables import is_held, stand_in, step_back
from nicehooks.values import trees

FLAT_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
"""What an `nn.RNNBase` derives from its parameters and keeps in its `__dict__` (torch 2.4 … 2.13)."""


class Tables(Companion):
    """Puts a `Table` in the place of each that holds one of the parameters."""

    def begin(self, session: Session) -> None:
        for rule in self.rules:
            rule.was_read = False
        for module in self._holders():
            stand_in(module, session)

    def end(self, session: Session) -> None:
        for module in self._holders():
            step_back(module, session)

    def moved(self) -> list[ParameterRule]:
        root = self.rules[0].root()
        holders = None if root is None else Holders(root)
        return [] if holders is None else [rule for rule in self.rules if rule.has_moved(holders)]

    def _holders(self) -> list[nn.Module]:
        return list({id(module): module for rule in self.rules for module in rule.modules()}.values())


class ParameterRule(SiteRule):
    """A parameter or buffer, while the model or a module that holds it runs."""

    companion = Tables
    __slots__ = ("is_swapped", "places", "root", "was_missed", "was_read")

    def __init__(self, site: Site, action: Action, when: When, root: nn.Module, places: list[Holding]) -> None:
        super().__init__(site, action, when)
        self.is_swapped = False
        self.was_read = self.was_missed = False  # whether a module that holds it has run here, or only elsewhere
        self.root = weakref.ref(root)
        self.places = [(weakref.ref(module), name) for module, name in places]

    def modules(self) -> list[nn.Module]:
        """The modules that hold the tensor."""
        return [module for module, _ in self._held_as()]

    def was_reached(self, session: Session) -> bool:
        """A module that holds it may have run in another thread, where nothing acted."""
        return super().was_reached(session) and (self.was_read or not self.was_missed)

    def before(self, frame: Frame) -> None:
        if not Override.is_open(self) and (torch.compiler.is_compiling() or not self._comes_later(frame)):
            if self.action.changes and frame.tap.module() is self.site.module:
                refuse_what_hooks_read(self.site)
                _refuse_what_runs_later(self.site, self.site.module)
            self.number(frame)
            old = self._value()
            new = self._changed(frame, old)
            frame.enter(Override(self, self._held_as(), None if new is old else new))
        if self.action.changes and not torch.compiler.is_compiling():
            self.note_checkpoint(search=not self.session.checkpointed)
        module = frame.tap.module()
        is_holder = any([module is holder for holder in self.modules()])
        if is_holder and not torch.compiler.is_compiling():
            self.was_read = True
        if isinstance(module, nn.RNNBase) and is_holder:
            frame.module = frame.enter(
                StandIn(module, {"_flat_weights": torch_private_tensors.flat_weights(module)}, FLAT_WEIGHTS)
            )

    def _value(self) -> Any:
        """The tensor as the forward will read it."""
        module, name = self.site.module, self.path.port.name
        value = getattr(module, name)
        is_overwritten = not self.action.changes and module.training and name in module._buffers
        if torch.compiler.is_compiling():
            return value.clone() if is_overwritten else value
        if not any([is_held(holder, name_there) for holder, name_there in self._held_as()]):
            raise UnsupportedModule(GONE_FROM_TABLES.format(site=self.key, kind=type(module).__name__))
        if value.is_meta and any([hasattr(holder, "_hf_hook") for holder in self.modules()]):
            raise UnsupportedModule(OFFLOADED.format(site=self.key, kind=type(module).__name__))
        if not self.action.changes:
            lent = torch_private_tensors.is_lent_weights(module) and not trees.is_distributed(value)
            return value.clone() if lent or is_overwritten else value
        return value if type(value) in (nn.Parameter, Tensor) else numbers_of_parameter(value, self.key)

    def _comes_later(self, frame: Frame) -> bool:
        """Whether the weight is whole only as its module is called: a lazy one; under FSDP2, which brings it then."""
        here, holders = frame.tap.module(), self.modules()
        if any([here is holder for holder in holders]):
            return False
        if is_lazy(getattr(self.site.module, self.path.port.name)):
            return True
        if not self.action.changes:
            return False
        lent = [(holder, name) for holder, name in self._held_as() if torch_private_tensors.is_lent_weights(holder)]
        return any([trees.is_distributed(getattr(holder, name)) for holder, name in lent])

    def _held_as(self) -> list[Holding]:
        """The modules that hold the tensor and are still there, and its name in each."""
        found = [(reference(), name) for reference, name in self.places]
        return [(module, name) for module, name in found if module is not None]

    def has_moved(self, holders: Holders) -> bool:
        """Whether other modules hold the tensor by now than when the rule was made."""
        places = self._held_as()
        if len(places) < len(self.places):
            return True
        now = holders.of(*places[0])
        return not now or (self.action.changes and as_ids(now) != as_ids(places))

    def _changed(self, frame: Frame, old: torch.Tensor) -> Any:
        """`old` after the action; a function that writes in place must not reach the model's own parameter."""
        if not self.action.may_write or torch.compiler.is_compiling():
            return self.through(frame, old)
        copy = old.clone()
        new = self.through(frame, copy)
        return old if new is copy and torch.equal(copy, old) else new

    def after(self, frame: Frame) -> None:
        if not torch.compiler.is_compiling() and self.session.elsewhere:
            self.was_missed = True


def _refuse_what_runs_later(site: Site, module: nn.Module) -> None:
    """Raises `UnsupportedModule` if nothing of the forward of `module` has run when the call of it is over."""
    forward = type(module).forward
    if inspect.isgeneratorfunction(forward) or inspect.iscoroutinefunction(forward):
        raise UnsupportedModule(RUNS_LATER.format(site=str(site), kind=type(module).__name__))


RUNS_LATER = (
    "{site!r}: the forward of {kind} is a generator, or a coroutine. It runs when its call is over, and nothing stands "
    "in the place of a weight any more. Enter the context on a module around it, whose forward goes through all of it, "
    "and call that."
)

GONE_FROM_TABLES = (
    "{site!r}: {kind} no longer holds this parameter itself (a parametrization was added, or it was deleted). "
    "Leave the context, or remove the handle, and enter it again."
)

OFFLOADED = (
    "{site!r} is offloaded: accelerate brings its numbers as this {kind} is called, and takes them away again. Take "
    "what the module makes of it instead, the output of the module, without a port; or\n"
    "    accelerate.hooks.remove_hook_from_submodules(model)  # brings the weights back for good"
)


PACKED = (
    "{site!r} is a {kind} of {dtype}: its numbers are packed in a form of its own, which no other tensor can stand in "
    "for. Change what the module makes of it instead: the output of the module, without a port."
)


def numbers_of_parameter(value: Tensor, site: str) -> Tensor:
    """The numbers of a parameter, which may be kept in another form (those of quantised layers are)."""
    kinds = type(value).__mro__[: type(value).__mro__.index(Tensor)]
    if any(["dequantize" in vars(kind) for kind in kinds]):
        return value.dequantize()
    if not trees.has_fractions(value):
        raise UnsupportedModule(PACKED.format(site=site, kind=type(value).__name__, dtype=value.dtype))
    return value


class OfParameter(PortKind):
    """A port with the name of a parameter in it."""

    needs_forward = False

    def is_on(self, module: nn.Module, port: Port) -> bool:
        return has_parameter(module, port.name)

    def missing(self, name: str, module: nn.Module, port: Port) -> str:
        have = ", ".join(parameter_names(module)) or "none of its own"
        return f"module {name!r} ({type(module).__name__}) has no parameter {port.name!r}; it has: {have}."


class ParameterPort(OfParameter):
    """`@weight`: a parameter or a buffer, for the duration of the context."""

    kind = "parameter"
    rank = 3
    shown = "a parameter"

    def listed(self, module: nn.Module) -> list[Port]:
        return [Port(self.kind, name) for name in parameter_names(module)]

    def read(self, words: Words) -> Port | None:
        return None if words.has_brackets else Port(self.kind, unescape(words.name))

    def written(self, port: Port) -> str:
        return f"@{escaped_word(port.name)}"

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        owner, name = site.module, site.path.port.name
        if when.first_call is not None:
            raise UnsupportedModule(NO_CALLS.format(site=str(site)))
        if name in vars(owner):
            return [(owner, AttributeRule(site, action, when))]
        holders = Holders(root)
        if name in getattr(owner, "parametrizations", {}):
            computed = ParametrizedRule(site, action, when)
            around = [(module, computed.running) for module in holders.around([(owner, name)])]
            return [(owner.parametrizations[name], computed), *around]  # type: ignore[index]
        if root is owner and action.changes:
            refuse_what_hooks_read(site)
        if action.changes:
            _refuse_what_runs_later(site, root)
        places = holders.of(owner, name)
        rule = ParameterRule(site, action, when, root, places)
        return [(module, rule) for module in holders.around(places)]


NO_CALLS = "{site!r}: a parameter has no calls; choose the steps of the model with steps=."


def escaped_word(name: str) -> str:
    """The name of a parameter as a path has it: with backslashes where it would mean something else."""
    text = re.sub(r"[^\w.]", r"\\\g<0>", name)
    return f"\\{text}" if name in RESERVED_WORDS else text


RESERVED_WORDS = ("input", "grad", "output")
"""What means another port, where a parameter has this name."""


register_port(ParameterPort())
