"""The tap: what stands in for a module's `forward` while interventions are active on it.

NOTE [One tap per module, kept]
A module has one tap for its whole life, made when the first intervention selects it. While rules are active the
instance's `__dict__` has the tap's `forward`; with the last rule it is gone, and the model has no trace of this
library. The tap itself stays in a table beside the model, because `torch.compile` recognises the function and does not
compile again. It knows its module by a weak reference only, so neither the table nor a forgotten handle keeps a model
alive.

NOTE [Copies of a tapped module]
`copy.deepcopy` and `pickle` ask the instance for `__reduce_ex__` before they ask its class. A tapped module answers
with what its class says, less the tap's own entries: the copy is a clean model. One of them, `HANDLES`, is a list of
the attached hooks that nobody else holds: it lies in the model itself, so that they end with it.

NOTE [Order]
The rules of a tap are in the order in which their contexts were entered, and act in this order: on the arguments before
the call, on the result after it. `suspend` is a rule too: the rules before it do not act. Rules that are bound `first`
(hooks with `prepend=True`) stand before all others, but behind every `suspend`: what is entered inside of it acts.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.core import sessions
from nicehooks.core.sessions import HERE, LOCK, Session, acts_in_backward
from nicehooks.errors import UnsupportedModule


class StopForward(BaseException):
    """Ends the forward of the root model early; not an `Exception`, so that the model does not catch it."""

    def __init__(self, session: Session) -> None:
        self.session = session


class Frame:
    """One call of a tapped module, on its way through the rules.

    Attributes:
        module: the module to run on; a rule may put a stand-in here.
        args, kwargs: the arguments, as the caller passed them.
        value: the result, once there is one.
        contexts: what rules have entered around the call.
        inside: changes the result as if within the module's own forward: before any rule sees it.
        watcher: what is entered last and left first: around the module's own forward alone, and no rule.
        numbers: which call this is, for the rules that count.
        kept: what rules keep for the rest of the call, by keys of theirs.
    """

    __slots__ = ("args", "contexts", "inside", "kept", "kwargs", "module", "numbers", "tap", "value", "watcher")

    def __init__(self, tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tap = tap
        self.module: Any = tap.module()
        self.args = args
        self.kwargs = kwargs
        self.value: Any = None
        self.contexts: list[AbstractContextManager[Any]] = []
        self.inside: Any = None
        self.watcher: Any = None
        self.numbers: dict[int, int] = {}
        self.kept: dict[Any, Any] = {}

    def enter(self, context: AbstractContextManager[Any]) -> Any:
        """Enters `context` until the call is over."""
        entered = context.__enter__()
        self.contexts.append(context)
        return entered


class Rule:
    """What one session does at one module. Subclasses say what happens before and after the call.

    Attributes:
        session: the session that owns the rule; it acts only where that is active.
        simple: whether `output` is all there is to it: then the tap need not build a frame.
    """

    __slots__ = ("session",)
    simple = False
    suspends = False
    session: Session

    def output(self, value: Any) -> Any:
        """The result of the call that takes the place of `value`."""
        return value

    def before(self, frame: Frame) -> None:
        """Acts on the arguments of the call."""

    def after(self, frame: Frame) -> None:
        """Acts on the result of the call."""
        frame.value = self.output(frame.value)

    def caught(self, stop: StopForward) -> bool:
        """Whether this rule ends what `stop` has begun."""
        return False


class Tap:
    """Stands in for one module's `forward`; see NOTE [One tap per module, kept]."""

    __slots__ = (
        "__weakref__",
        "forward",
        "found",
        "function",
        "module",
        "parameters",
        "previous",
        "reduce",
        "rules",
        "simple",
    )

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.found: Any = type(module).forward
        self.function: Any = _unbound(type(module))
        self.previous: Any = None  # a forward that stood in the instance's __dict__ before
        self.parameters: Any = None  # of the forward that it calls: see `parameters_of`
        self.rules: tuple[Rule, ...] = ()
        self.simple = True
        self.forward: Any = _forward_of(self)
        self.reduce = _Reduce(self.module)

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the module's own forward."""
        return self.previous(*args, **kwargs) if self.previous is not None else self.function(module, *args, **kwargs)


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
        active = sessions.active_sessions()
        if active is None:
            return staged(tap, acting_in_traced_code(tap), args, kwargs)
        if not tap.simple:
            return staged(tap, _acting(tap, active), args, kwargs)
        module = tap.module()
        value = tap.function(module, *args, **kwargs) if kwargs else tap.function(module, *args)
        for rule in tap.rules:
            session = rule.session
            if session in active or session.attached or acts_in_backward(session):
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
    acting: list[Rule] = []
    here = HERE.slots
    for rule in (*tap.rules, *entered_in_traced_code(tap.module())):
        if rule.session.attached or rule.session.slot in here:
            if rule.suspends:
                acting = []
            else:
                acting.append(rule)
    return acting


def entered_in_traced_code(module: Any) -> tuple[Rule, ...]:
    """The rules of the contexts that the very code that is being traced has entered: they come after all others."""
    found = HERE.traced.get(id(module))
    return () if found is None else found[1]


