"""Who is active where: one session per entry of a context, in the thread or task that entered it.

NOTE [Two views of who is active]
Eager code reads the active sessions from a `ContextVar`: it follows tasks and copies of contexts. Dynamo cannot trace a
`ContextVar`, but it can trace a `threading.local`, with guards. So entering and leaving keep both equal, and a tap asks
first whether Dynamo is tracing it, which Dynamo knows by itself, and which sends traced code to the `threading.local`.
There, sessions are known by small numbers that are given again once they are free: numbers can be guarded, and a second
context of the same kind gets the number of the first, so that nothing is compiled again. Eager code cannot use the
numbers: a task may still hold a copy of the context in which a number belonged to somebody who has left.

What traced code reads, it is guarded on, and what it is guarded on must be the same in the next entry: so traced code
writes what it has seen, and reads a count only if an intervention asks for one.

NOTE [Steps and calls are counted per thread]
A session that is attached, or carried along by a copy of the context, may see two forwards at the same time. Each
thread counts its own steps, and its own calls within a step. It finds its counts by the slot of the session, in eager
code as in traced code: a part of the model may be compiled, and the rest not. Eager code also looks whether they are of
this session, and not of one that had the slot before.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from nicehooks import torch_private
from nicehooks.core.exclusive import Exclusive

_rounds = itertools.count(1)


class Progress:
    """How far one thread is: the step, how deep in the root model it is, and what has happened within this step.

    Attributes:
        session: the number of the session whose progress it is.
        thread: the number of the thread.
        calls: how often each rule's module has been called, by the index of the rule.
        seen: the sites that a capture which stops early has seen.
        rows: the leading dimensions of what the module around a site was called with last, for the step `/rows`.
    """

    __slots__ = ("calls", "depth", "rows", "seen", "session", "step", "thread")

    def __init__(self, session: int, thread: int) -> None:
        self.session = session
        self.thread = thread
        self.step = -1
        self.depth = 0
        self.calls: dict[int, int] = {}
        self.seen: set[str] = set()
        self.rows: tuple[int, ...] | None = None

    def next_step(self) -> None:
        """The root model is called anew."""
        self.step += 1
        self.calls.clear()
        self.seen.clear()


class Session:
    """One entry of a context: what its rules have seen, and how far the model is.

    Attributes:
        label: how the intervention is shown to the user.
        acts_in: a set of active sessions that this one is in, by identity: the cheapest way to know that it acts here.
        round: a new number for each call of the root model: what is seen twice in one may be running again in backward.
        slot: a number that no other living session has; of an attached one, a number that no other has ever had.
        number: its own for ever, once it has begun.
        mine: how far the thread is that has entered it, or that was first to call the model under it.
        level: how many `torch.func` transforms were running at entry: captured values are those of this level.
        attached: whether it acts in every thread and task.
        counting: whether any of its rules asks for a step or a call.
        exporting: whether it was entered inside of code that is being exported.
        ended: whether the context was left.
        called: whether the root model was called here.
        elsewhere: whether a selected module was called where this session does not act.
        suspended: whether a selected module was called under `suspend`.
        order: of the gradient that is on its way: when its value was made.
        ticket: by which compiled code comes back to `rules` in backward, if any of them is about a gradient.
        rules: the rules of the sites; empty without a ticket.
        reached: the keys of the rules that have acted.
        checkpointed: how deep in activation-checkpointed regions a rule changed something.
        recomputed: whether a backward pass came by and ran it again.
    """

    __slots__ = (
        "__weakref__",
        "_progresses",
        "acts_in",
        "attached",
        "called",
        "checkpointed",
        "counting",
        "elsewhere",
        "ended",
        "exporting",
        "label",
        "level",
        "mine",
        "number",
        "order",
        "reached",
        "recomputed",
        "round",
        "rules",
        "slot",
        "suspended",
        "ticket",
    )

    def __init__(self, label: str, attached: bool = False) -> None:
        self.label = label
        self.attached = attached
        self.counting = False
        self.level = 0 if attached else torch_private.transform_level()  # a handle may outlive every transform
        self.exporting = torch_private.is_exporting()
        self.ended = False
        self.acts_in: frozenset[Session] | None = None
        self.order = self.round = self.checkpointed = self.number = 0
        self.called = self.elsewhere = self.suspended = self.recomputed = False
        self.reached: dict[str, bool] = {}
        self.slot = -1
        self.ticket: torch.Tensor | None = None
        self.rules: dict[int, Any] = {}
        self._progresses: list[Progress] = []
        self.mine: Progress | None = None

    def progress(self) -> Progress:
        """How far this thread is; see NOTE [Steps and calls are counted per thread]."""
        if self.slot < 0:  # entered in code that is being traced
            self.mine = Progress(0, 0) if self.mine is None else self.mine
            return self.mine
        if torch.compiler.is_dynamo_compiling():
            return self._progress_in_traced_code()
        found = HERE.progress.get(self.slot)
        if found is not None and found.session == self.number:
            return found
        if len(self._progresses) == 1 and torch_private.in_backward():
            return self._progresses[0]  # a thread of autograd's own goes on with the forward's
        return self._new_progress()

    def _progress_in_traced_code(self) -> Progress:
        """By way of the session, where it can be: what Dynamo finds by way of a thread it takes for a constant."""
        if self.mine is not None and (not self.attached or self.mine.thread == HERE.number):
            return self.mine
        found = HERE.progress.get(self.slot)
        return self._new_progress() if found is None else found

    def _new_progress(self) -> Progress:
        found = HERE.progress[self.slot] = Progress(self.number, HERE.number)
        self._progresses.append(found)
        if self.mine is None:
            self.mine = found
        return found


_active: ContextVar[frozenset[Session]] = ContextVar("nicehooks.active", default=frozenset())
active_sessions: Callable[[], frozenset[Session]] = _active.get
"""The sessions that act here; not in traced code. See NOTE [Two views of who is active]."""
_used_slots: dict[int, int] = {}
"""The number of the session that has each slot."""
_session_numbers = itertools.count(1)
_thread_numbers = itertools.count(1)
ATTACHED = 1_000_000
"""The slots of attached sessions are numbers behind this one."""


class _Here(threading.local):
    """What belongs to this thread.

    Attributes:
        slots: the slots of the sessions that act in it, for traced code.
        traced: what traced code has entered itself, by the `id` of the module: the forward that stood in its `__dict__`
            before, and the rules. Empty whenever no such code is being traced.
        progress: how far each session is, by its slot.
        entered: the sessions that were entered in it, and not left in it.
        number: its own for ever; the identifier of a thread that has ended is given to another.
    """

    def __init__(self) -> None:
        self.slots: tuple[int, ...] = ()
        self.traced: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self.progress: dict[int, Progress] = {}
        self.entered: list[Session] = []
        self.number = next(_thread_numbers)


HERE = _Here()


def number(session: Session) -> None:
    """Gives `session` its own number, before anything is done in its name."""
    session.number = next(_session_numbers)
    new_round(session)


def begin(session: Session) -> None:
    """From here on `session` acts in this thread or task."""
    if session.attached:
        session.slot = ATTACHED + session.number
        return
    _forget_ended()
    with Exclusive():
        session.slot = next(number for number in range(len(_used_slots) + 1) if number not in _used_slots)
        _used_slots[session.slot] = session.number
    HERE.entered.append(session)
    session.acts_in = _active.get() | {session}
    _active.set(session.acts_in)
    HERE.slots = (*HERE.slots, session.slot)
    if session.counting:
        session.progress()  # traced code looks no further than this


def end(session: Session) -> None:
    """Undoes `begin`, by value and not by token: a fixture or a generator may leave in another context."""
    session.ended = True
    session.acts_in = None
    HERE.progress.pop(session.slot, None)
    _forget_ended()


def _forget_ended() -> None:
    """Lets go of the sessions that were entered in this thread and are over, in whichever thread they were left.

    Only here are their slots given free: until then traced code of this thread takes them for active.
    """
    active = _active.get()
    if any([session.ended for session in active]):
        _active.set(frozenset([session for session in active if not session.ended]))
    ended = [session for session in HERE.entered if session.ended]
    for session in ended:
        HERE.slots = tuple([slot for slot in HERE.slots if slot != session.slot])
        with Exclusive():
            if _used_slots.get(session.slot) == session.number:
                del _used_slots[session.slot]
        HERE.entered.remove(session)


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
