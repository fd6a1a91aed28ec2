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
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import torch_private
from nicehooks.core import sessions
from nicehooks.core.register import Pairs
from nicehooks.core.sessions import HERE, Exclusive, Session, acts_in_backward
from nicehooks.errors import UnsupportedModule

transforms_running = torch_private.transforms_running
version_counter = torch_private.version_counter


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
        plain: whether it only keeps the whole result; see NOTE [The shortest way].
    """

    __slots__ = ("session",)
    simple = False
    plain = False
    suspends = False
    session: Session

    def given(self, actions: list[Any]) -> None:
        """The actions of the intervention that uses the rule from now on."""

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
    """Stands in for one module's `forward`; see NOTE [One tap per module, kept].

    Attributes:
        module: the module, weakly.
        kind: its class, and `found` the forward of that; see NOTE [Whose code is called].
        function: the same as a function of the module and the arguments.
        previous: a forward that stood in the instance's `__dict__` before.
        parameters: of the forward that it calls: see `parameters_of`.
        rules: in the order in which they act.
        simple: whether `output` is all there is to each of them.
        only: the one rule, where it is plain, and `bound` what is called then; see NOTE [The shortest way].
        alive: whether it may be bound again.
        copying: what answers where the module is copied.
        entries: what it puts into the instance's `__dict__`.
    """

    __slots__ = (
        "__weakref__",
        "alive",
        "bound",
        "copying",
        "entries",
        "forward",
        "found",
        "function",
        "kind",
        "module",
        "only",
        "parameters",
        "previous",
        "rules",
        "simple",
    )

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.kind: Any = type(module)
        self.found: Any = self.kind.forward
        self.function: Any = _unbound(self.kind)
        self.previous: Any = None
        self.parameters: Any = parameters_of(signature_of(self.function))
        self.rules: tuple[Rule, ...] = ()
        self.simple = True
        self.only: Any = None
        self.bound: Any = None
        self.alive = True
        self.forward: Any = _forward_of(self)
        self.copying: list[Any] = [_Reduce(self.module), _Replicate(self.module)]
        # the forward comes last: another thread may be copying the module
        self.entries: Any = {**{copying.name: copying for copying in self.copying}, "forward": self.forward}

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling() and self.kind.forward is not self.found:
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

    @property
    def is_clean(self) -> bool:
        """Whether the instance had none of the entries before."""
        reduce, replicate = self.copying
        return self.previous is None and reduce.previous is None and replicate.previous is None


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
        rule = tap.only
        if rule is not None and active is rule.session.acts_in and tap.kind.forward is tap.found:
            value = tap.bound(*args, **kwargs)
            session = rule.session
            if type(value) is not Tensor or transforms_running() or rule.round == session.round:
                return rule.output(value)
            try:
                version = version_counter(value)
            except RuntimeError:  # made under inference_mode
                return rule.output(value)
            rule.round = session.round
            key, action = rule.key, rule.action
            action.cache[key] = value
            action.seen[key] = (value, version)
            return value
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


class _Copying:
    """Answers in the place of a method of a tapped module that copies it; see NOTE [Copies of a tapped module]."""

    __slots__ = ("module", "previous")
    name = ""

    def __init__(self, module: weakref.ref[nn.Module]) -> None:
        self.module = module
        self.previous: Any = None  # one that stood in the instance's __dict__ before

    def of_model(self, *args: Any) -> Any:
        """What the module answers without us."""
        module: Any = self.module()
        return getattr(type(module), self.name)(module, *args) if self.previous is None else self.previous(*args)


class _Reduce(_Copying):
    """For `copy` and `pickle`."""

    __slots__ = ()
    name = "__reduce_ex__"

    def __call__(self, protocol: Any = 2) -> Any:
        reduced = self.of_model(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        return (*reduced[:2], _clean(self.module(), reduced[2]), *reduced[3:])


class _Replicate(_Copying):
    """For `DataParallel`, whose replicas have the entries of the module."""

    __slots__ = ()
    name = "_replicate_for_data_parallel"

    def __call__(self) -> Any:
        replica = self.of_model()
        replica.__dict__ = _clean(self.module(), replica.__dict__)
        return replica


_COPYING = (_Reduce.name, _Replicate.name)
_ENTRIES = frozenset([*_COPYING, "forward"])


def _clean(module: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of `module` without ours, and with those in whose place ours stand."""
    tap = tap_of(module)
    state = {name: value for name, value in state.items() if name not in _ENTRIES and name != HANDLES}
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
    tap = _taps.get(key)
    if tap is not None and tap.module() is None:
        del _taps[key]
        tap.rules = ()
        tap.forward = tap.entries = None


