"""Who is active where: one session per entry of a context, in the thread or task that entered it.

NOTE [Two views of who is active]
Eager code reads the active sessions from a `ContextVar`: it follows tasks and copies of contexts. Dynamo cannot trace a
`ContextVar`, but it can trace a `threading.local`, with guards. So entering and leaving keep both equal, and a tap asks
first whether Dynamo is tracing it, which Dynamo knows by itself, and which sends traced code to the `threading.local`.

What traced code reads, it is guarded on, and what it is guarded on must be the same in the next entry and in the next
thread. So it does not read who has rules at a tap, which may be any thread: each thread has its own sessions in order,
and each session its rules by module. And it writes what it has seen, and reads a count only if an intervention asks
for one.

NOTE [Steps and calls are counted per thread]
A session that is attached, or carried along by a copy of the context, may see two forwards at the same time. Each
thread counts its own steps, and its own calls within a step, in eager code as in traced code: a part of the model may
be compiled, and the rest not.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from nicehooks import torch_private

_rounds = itertools.count(1)


class Progress:
    """How far one thread is: the step, how deep in the root model it is, and what has happened within this step.

    Attributes:
        thread: the number of the thread; 0 where no other one can meet it.
        step: the count of the step, where an intervention asks for it.
        depth: how many modules are being called that may be the outermost one.
        rooted: whether the root model has been called.
        part: the name of the outermost module that is called, as long as the root model has not been; then that of the
            one that was called beside it.
        within: the names of the modules that were called in the root model.
        calls: the count of the calls of each rule's module, by the index of the rule.
        seen: the sites that a capture which stops early has seen.
        rows: the leading dimensions of what the module around a site was called with last, for the step `/rows`.
    """

    __slots__ = ("calls", "depth", "no_step", "part", "rooted", "rows", "seen", "step", "thread", "within")

    def __init__(self, thread: int, no_step: Any) -> None:
        self.thread = thread
        self.no_step = no_step
        self.rows: tuple[int, ...] | None = None
        self.start()

    def start(self) -> None:
        """Counts from the first step again."""
        self.step: Any = self.no_step
        self.depth = 0
        self.rooted = False
        self.part: str | None = None
        self.within: dict[str, bool] = {}
        self.calls: dict[int, Any] = {}
        self.seen: set[str] = set()

    def next_step(self) -> None:
        """The root model is called anew."""
        if self.step is not None:
            self.step = self.step.after()
        self.calls = {}
        self.seen = set()


class Session:
    """One entry of a context: what its rules have seen, and how far the model is.

    Attributes:
        label: how the intervention is shown to the user.
        acts_in: a set of active sessions that this one is in, by identity: the cheapest way to know that it acts here.
        round: a new number for each call of the root model: what is seen twice in one may be running again in backward.
        number: its own for ever, once it has begun.
        tapped: its rules by the `id` of the module, for traced code; see NOTE [Two views of who is active].
        no_step: the count before the first step, if any of its rules asks for a step.
        mine: how far the thread is that has entered it, or that was first to call the model under it.
        level: how many `torch.func` transforms were running at entry: captured values are those of this level.
        attached: whether it acts in every thread and task.
        counting: whether any of its rules asks for a step or a call.
        exporting: whether it was entered inside of code that is being exported.
        ended: whether the context was left.
        called: whether the root model was called here.
        displaced: a tap in whose place somebody else has put another forward.
        elsewhere: whether a selected module was called where this session does not act.
        suspended: whether a selected module was called under `suspend`.
        stopped: whether something has ended a forward of the root model early.
        order: of the gradient that is on its way: when its value was made.
        ticket: by which compiled code comes back to `rules` in backward, if any of them is about a gradient.
        rules: the rules of the sites; empty without a ticket.
        reached: the keys of the rules that have acted.
        checkpointed: how deep in activation-checkpointed regions a rule changed something.
        recomputed: whether a backward pass came by and ran it again.
    """

    __slots__ = (
        "__weakref__", "_progresses", "acts_in", "attached", "called", "checkpointed", "counting", "displaced",
        "elsewhere", "ended", "exporting", "label", "level", "mine", "no_step", "number", "order", "reached",
        "recomputed", "round", "rules", "stopped", "suspended", "tapped", "ticket"
    )  # fmt: skip

    def __init__(self, label: str, attached: bool = False) -> None:
        self.label = label
        self.attached = attached
        self.counting = False
        self.level = 0 if attached else torch_private.transform_level()  # a handle may outlive every transform
        self.exporting = torch_private.is_exporting()
        self.ended = False
        self.acts_in: frozenset[Session] | None = None
        self.order = self.round = self.checkpointed = self.number = 0
        self.called = self.elsewhere = self.suspended = self.recomputed = self.stopped = False
        self.reached: dict[str, bool] = {}
        self.tapped: Mapping[int, tuple[Any, ...]] = NOTHING
        self.no_step: Any = None
        self.ticket: torch.Tensor | None = None
        self.displaced: Any = None
        self.rules: dict[int, Any] = {}
        self._progresses: dict[int, Progress] = {}
        self.mine: Progress | None = None

    def progress(self) -> Progress:
        """How far this thread is; see NOTE [Steps and calls are counted per thread]."""
        mine, traced = self.mine, torch.compiler.is_dynamo_compiling()
        if traced and mine is not None and (mine.thread == 0 or mine.thread == HERE.number):
            return mine
        found = self._progresses.get(HERE.number)
        if found is not None:
            return found
        if not traced and mine is not None and len(self._progresses) == 1 and torch_private.in_backward():
            return mine  # a thread of autograd's own goes on with the forward's
        found = self._progresses[HERE.number] = Progress(HERE.number if self.attached else 0, self.no_step)
        if self.mine is None:
            self.mine = found
        return found

    def start_counting(self) -> None:
        """Counts from the first step again, in every thread."""
        for progress in self._progresses.values():
            progress.start()


NOTHING: Mapping[int, tuple[Any, ...]] = {}
_active: ContextVar[frozenset[Session]] = ContextVar("nicehooks.active", default=frozenset())
active_sessions: Callable[[], frozenset[Session]] = _active.get
"""The sessions that act here; not in traced code. See NOTE [Two views of who is active]."""
_session_numbers = itertools.count(1)
_thread_numbers = itertools.count(1)


class _Here(threading.local):
    """What belongs to this thread.

    Attributes:
        entered: the sessions that were entered in it, and not left in it, in order; traced code looks for rules there.
        traced: what traced code has entered itself, by the `id` of the module: the forward that stood in its `__dict__`
            before, and the rules. Empty whenever no such code is being traced.
        number: its own for ever; the identifier of a thread that has ended is given to another.
    """

    def __init__(self) -> None:
        self.entered: tuple[Session, ...] = ()
        self.traced: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self.number = next(_thread_numbers)


HERE = _Here()


def number(session: Session) -> None:
    """Gives `session` its own number, before anything is done in its name."""
    session.number = next(_session_numbers)
    new_round(session)


def begin(session: Session) -> None:
    """From here on `session` acts in this thread or task; one that is attached acts wherever its rules are."""
    if session.attached:
        return
    if HERE.entered or _active.get():
        _forget_ended()
    session.acts_in = _active.get() | {session}
    HERE.entered = (*HERE.entered, session)
    _active.set(session.acts_in)
    if session.counting:
        session.progress()  # traced code looks no further than this


def end(session: Session) -> None:
    """Undoes `begin`, by value and not by token: a fixture or a generator may leave in another context."""
    session.ended = True
    session.acts_in = None
    session.tapped = NOTHING  # the thread that entered it may be another one, and not know yet
    _forget_ended()


def _forget_ended() -> None:
    """Lets go of the sessions that were entered in this thread and are over, in whichever thread they were left."""
    _active.set(frozenset([session for session in _active.get() if not session.ended]))
    HERE.entered = tuple([session for session in HERE.entered if not session.ended])


def new_round(session: Session) -> None:
    """The root model is called anew."""
    session.round = next(_rounds)


def note_export(session: Session, key: str | None = None) -> None:
    """Under export: that the model was called, and a site reached. What is exported is traced and never run."""
    if torch_private.is_exporting() and not session.exporting:
        _note(session, key)


@torch_private.evaluated_while_tracing
def _note(session: Session, key: str | None) -> None:
    session.called = True
    if key is not None:
        session.reached[key] = True


def acts_in_backward(session: Session) -> bool:
    """Whether `session` acts in the thread that started the backward pass around this line, if there is one.

    Only asked where it does not act by itself: a checkpointed region runs again, in a thread of autograd's own.
    """
    context = torch_private.context_of_backward()
    return context is not None and session in context.get(_active, frozenset())


def is_acting(session: Any) -> bool:
    """Whether `session` acts here."""
    return session.attached or session in _active.get()
