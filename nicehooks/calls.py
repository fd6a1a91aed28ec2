"""The port `@name()`: what a torch function, or a method of the module, returns in a module's own forward.

NOTE [Whose forward runs]
A torch function mode sees every torch function that is called in this thread. It acts on those of the module's own
forward alone: every module below it has a rule that says, while it runs, that this is another module's forward. Only
modules with such a site, and the modules below them, pay for that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from functools import lru_cache, partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as fused_attention
from torch.overrides import TorchFunctionMode

from nicehooks.arguments import arguments_of, written_back
from nicehooks.attention import as_steps_wanted, attention_in_steps
from nicehooks.parameters import StandIn
from nicehooks.paths import EVERY_CALL, FUSED_ATTENTION, STEPS
from nicehooks.rebinding import Frame, Rule, parameters_of
from nicehooks.rules import Action, SiteRule
from nicehooks.selection import Site
from nicehooks.steps import When

_running: ContextVar[Frame | None] = ContextVar("nicehooks.running", default=None)


class CallRule(SiteRule):
    """The result, or an argument, of the calls of one function in a module's own forward."""

    __slots__ = ()
    reason = "its module was not called, or calls no function and no method of this name itself (its children may)."

    def before(self, frame: Frame) -> None:
        self.number(frame)
        if not frame.watchers:
            frame.watchers.append(CallWatcher(frame))
        frame.watchers[0].rules.append(self)

    def after(self, frame: Frame) -> None:
        pass

    def key_of_call(self, frame: Frame, number: int) -> str | None:
        """The key for call `number` of the function; None where the rule does not act."""
        wanted, key = self.path.port.call, self.key_of(frame)
        if key is None or (wanted is not None and wanted != EVERY_CALL and wanted != number):
            return None
        return key.replace("#*()", f"#{number}()", 1) if wanted == EVERY_CALL else key

    def on(self, frame: Frame, number: int, value: Any) -> Any:
        """`value` after the action has been at the site in it."""
        key = self.key_of_call(frame, number)
        if key is None:
            return value
        first = self.key not in self.session.reached
        new = self.act(value, self.chain, key)
        if self.action.changes:
            self.note_checkpoint(first, new)
        return new


class OtherForwardRule(Rule):
    """Says that the forward of another module runs; see NOTE [Whose forward runs]."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        frame.enter(_Running(frame))


class _Running(AbstractContextManager[None]):
    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        self.before = _running.get()
        _running.set(self.frame)

    def __exit__(self, *_: object) -> None:
        _running.set(self.before)


class CallWatcher(AbstractContextManager[None]):
    """Brings the calls in one run of a module's forward to the rules that want them, in the order of the rules."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.rules: list[CallRule] = []
        self.counts: dict[str, int] = {}

    def __enter__(self) -> None:
        self.stack = ExitStack()
        frame = self.frame
        methods = {rule.path.port.name for rule in self.rules if is_method(frame.module, rule.path.port.name)}
        if methods:
            frame.module = self.stack.enter_context(StandIn(frame.module, dict.fromkeys(methods), tuple(methods)))
            for name in methods:
                frame.module.__dict__[name] = self._watching(
                    name, MethodType(getattr(type(frame.module), name), frame.module)
                )
        self.stack.enter_context(_Running(frame))
        self.stack.enter_context(_Mode(self))

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def _watching(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.call(name, method, args, kwargs)

    def wants(self, name: str) -> bool:
        """Whether any rule is about the function called `name`, here and now."""
        return _running.get() is self.frame and any(same_function(rule.path.port.name, name) for rule in self.rules)

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`, with the rules on its arguments before, in its steps, and on its result after."""
        rules = [rule for rule in self.rules if same_function(rule.path.port.name, name)]
        number = self.counts[name] = self.counts.get(name, -1) + 1

        def at(part: str, value: Any) -> Any:
            for rule in rules:
                if rule.path.port.part == part:
                    value = rule.on(self.frame, number, value)
            return value

        names = _names_of(attention_in_steps if name == FUSED_ATTENTION else function)
        arguments = arguments_of(names, args, kwargs)
        changed = at("input", arguments)
        if changed is not arguments:
            args, kwargs = written_back(names, args, kwargs, arguments, changed)
        if any(rule.path.port.part in STEPS for rule in rules):
            function = partial(attention_in_steps if function is fused_attention else function, at=at)
        return at("", function(*args, **kwargs))


class _Mode(TorchFunctionMode):
    """Shows the torch functions that are called to a watcher; is off while it handles one."""

    def __init__(self, watcher: CallWatcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is fused_attention and as_steps_wanted():
            func = self._attention_in_steps
        return self.watcher.call(name, func, args, kwargs) if self.watcher.wants(name) else func(*args, **kwargs)

    def _attention_in_steps(self, *args: Any, **kwargs: Any) -> Tensor:
        with self:  # the steps are calls in the module's own forward, too
            return attention_in_steps(*args, **kwargs)


def same_function(wanted: str, name: str) -> bool:
    """Whether a path that says `wanted` means the function called `name`; an operator and its function are one."""
    return name == wanted or _plain(name) == _plain(wanted)


def _plain(name: str) -> str:
    return re.sub(r"^__(r(?=add|sub|mul|truediv|matmul|pow))?(\w+)__$", r"\2", name)


def is_method(module: Any, name: str) -> bool:
    """Whether `name` is a method that the class of `module` defines."""
    return callable(getattr(type(module), name, None)) and not hasattr(nn.Module, name)


@lru_cache(maxsize=1024)
def _names_of(function: Any) -> tuple[str, ...]:
    try:
        return parameters_of(inspect.signature(function))[0]
    except (TypeError, ValueError):  # functions in C have no signature: arguments go by position
        return ()


def call_rules(site: Site, action: Action, when: When) -> list[tuple[nn.Module, Rule]]:
    """The rules for a site that is a call; see `ports.rules_for`."""
    module = site.module
    others = [other for other in module.modules() if other is not module]
    return [(module, CallRule(site, action, when)), *((other, OtherForwardRule()) for other in others)]