Bound = tuple[Tap, Any, tuple[Any]]
"""A rule with its tap, and alone in a tuple; it knows the module weakly."""


def taps_for(pairs: Pairs) -> list[Bound]:
    """The rules with the taps of their modules."""
    with Exclusive():
        return [(tap_of(module) or _make_tap(module), rule, (rule,)) for module, rule in pairs]


def bind(taps: list[Bound], session: Session, actions: list[Any] | None = None, first: bool = False) -> None:
    """Adds each rule to its tap, for `session`, with other `actions` if there are any; see NOTE [Order]."""
    sessions.teach_who_is_active()
    contexts_only = not session.attached
    with Exclusive(tracing=True):
        for tap, rule, alone in reversed(taps) if first else taps:
            rule.session = session
            if actions is not None:
                rule.given(actions)
            module: Any = tap.module()
            names = module.__dict__
            if tap.rules or tap.kind.forward is not tap.found or not names.keys().isdisjoint(_ENTRIES):
                _bind_slowly(tap, module, rule, first)
                continue
            tap.rules = alone
            tap.simple = rule.simple
            if rule.plain and contexts_only:
                tap.bound = MethodType(tap.function, module)
                tap.only = rule
            names.update(tap.entries)


def _bind_slowly(tap: Tap, module: Any, rule: Rule, first: bool) -> None:
    tap.only = None
    if not tap.rules:
        _put_in(module, tap)
    at = _behind_suspends(tap.rules) if first else len(tap.rules)
    tap.rules = (*tap.rules[:at], rule, *tap.rules[at:])
    tap.simple = tap.simple and rule.simple


def _behind_suspends(rules: tuple[Rule, ...]) -> int:
    return max([at + 1 for at, rule in enumerate(rules) if rule.suspends], default=0)


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
        found = names.get(copying.name)
        copying.previous = None if found is copying else found
    names.update(tap.entries)


def unbind(taps: list[Bound]) -> None:
    """Takes each rule away again, where it still is; the last one to go puts the module's own forward back."""
    with Exclusive(tracing=True):
        for tap, rule, _ in taps:
            module: Any = tap.module()
            if module is None:
                continue
            names = module.__dict__
            if tap.only is rule and names.get("forward") is tap.forward:
                del names["forward"]
                for name in _COPYING:
                    names.pop(name, None)
                tap.only = tap.bound = None
                tap.rules = ()
            elif rule in tap.rules or (not tap.rules and names.get("forward") is tap.forward):
                _unbind_slowly(tap, module, rule)


def _unbind_slowly(tap: Tap, module: Any, rule: Rule) -> None:
    tap.only = None
    tap.rules = tuple([r for r in tap.rules if r is not rule])
    if not tap.rules:
        _put_back(module, tap)
        return
    tap.simple = tap.previous is None and all([r.simple for r in tap.rules])
    (last, *others) = tap.rules
    if tap.is_clean and not others and last.plain and not last.session.attached:
        tap.bound = MethodType(tap.function, module)
        tap.only = last


def _put_back(module: nn.Module, tap: Tap) -> None:
    """Restores `forward`, unless somebody else has rebound it meanwhile: a context undoes only its own work.

    Then the tap may be called from inside theirs for ever, so it is left as it is, and the module gets another one.
    """
    names = module.__dict__
    tap.bound = None
    if names.get("forward") is not tap.forward:
        if _taps.get(id(module)) is tap:
            del _taps[id(module)]
        tap.alive = False
    elif tap.previous is None:
        del names["forward"]
    else:
        names["forward"] = tap.previous
        tap.previous = None
        tap.parameters = parameters_of(signature_of(tap.function))
    for copying in tap.copying:
        if names.get(copying.name) is not copying:
            continue
        if copying.previous is None:
            del names[copying.name]
        else:
            names[copying.name] = copying.previous
            copying.previous = None


class Passing(torch.overrides.TorchFunctionMode):
    """Does nothing, but PyTorch's fused fast paths see that it is there, in this thread, and stand back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
