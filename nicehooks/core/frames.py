"""One call of a tapped module on its way through the rules: before, around and after the module's own forward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from nicehooks.core.sessions import Session


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
        answer: a tuple of the one value that is the result without a call of the module's own forward, if there is one.
        counts: which call this is, for each rule that counts calls.
        kept: what rules keep for the rest of the call, by keys of theirs.
    """

    __slots__ = (
        "answer", "args", "contexts", "counts", "inside", "kept", "kwargs", "module", "tap", "value", "watcher"
    )  # fmt: skip

    def __init__(self, tap: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tap = tap
        self.module: Any = tap.module()
        self.args = args
        self.kwargs = kwargs
        self.value: Any = None
        self.contexts: list[AbstractContextManager[Any]] = []
        self.inside: Any = None
        self.watcher: Any = None
        self.answer: tuple[Any] | None = None
        self.counts: dict[Rule, Any] = {}
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

    def take_actions(self, actions: list[Any]) -> None:
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


def staged(tap: Any, rules: list[Rule], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call with everything that rules may do before, around and after it."""
    if not rules:
        return tap.call(tap.module(), args, kwargs)
    frame = Frame(tap, args, kwargs)
    try:
        for rule in rules:
            rule.before(frame)
        if frame.answer is not None:
            (frame.value,) = frame.answer
        elif frame.watcher is not None:
            frame.value = _watched_call(tap, frame)
        else:
            frame.value = tap.call(frame.module, frame.args, frame.kwargs)
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
        if frame.watcher is not None:
            frame.watcher = frame.module = None  # both know the frame, and the frame the value
    return frame.value


def _is_caught(stop: StopForward, rules: list[Rule]) -> bool:  # a function: Dynamo knows no cell that `except` deletes
    return any([rule.caught(stop) for rule in rules])


def _watched_call(tap: Any, frame: Frame) -> Any:
    with frame.watcher:
        return tap.call(frame.module, frame.args, frame.kwargs)