def staged(tap: Any, rules: list[Rule], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call with everything that rules may do before, around and after it."""
    if not rules:
        return tap.call(tap.module(), args, kwargs)
    frame = Frame(tap, args, kwargs)
    try:
        for rule in rules:
            rule.before(frame)
        watched = frame.watcher is not None
        frame.value = _watched_call(tap, frame) if watched else tap.call(frame.module, frame.args, frame.kwargs)
        if frame.inside is not None:
            frame.value = frame.inside(frame)
        for rule in rules:
            rule.after(frame)
    except StopForward as stop:
        if not _is_caught(stop, rules):
            raise
        frame.value = None
    finally:
        while frame.contexts:
            frame.contexts.pop().__exit__(None, None, None)
    return frame.value


def _is_caught(stop: StopForward, rules: list[Rule]) -> bool:
    return any([rule.caught(stop) for rule in rules])


def _watched_call(tap: Tap, frame: Frame) -> Any:
    with frame.watcher:
        return tap.call(frame.module, frame.args, frame.kwargs)


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


# --- binding ----------------------------------------------------------------------------------------------------------


HANDLES = "__nicehooks__"
"""The entry of a tapped module for handles that live as long as it does; see NOTE [Copies of a tapped module]."""


class _Reduce:
    """See NOTE [Copies of a tapped module]."""

    __slots__ = ("module", "previous")

    def __init__(self, module: weakref.ref[nn.Module]) -> None:
        self.module = module
        self.previous: Any = None  # one that stood in the instance's __dict__ before

    def __call__(self, protocol: Any = 2) -> Any:
        module: Any = self.module()
        of_class: Any = type(module).__reduce_ex__
        reduced = of_class(module, protocol) if self.previous is None else self.previous(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        return (*reduced[:2], _clean(module, reduced[2]), *reduced[3:])


def _clean(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    tap = tap_of(module)
    state = {name: value for name, value in state.items() if name not in ("forward", "__reduce_ex__", HANDLES)}
    if tap is not None and tap.previous is not None:
        state["forward"] = tap.previous
    return state


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


def _make_tap(module: nn.Module) -> Tap:
    tap = _taps[id(module)] = Tap(module)
    weakref.finalize(module, _forget, id(module)).atexit = False
    return tap


def _forget(key: int) -> None:
    """Takes apart the tap of a module that is gone: its function and it know each other, which is a cycle."""
    tap = _taps.pop(key, None)
    if tap is not None:
        tap.rules = ()
        tap.forward = None


def bind(pairs: list[tuple[nn.Module, Rule]], first: bool = False) -> None:
    """Adds each rule to the tap of its module; see NOTE [Order]."""
    sessions.teach_dynamo()
    with torch_private.while_nothing_is_traced(), LOCK:
        for module, rule in reversed(pairs) if first else pairs:
            tap = _taps.get(id(module)) or _make_tap(module)
            if not tap.rules:
                _put_in(module, tap)
            at = _behind_suspends(tap.rules) if first else len(tap.rules)
            tap.rules = (*tap.rules[:at], rule, *tap.rules[at:])
            tap.simple = tap.simple and rule.simple


def _behind_suspends(rules: tuple[Rule, ...]) -> int:
    return max([at + 1 for at, rule in enumerate(rules) if rule.suspends], default=0)


def _put_in(module: nn.Module, tap: Tap) -> None:
    names = module.__dict__
    tap.previous = names.get("forward")
    found = type(module).forward
    if found is not tap.found:  # a lazy module has become another class
        tap.found, tap.function, tap.parameters = found, _unbound(type(module)), None
    if tap.previous is not None:
        tap.parameters = parameters_of(inspect.signature(tap.previous))
    elif tap.parameters is None:
        tap.parameters = parameters_of(signature_of(tap.function))
    tap.simple = tap.previous is None
    tap.reduce.previous = names.get("__reduce_ex__")
    names["__reduce_ex__"] = tap.reduce  # before the other, and gone after it: another thread may be copying
    names["forward"] = tap.forward


def unbind(pairs: list[tuple[nn.Module, Rule]]) -> None:
    """Takes each rule away again, where it still is; the last one to go puts the module's own forward back."""
    with torch_private.while_nothing_is_traced(), LOCK:
        for module, rule in pairs:
            tap = _taps.get(id(module))
            if tap is None or not tap.rules:
                continue
            if len(tap.rules) == 1 and tap.rules[0] is rule:
                tap.rules = ()
                _put_back(module, tap)
                continue
            tap.rules = tuple([r for r in tap.rules if r is not rule])
            tap.simple = tap.previous is None and all([r.simple for r in tap.rules])


def _put_back(module: nn.Module, tap: Tap) -> None:
    """Restores `forward`, unless somebody else has rebound it meanwhile: a context undoes only its own work.

    Then the tap may be called from inside theirs for ever, so it is left as it is, and the module gets another one.
    """
    names = module.__dict__
    if names.get("forward") is not tap.forward:
        _taps.pop(id(module), None)
    elif tap.previous is None:
        del names["forward"]
    else:
        names["forward"] = tap.previous
        tap.previous = tap.parameters = None
    if tap.reduce.previous is None:
        names.pop("__reduce_ex__", None)
    else:
        names["__reduce_ex__"] = tap.reduce.previous


class Passing(torch.overrides.TorchFunctionMode):
    """Does nothing, but PyTorch's fused fast paths see that it is there, in this thread, and stand back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
