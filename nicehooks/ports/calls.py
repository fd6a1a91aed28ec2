"""The port `@name()`: what a torch function, or a method of the module, returns in a module's own forward.

NOTE [Whose forward runs]
A torch function mode sees every torch function that is called in this thread. It acts on those of the module's own
forward alone: every module below it has a rule that says, while it runs, that this is another module's forward. Only
modules with such a site, and the modules below them, pay for that.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward as attention_of_several_heads
from torch.overrides import TorchFunctionMode

from nicehooks.core.calling import has_forward
from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Pairs, PortKind, register_port
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.when import ALWAYS, When
from nicehooks.errors import NiceHooksError, TreeMismatch
from nicehooks.paths.ports import EVERY_CALL, Port, Words
from nicehooks.paths.subscripts import fault
from nicehooks.ports.arguments import arguments_of, by_name, complete, written_back
from nicehooks.ports.attention import FUSED_KERNELS, as_steps_wanted, runs_in_steps, steps_of
from nicehooks.ports.overrides import StandIn
from nicehooks.ports.packed_heads import note_packed_heads
from nicehooks.ports.signatures import parameters_in_call
from nicehooks.torch_private import evaluated_while_tracing
from nicehooks.torch_private_tensors import FLEX_ATTENTION, flex_attention_shown, in_compiled_graph, opened
from nicehooks.values import trees
from nicehooks.values.trees import Chain, is_same


class _Running(threading.local):
    """The run of a module's own forward that this thread is in, as far as anybody watches it."""

    def __init__(self) -> None:
        self.frame: Frame | None = None


_running = _Running()

