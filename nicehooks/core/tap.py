"""The tap: what stands in for a module's `forward` while interventions are active on it.

NOTE [One tap per module, kept]
A module has one tap for its whole life, made when the first intervention selects it. While rules are active the
instance's `__dict__` has the tap's `forward`; with the last rule it is gone, and the model has no trace of this
library. The tap itself stays in a table beside the model, because `torch.compile` recognises the function and does not
compile again. It knows its module by a weak reference only, so neither the table nor a forgotten handle keeps a model
alive.

NOTE [The shortest way]
Most taps have one rule, that of a capture which keeps the whole result: `Tap.only` is that rule then. Whether its
session acts here is the same answer for as long as `_active` holds the very same set, so `Session.acts_in` is the last
such set that it was found in, and one comparison of identities tells. `Tap.bound` is the module's own forward as a
bound method, the cheapest thing to call. It holds the module, so it is there only while a context is entered, and never
for a handle.

NOTE [Whose code is called]
A tap calls what Python would call without it: the class may get another `forward` while an intervention is active (a
`GraphModule` that is recompiled has), so the tap looks each time whether its class still has the one that it knows.

NOTE [Order]
The rules of a tap are in the order in which their contexts were entered, and act in this order: on the arguments before
the call, on the result after it. `suspend` is a rule too: the rules before it do not act. Rules that are bound `first`
(hooks with `prepend=True`) stand before all others, but behind every `suspend`: what is entered inside of it acts.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import torch_private
from nicehooks.core.frames import Rule, staged
from nicehooks.core.sessions import HERE, Session, active_sessions, acts_in_backward
from nicehooks.errors import UnsupportedModule

transforms_running = torch_private.transforms_running
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
version_counter = torch_private.version_counter
store_new, overwrite = dict.setdefault, dict.__setitem__  # see NOTE [What a cache keeps alive]


COPYING: list[Callable[[Any], Any]] = []
"""What makes the entries of a tapped module that answer where it is copied, from its tap; `copies` puts them here."""


class Tap:
    """Stands in for one module's `forward`; see NOTE [One tap per module, kept].

    Attributes:
        module: the module, weakly.
        kind: its class, and `found` the forward of that; see NOTE [Whose code is called].
        function: the same as a function of the module and the arguments.
        previous: a forward that stood in the instance's `__dict__` before.
        parameters: of the forward that it calls: see `parameters_of`.
        rules: in the order in which they act; those of them that are attached, once more in `attached`.
        mixed: whether their order is another one than first what is attached, then what each thread has entered.
        simple: whether `output` is all there is to each of them.
        only: the one rule, where it is plain, and `bound` what is called then; see NOTE [The shortest way].
        alive: whether it may be bound again.
        copying: what answers where the module is copied.
        entries: what it puts into the instance's `__dict__`.
    """

    __slots__ = (
        "__weakref__", "alive", "attached", "bound", "copying", "entries", "forward", "found", "function", "kind",
        "mixed", "module", "only", "parameters", "previous", "rules", "simple"
    )  # fmt: skip

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.kind: Any = type(module)
        self.found: Any = self.kind.forward
        self.function: Any = _unbound(self.kind)
        self.previous: Any = None
        self.parameters: Any = parameters_of(signature_of(self.function))
        self.rules: tuple[Rule, ...] = ()
        self.attached: tuple[Rule, ...] = ()
        self.mixed = False
        self.simple = True
        self.only: Any = None
        self.bound: Any = None
        self.alive = True
        self.forward: Any = _forward_of(self)
        self.copying: list[Any] = [kind(self) for kind in COPYING]
        # the forward comes last: another thread may be copying the module
        self.entries: Any = {**{copying.name: copying for copying in self.copying}, "forward": self.forward}

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        if not is_dynamo_compiling() and type(module).forward is not self.found:
            self.look_again()
        return self.function(module, *args, **kwargs)

    def look_again(self) -> None:
        """Takes what the class of the module has for a forward now."""
        module: Any = self.module()
        self.kind = type(module)
        self.found, self.function = self.kind.forward, _unbound(self.kind)
        if self.previous is None:
            self.parameters = parameters_of(signature_of(self.function))
        self.bound = None if self.bound is None else MethodType(self.function, module)


def _unbound(kind: type) -> Callable[..., Any]:
    """`kind.forward` as a function of the module and the arguments, also if it is no ordinary method."""
    raw: Any = inspect.getattr_static(kind, "forward")
    if isinstance(raw, property):
        raise UnsupportedModule(f"forward is a property of {kind.__name__}: an instance cannot have another one.")
    if not isinstance(raw, staticmethod | classmethod):
        return kind.forward  # type: ignore[attr-defined]
    bound = raw.__get__(None, kind)

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    module = inspect.Parameter("module", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = inspect.signature(bound)
    forward.__signature__ = own.replace(parameters=[module, *own.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _forward_of(tap: Tap) -> Callable[..., Any]:
    """The function that is bound as `forward`; a plain function, because that is the cheapest thing to call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return staged(tap, acting_in_traced_code(tap), args, kwargs)
        active = active_sessions()
        rule = tap.only
        if rule is not None and type(tap.bound.__self__).forward is tap.found:
            session = rule.session
            if active is session.acts_in:
                value = tap.bound(*args, **kwargs) if kwargs else tap.bound(*args)
                if type(value) is Tensor and rule.round != session.round and not transforms_running():
                    try:
                        version = version_counter(value)
                    except RuntimeError:  # made under inference_mode
                        return rule.output(value)
                    rule.round = session.round
                    key, action = rule.key, rule.action
                    if store_new(action.cache, key, value) is not value:
                        overwrite(action.cache, key, value)
                    action.seen[key] = value, version
                    return value
                return rule.output(value)
        if not tap.simple:
            return staged(tap, _acting(tap, active), args, kwargs)
        value = tap.call(tap.module(), args, kwargs)
        for rule in tap.rules:
            session = rule.session
            if session in active:
                value = rule.output(value)
                session.acts_in = active
            elif session.attached or acts_in_backward(session):
                value = rule.output(value)
            else:
                session.elsewhere = True
        return value

    forward.__signature__ = signature_of(tap.function)  # type: ignore[attr-defined]
    forward.__doc__ = tap.function.__doc__
    return forward


