"""Binding: rules come to the taps of their modules, and go."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from torch import nn

from nicehooks.core.exclusive import Exclusive
from nicehooks.core.frames import Rule
from nicehooks.core.register import Pairs
from nicehooks.core.sessions import Session
from nicehooks.core.tap import Tap, drop_tap, parameters_of, signature_of, tap_for

Bound = tuple[Tap, Any, tuple[Any]]
"""A rule with its tap, and alone in a tuple; it knows the module weakly."""


def taps_for(pairs: Pairs) -> list[Bound]:
    """The rules with the taps of their modules."""
    with Exclusive():
        return [(tap_for(module), rule, (rule,)) for module, rule in pairs]


def bind(taps: list[Bound], session: Session, actions: list[Any] | None = None, first: bool = False) -> None:
    """Adds each rule to its tap, for `session`, with other `actions` if there are any; see NOTE [Order]."""
    contexts_only = not session.attached
    with Exclusive(tracing=True):
        for tap, rule, alone in reversed(taps) if first else taps:
            rule.session = session
            if actions is not None:
                rule.take_actions(actions)
            module: Any = tap.module()
            if module is None:
                continue
            names = module.__dict__
            if tap.rules or tap.kind.forward is not tap.found or not names.keys().isdisjoint(tap.entries):
                _bind_slowly(tap, module, rule, first)
                continue
            tap.rules = alone
            tap.simple = rule.simple
            if not contexts_only:
                tap.attached = alone
            if rule.plain and contexts_only:
                tap.bound = MethodType(tap.function, module)
                tap.only = rule
            names.update(tap.entries)


def _bind_slowly(tap: Tap, module: Any, rule: Rule, first: bool) -> None:
    tap.only = None
    if not tap.rules:
        _put_in(module, tap)
    at = max([at for at, other in enumerate(tap.rules, 1) if other.suspends or not first], default=0)
    behind = len(tap.attached) if rule.session.attached else len(tap.rules)
    tap.mixed = tap.mixed or at < len(tap.rules) or behind < len(tap.rules)
    tap.rules = (*tap.rules[:at], rule, *tap.rules[at:])
    tap.attached = tuple([other for other in tap.rules if other.session.attached])
    tap.simple = tap.simple and rule.simple


def _put_in(module: nn.Module, tap: Tap) -> None:
    """Binds the tap where the module has entries of these names, or is of another class by now (a lazy one)."""
    names = module.__dict__
    if type(module) is not tap.kind or tap.kind.forward is not tap.found:
        tap.look_again()
    forward = names.get("forward")
    if forward is not tap.forward:  # else an interrupt has left it there
        tap.previous = forward
        if forward is not None:
            tap.parameters = parameters_of(inspect.signature(forward))
    tap.simple = tap.previous is None
    for copying in tap.copying:
        copying.come(names)
    names.update(tap.entries)


def unbind(taps: list[Bound], broken_off: bool = False) -> None:
    """Takes each rule away again, where it still is; the last one to go puts the module's own forward back.

    Where they came or went and were `broken_off`, nobody knows how far: a tap that has no rules left is not used again.
    """
    with Exclusive(tracing=True):
        for tap, rule, alone in taps:
            module: Any = tap.module()
            if module is None:
                continue
            names = module.__dict__
            ours = names.get("forward") is tap.forward
            if rule in tap.rules and not ours:
                rule.session.displaced = tap
            if tap.rules is alone and ours:  # bound where nothing was
                for name in reversed(tap.entries):
                    names.pop(name, None)
                tap.only = tap.bound = None
                tap.rules = tap.attached = ()
            elif rule in tap.rules or (not tap.rules and (broken_off or ours)):
                _unbind_slowly(tap, module, rule)


def _unbind_slowly(tap: Tap, module: Any, rule: Rule) -> None:
    tap.only = None
    tap.rules = tuple([r for r in tap.rules if r is not rule])
    tap.attached = tuple([r for r in tap.attached if r is not rule])
    tap.mixed = tap.mixed and len(tap.rules) > 1
    if not tap.rules:
        _put_back(module, tap)
        return
    tap.simple = tap.previous is None and all([r.simple for r in tap.rules])
    (last, *others) = tap.rules
    had_none = tap.previous is None and all([copying.previous is None for copying in tap.copying])
    if had_none and not others and last.plain and not last.session.attached:
        tap.bound = MethodType(tap.function, module)
        tap.only = last


def _put_back(module: nn.Module, tap: Tap) -> None:
    """Restores `forward`, unless somebody else has rebound it meanwhile: a context undoes only its own work.

    Then the tap may be called from inside theirs for ever, or be put back; so it is left as it is, and the module gets
    another one.
    """
    names = module.__dict__
    tap.bound = None
    if names.get("forward") is tap.forward and tap.previous is None:
        del names["forward"]
    elif names.get("forward") is tap.forward:
        names["forward"] = tap.previous
    elif names.get("forward") is not tap.previous:
        drop_tap(module, tap)
    for copying in tap.copying:
        copying.leave(names)
    if tap.previous is not None:
        tap.previous = None
        tap.parameters = parameters_of(signature_of(tap.function))