STEPS = ("scores", "pattern")
"""The steps of fused attention that a path can name."""


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A function and the arguments that it is called with."""


class CallRule(SiteRule):
    """The result, or an argument, of the calls of one function in a module's own forward."""

    __slots__ = ()
    reason = "its module was not called, or calls no function and no method of this name itself (its children may)."

    def why_not_reached(self) -> str:
        part = self.path.port.part
        if part not in STEPS:
            return self.reason
        port, first = (
            (Port("call", "softmax", part="input"), (0,)) if part == "scores" else (Port("call", "softmax"), ())
        )
        eager = str(replace(self.path, port=port, chain=(*first, *self.chain)))
        return f"{self.reason}\n{EAGER_NOW.format(part=part, eager=eager)}"

    def before(self, frame: Frame) -> None:
        self.number(frame)
        if frame.watcher is None:
            frame.watcher = CallWatcher(frame)
        frame.watcher.rules.append(self)

    def after(self, frame: Frame) -> None:
        pass

    def is_about(self, frame: Frame, name: str, call: Call) -> bool:
        """Whether the rule is about `call`, of a function that is called `name`."""
        return same_function(self.path.port.name, name)

    def methods(self, module: Any) -> list[str]:
        """The methods of `module` whose calls the rule wants."""
        name = self.path.port.name
        return [name] if is_method(module, name) else []

    def key_of_call(self, frame: Frame, name: str, number: int) -> str | None:
        """The key for call `number` of the function called `name`; None where the rule does not act."""
        wanted, key = self.path.port.call, self.key_of(frame)
        if key is None or (wanted is not None and wanted != EVERY_CALL and wanted != number):
            return None
        return key.replace("#*()", f"#{number}()", 1) if wanted == EVERY_CALL else key

    def on(self, frame: Frame, name: str, number: int, value: Any, chain: Chain | None = None) -> Any:
        """`value` after the action has been at the site in it."""
        key = self.key_of_call(frame, name, number)
        if key is None:
            return value
        return self.at_key(key, frame, value, chain)

    def on_arguments(
        self, frame: Frame, name: str, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of `function`, after the action has been at the site in them."""
        names, defaults = parameters_in_call(function, args, kwargs)
        arguments = arguments_of(names, args, kwargs)
        complete(arguments, self.chain, names, defaults)
        first = self.chain[0] if self.chain else None
        if isinstance(first, str) and first not in arguments:
            have = ", ".join(map(repr, dict.fromkeys([*names, *arguments, *defaults])))
            raise self.at_edge(TreeMismatch(f"{name} has no argument {first!r}, it has {have}"), arguments, self.key)
        changed = self.on(frame, name, number, arguments, by_name(self.chain, names))
        return (args, kwargs) if is_same(changed, arguments) else written_back(names, args, kwargs, arguments, changed)


EAGER_NOW = (
    "  If the model runs eager attention by now (set_attn_implementation), the path is {eager!r}.\n"
    "  anatomy(model).{part} gives the path under the setting at the time it is asked for."
)


class EveryCallRule(CallRule):
    """The results of all calls in a module's own forward in which there are tensors, each under a key of its own."""

    __slots__ = ()

    def is_about(self, frame: Frame, name: str, call: Call) -> bool:
        return name not in _ATTRIBUTES

    def methods(self, module: Any) -> list[str]:
        """The methods that a class of its own has, not those of every module."""
        of_class = {name for kind in type(module).__mro__ if kind is not object for name in vars(kind)}
        return [n for n in of_class if is_method(module, n) and inspect.isroutine(getattr(type(module), n))]

    def key_of_call(self, frame: Frame, name: str, number: int) -> str | None:
        return str(replace(self.path, port=Port("call", plain_function_name(name), number)))

    def on(self, frame: Frame, name: str, number: int, value: Any, chain: Chain | None = None) -> Any:
        shows = any([isinstance(leaf, Tensor) for leaf in trees.leaves(value)])
        return super().on(frame, name, number, value, chain) if shows else value


_ATTRIBUTES = ("__get__", "__set__")
"""How a torch function mode sees that `x.T` is read: no call that a path could name."""


class OtherForwardRule(Rule):
    """Says that the forward of another module runs; see NOTE [Whose forward runs]."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        frame.enter(_RunOf(frame))


class _RunOf(AbstractContextManager[None]):
    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        self.before = _running.frame
        _running.frame = self.frame

    def __exit__(self, *_: object) -> None:
        _running.frame = self.before


def forward_around(frame: Frame) -> Frame | None:
    """The run of a module's own forward in which the call `frame` was made, as far as anybody watches it."""
    return next((one.before for one in frame.contexts if isinstance(one, _RunOf)), _running.frame)


class CallWatcher(AbstractContextManager[None]):
    """Brings the calls in one run of a module's forward to the rules that want them, in the order of the rules."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.rules: list[CallRule] = []
        self.counts: dict[Any, int] = {}
        self.computed: dict[Any, list[Any]] = {}
        self.methods: list[str] = []  # those in the stand-in for the module, which lead back to it

    def __enter__(self) -> None:
        frame = self.frame
        methods = dict.fromkeys([name for rule in self.rules for name in rule.methods(frame.module)])
        self.methods = list(methods)
        if methods:
            frame.module = frame.enter(StandIn(frame.module, methods, tuple(methods)))
            self.stand_in = frame.module
            for name in methods:
                frame.module.__dict__[name] = self._watching(name, _bound(frame.module, name))
        frame.enter(_RunOf(frame))
        if self._wants_flex_attention():
            frame.enter(flex_attention_shown())
        self.mode: Any = _Mode(self)
        self.mode.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.mode.__exit__(kind, error, trace)
        self.mode = None
        if not torch.compiler.is_dynamo_compiling():
            for name in self.methods:  # else what came by lives until the garbage collector comes
                self.stand_in.__dict__.pop(name, None)
        if isinstance(error, _Carried):
            raise error.error from error.error.__cause__

    def _wants_flex_attention(self) -> bool:
        """Whether a rule is about flexible attention, or may be about its steps: NOTE [How flex attention is seen]."""
        named = any([rule.path.port.name == "flex_attention" for rule in self.rules])
        return named or (as_steps_wanted() and FLEX_ATTENTION in sys.modules)

    def _watching(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self.call(name, method, args, kwargs)

        # with the signature of the method, which a model may inspect
        return watched if torch.compiler.is_dynamo_compiling() else wraps(method)(watched)

    def is_here(self) -> bool:
        """Whether it is the module's own forward that runs here and now."""
        return _running.frame is self.frame

    def wants(self, name: str, call: Call) -> bool:
        """Whether any rule is about this call of the function called `name`, here and now."""
        frame = self.frame
        return _running.frame is frame and any([rule.is_about(frame, name, call) for rule in self.rules])

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function`, with the rules on its arguments before, in its steps, and on its result after."""
        rules = [rule for rule in self.rules if rule.is_about(self.frame, name, (function, args, kwargs))]
        number = self.counts[plain_function_name(name)] = self.counts.get(plain_function_name(name), -1) + 1

        def at(part: str, value: Any) -> Any:
            with _Carrying():
                for rule in rules:
                    if rule.path.port.part == part:
                        value = rule.on(self.frame, name, number, value)
            return value

        with _Carrying():
            for rule in rules:
                if rule.path.port.part == "input":
                    args, kwargs = rule.on_arguments(self.frame, name, number, function, args, kwargs)
        if any(rule.path.port.part in STEPS for rule in rules):
            function = partial(steps_of(function), at=at)
        return at("", function(*args, **kwargs))


class _Carried(NiceHooksError):
    """Carries a `TypeError` of a rule out of an operator: torch would take it for an operand of a wrong type."""

    def __init__(self, error: TypeError) -> None:
        self.error = error


class _Carrying(AbstractContextManager[None]):
    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TypeError):
            raise _Carried(error)


class _Mode(TorchFunctionMode):
    """Shows the torch functions that are called to a watcher; is off while it handles one."""

    def __init__(self, watcher: CallWatcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if runs_in_steps(func):
            func = self._in_steps(steps_of(func))
        if self.watcher.wants(name, (func, args, kwargs)) and not in_compiled_graph():
            result = self.watcher.call(name, func, args, kwargs)
        elif func is attention_of_several_heads and self.watcher.is_here():
            with self:  # its lines are calls in the module's own forward, too: it is all that the forward consists of
                result = opened(func)(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        note_packed_heads(func, args, result)
        return result

    def _in_steps(self, steps: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(steps)
        def in_steps(*args: Any, **kwargs: Any) -> Any:
            with self:  # the steps are calls in the module's own forward, too
                return steps(*args, **kwargs)

        return in_steps


@evaluated_while_tracing
def same_function(wanted: str, name: str) -> bool:
    """Whether a path that says `wanted` means the function called `name`; an operator and its function are one."""
    return name == wanted or plain_function_name(name) == plain_function_name(wanted)


@evaluated_while_tracing
def plain_function_name(name: str) -> str:
    """The name of a function without the underscores of an operator: `__radd__` is `add`."""
    return _plain_name(name)


@lru_cache(maxsize=1024)
def _plain_name(name: str) -> str:
    return re.sub(r"^__(r(?=add|sub|mul|truediv|matmul|pow))?(\w+)__$", r"\2", name)


def is_method(module: Any, name: str) -> bool:
    """Whether `name` is a method that the class of `module` defines."""
    return _has_method(type(module), name)


@evaluated_while_tracing
def _has_method(kind: type, name: str) -> bool:
    return callable(getattr(kind, name, None)) and not hasattr(nn.Module, name)


def _bound(module: Any, name: str) -> Callable[..., Any]:
    """The method of `module` that its class defines: an ordinary one, or one of the class, or a static one."""
    if torch.compiler.is_dynamo_compiling():
        of_class = getattr(type(module), name)
        return partial(of_class, module) if _is_ordinary(type(module), name) else of_class
    raw: Any = inspect.getattr_static(type(module), name)
    return raw.__get__(module, type(module)) if hasattr(raw, "__get__") else raw


@evaluated_while_tracing
def _is_ordinary(kind: type, name: str) -> bool:
    return not isinstance(inspect.getattr_static(kind, name), staticmethod | classmethod)


def others_below(module: nn.Module) -> list[nn.Module]:
    """The modules below `module` that have a forward of their own; a tap on a container would look like one."""
    return [other for other in module.modules() if other is not module and has_forward(other)]


class CallPort(PortKind):
    """`@name()`: the calls of one function in a module's own forward; `.input` is what it is given.

    The steps `.scores` and `.pattern` of fused attention (`FUSED_KERNELS`) are parts of its call, before and after its
    softmax, `[batch, head, query, key]`.
    """

    kind = "call"
    rank = 4
    shown = "a call name()"

    def read(self, words: Words) -> Port | None:
        if not words.has_brackets:
            return None
        part, dot, rest = words.part.partition(".")
        if "grad" in (part, rest):
            raise fault(words.text, words.part_at if not dot else words.end - len(rest), GRAD_OF_CALL)
        if part in STEPS and words.name not in FUSED_KERNELS:
            raise fault(words.text, words.part_at, STEPS_OF_CALL)
        return Port(self.kind, words.name, words.call, part) if part in ("", "input", *STEPS) and not dot else None

    def written(self, port: Port) -> str:
        number = "" if port.call is None else f"#{port.call}"
        return f"@{port.name}{number}(){'.' if port.part else ''}{port.part}"

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        return [(site.module, CallRule(site, action, when)), *_other_forwards(site.module)]

    def rules_for_all(self, site: Site, action: Action) -> Pairs:
        return [(site.module, EveryCallRule(site, action, ALWAYS))]  # every module below it has one too


def _other_forwards(module: nn.Module) -> Pairs:
    return [(other, OtherForwardRule()) for other in others_below(module)]


STEPS_OF_CALL = f"scores and pattern are steps of {' and '.join(f'@{name}()' for name in FUSED_KERNELS)} alone"
GRAD_OF_CALL = "the gradient of a call is that of a parameter's uses alone: @weight.uses().grad"

register_port(CallPort())
