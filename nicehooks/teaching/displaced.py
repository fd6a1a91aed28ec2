"""What is said when somebody has changed the model while an intervention was active on it."""

from __future__ import annotations

import gc
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from nicehooks.core.census import module_at
from nicehooks.core.rules import SiteRule
from nicehooks.core.sessions import Session
from nicehooks.errors import NotReachedWarning, warn_caller

MOST_OBJECTS = 1000
"""Of how many objects that a forward leads to it is asked whether they are ours."""


def tell(intervention: Any, session: Session, plan: Any) -> None:
    """Warns of what is not any more what the intervention was entered on: forwards, modules, who holds a weight."""
    if session.displaced is not None:
        _tell_of_forward(intervention, session)
    moved = [rule for companion in plan.companions for rule in companion.moved()]
    rules = [rule for group in plan.groups for rule in group.rules if rule in moved or _is_gone(intervention, rule)]
    if rules:
        keys = [repr(key) for key in dict.fromkeys([rule.key for rule in rules])]
        shown = ", ".join(keys[:MOST_SHOWN]) + (f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else "")
        warn_caller(MOVED.format(label=session.label, shown=shown), NotReachedWarning)


MOST_SHOWN = 3

MOVED = (
    "{label}: inside the context the model was changed. Other modules, or none, stand now where these sites were: "
    "{shown}. What it did, it did to the modules and weights that were there when it was entered.\n"
    "  Change the model before the context is entered; or leave it, and enter it again."
)


def _is_gone(intervention: Any, rule: SiteRule) -> bool:
    """Whether another module, or none, has the name of the site by now."""
    module = rule.site._module()  # pyright: ignore[reportPrivateUsage]
    return module is None or module_at(intervention.model, rule.site.name) is not module


def _tell_of_forward(intervention: Any, session: Session) -> None:
    """Warns that from then on nothing acted there, unless the other forward calls the one in whose place it stands."""
    tap = session.displaced
    module = tap.module()
    if module is None or _leads_to(module.forward, tap.forward):
        return
    name = next((name for name, found in intervention.model.named_modules() if found is module), "")
    theirs: Any = vars(module).get("forward")
    how = "taken away" if theirs is None else f"replaced by {getattr(theirs, '__qualname__', type(theirs).__name__)}"
    text = DISPLACED.format(label=session.label, name=name, kind=type(module).__name__, how=how)
    warn_caller(text, NotReachedWarning)


DISPLACED = (
    "{label}: inside the context the forward of {name!r} ({kind}) was {how}. From then on nothing acted there.\n"
    "  Replace it before the context is entered, or call the forward that was there from the new one."
)


def _leads_to(start: Any, wanted: Any) -> bool:
    """Whether `wanted` is found in what `start` holds: a closure, arguments, the object of a method."""
    left, met = [start], {id(start)}
    while left and len(met) < MOST_OBJECTS:
        held = left.pop(0)
        if held is wanted:
            return True
        new = [other for other in _held_by(held) if id(other) not in met]
        met |= {id(other) for other in new}
        left += new
    return False


def _held_by(held: Any) -> list[Any]:
    if isinstance(held, FunctionType):
        named = [held.__globals__.get(name) for name in held.__code__.co_names]
        return [*(held.__closure__ or ()), *named, held.__defaults__, held.__kwdefaults__, vars(held)]
    if isinstance(held, nn.Module):
        return [value for value in vars(held).values() if isinstance(value, CALLABLES)]
    return [] if isinstance(held, Tensor | type | ModuleType) else gc.get_referents(held)


CALLABLES = (FunctionType, MethodType, BuiltinMethodType, partial, CellType)