def _acting(tap: Tap, active: frozenset[Session]) -> list[Rule]:
    acting: list[Rule] = []
    for rule in tap.rules:
        session = rule.session
        if not (session in active or session.attached or acts_in_backward(session)):
            session.elsewhere = True
        elif rule.suspends:
            for silent in acting:
                silent.session.suspended = True
            acting.clear()
        else:
            acting.append(rule)
    return acting


def acting_in_traced_code(tap: Any) -> list[Rule]:
    """As `_acting`; see NOTE [Two views of who is active]."""
    key = id(tap.module())
    rules = [*tap.attached, *[rule for session in HERE.entered for rule in session.tapped.get(key, ())]]
    if tap.mixed:
        rules = [rule for rule in tap.rules if any([rule is own for own in rules])]
    if key in HERE.traced:  # the contexts that the very code that is being traced has entered come after all others
        rules += HERE.traced[key][1]
    acting: list[Rule] = []
    for rule in rules:
        if rule.suspends:
            acting = []
        else:
            acting.append(rule)
    return acting


# --- signatures -------------------------------------------------------------------------------------------------------

_signatures: weakref.WeakKeyDictionary[Any, inspect.Signature] = weakref.WeakKeyDictionary()


def signature_of(function: Any) -> inspect.Signature:
    """The signature of an unbound `forward`, without `self`; libraries inspect that of `model.forward`."""
    found = _signatures.get(function)
    if found is None:
        full = inspect.signature(function)
        found = full.replace(parameters=list(full.parameters.values())[1:])
        _signatures[function] = found
    return found


def parameters_of(signature: inspect.Signature) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the parameters that can be passed by position, in order, and the defaults of all."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values()
    names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
    return names, {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


# --- the table of taps ------------------------------------------------------------------------------------------------

_taps: dict[int, Tap] = {}


def tap_of(module: nn.Module) -> Tap | None:
    """The tap of `module`, if it ever had one."""
    tap = _taps.get(id(module))
    return tap if tap is not None and tap.module() is module else None


def is_bound(module: nn.Module) -> bool:
    """Whether the tap of `module` stands in its place."""
    tap = tap_of(module)
    return tap is not None and module.__dict__.get("forward") is tap.forward


def has_rules(module: nn.Module) -> bool:
    """Whether any intervention is active on `module` now, in any thread."""
    tap = tap_of(module)
    return tap is not None and bool(tap.rules)


def tap_for(module: nn.Module) -> Tap:
    """The tap of `module`, made if it never had one."""
    tap = tap_of(module)
    if tap is None:
        tap = _taps[id(module)] = Tap(module)
        weakref.finalize(module, _forget, id(module)).atexit = False
    return tap


def drop_tap(module: nn.Module, tap: Tap) -> None:
    """Lets `module` have another tap the next time."""
    tap.alive = False
    if _taps.get(id(module)) is tap:
        del _taps[id(module)]


def _forget(key: int) -> None:
    """Takes apart the tap of a module that is gone: its function and it know each other, which is a cycle."""
    tap = _taps.get(key)
    if tap is not None and tap.module() is None:
        del _taps[key]
        tap.rules = tap.attached = ()
        tap.forward = tap.entries = None
