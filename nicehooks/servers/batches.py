"""One forward of the engine: whose rows are in it, and the rule that hands each request its own at a module."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nicehooks.core.frames import Frame, Rule
from nicehooks.core.rules import OutputRule
from nicehooks.servers.pieces import keeps
from nicehooks.servers.requests import Request, Stretch
from nicehooks.servers.rows import Change, Packed, is_absent, put_back, taken_out
from nicehooks.servers.sums import all_shifted


class PackedBatch(NamedTuple):
    """The rows of one forward.

    Attributes:
        stretches: those of the requests that are under a context, in the order of the rows.
        thread: in which it runs; a forward of somebody else's meanwhile is none of its business.
    """

    stretches: list[Stretch]
    sizes: Packed
    thread: int


def lay_out(scheduled: list[Any], requests: dict[str, Request]) -> PackedBatch:
    """The rows of a forward of what the engine has scheduled."""
    stretches: list[Stretch] = []
    row = logit = 0
    for each in scheduled:
        count, has_logit = each.query_length, each.has_new_token
        request = requests.get(each.state.request_id)
        if request is not None and request.rules and not request.over:
            start = each.state.position_offset - count  # the engine has counted these already
            stretches += request.stretches(start, count, row, logit if has_logit else None)
        row += count
        logit += has_logit
    return PackedBatch(stretches, Packed(row, len(scheduled)), threading.get_ident())


class Turn(NamedTuple):
    """One stretch at one module: its rules, and the call of the module as if it were the only one."""

    stretch: Stretch
    rules: list[Any]
    frame: Frame

    def taken_out(self, value: Any, sizes: Packed, head: bool) -> Any:
        """The rows of the stretch in `value`; see NOTE [Prompts in pieces]."""
        span = self.stretch.span
        return taken_out(value, span, sizes, head, any(map(keeps, self.rules)), spread=span.is_piece)


class TurnRule(Rule):
    """At the model: one call at a time, whoever calls.

    A forward of the engine tells `transformers` how attention masks by writing `is_causal` into the model's config, and
    puts back what it has found there. Of two forwards at once, one would look ahead, and leave that behind for ever.
    """

    __slots__ = ("lock",)

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self.lock = lock

    def before(self, frame: Frame) -> None:
        if not torch.compiler.is_compiling():
            frame.enter(self.lock)


LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""For the calls of each model that is or was served: two servers of one model share it."""


class BeginRule(Rule):
    """At the model: lays out the rows of each forward of the engine."""

    __slots__ = ("begin",)

    def __init__(self, begin: Callable[[dict[str, Any]], None]) -> None:
        self.begin = begin

    def before(self, frame: Frame) -> None:
        self.begin(frame.kwargs)


class CrowdRule(Rule):
    """At one module: hands each request in the batch its rows, and puts what it made of them back.

    A request whose function raises is failed, and its rows are left alone; the others go on.

    Attributes:
        batch: gives the batch that runs now.
        fail: fails one request.
        head: whether the module is at the head, so that its output may have the rows of the requests that get a token;
            `head_in`: likewise its arguments.
    """

    __slots__ = ("batch", "fail", "head", "head_in", "users")

    def __init__(self, batch: Callable[[], PackedBatch | None], fail: Any, head: bool, head_in: bool) -> None:
        self.batch = batch
        self.fail = fail
        self.head = head
        self.head_in = head_in
        self.users = 0

    def before(self, frame: Frame) -> None:
        batch = self.batch()
        if batch is None or batch.thread != threading.get_ident():
            return
        turns, shifts = _turns(batch, frame)
        if turns or shifts:
            frame.kept[self] = batch.sizes, turns, shifts
            self._arguments(frame, turns, batch.sizes)

    def after(self, frame: Frame) -> None:
        sizes, turns, shifts = frame.kept.pop(self, (None, [], []))
        if shifts:
            turns = self._shifted(frame, turns, shifts, sizes)
        changes: list[Change] = []
        for turn in turns:
            if turn.stretch.request.over:
                continue
            own = turn.taken_out(frame.value, sizes, self.head)
            if self.head and is_absent(own):
                continue
            turn.frame.value = own
            if self._run(turn, "after") and turn.frame.value is not own:
                changes.append(Change(turn.stretch.span, own, turn.frame.value))
        if changes:
            frame.value = put_back(frame.value, changes, sizes, self.head)

    def _shifted(self, frame: Frame, turns: list[Turn], shifts: list[Stretch], sizes: Any) -> list[Turn]:
        """Steers in one sum those that want no more, and returns the turns of the others: all where it cannot be."""
        each = [(stretch.span, stretch.request.shifts[frame.module]) for stretch in shifts if not stretch.request.over]
        summed = all_shifted(frame.value, each, sizes) if each and not self.head else None
        if summed is not None:
            frame.value = summed
            return turns
        longer = [Turn(stretch, stretch.request.rules[frame.module], Frame(frame.tap, (), {})) for stretch in shifts]
        return sorted([*turns, *longer], key=lambda turn: turn.stretch.span.start)

    def _arguments(self, frame: Frame, turns: list[Turn], sizes: Packed) -> None:
        """Lets the rules act before the call; those about its arguments get the rows of their request."""
        changes: list[Change] = []
        for turn in turns:
            plain = all([isinstance(rule, OutputRule) for rule in turn.rules])
            given: Any = (frame.args, frame.kwargs)
            own = given if plain else turn.taken_out(given, sizes, self.head_in)
            if self.head_in and not plain and is_absent(own):
                continue
            turn.frame.args, turn.frame.kwargs = own
            if self._run(turn, "before") and not plain:
                changes.append(Change(turn.stretch.span, own, (turn.frame.args, turn.frame.kwargs)))
        if changes:
            frame.args, frame.kwargs = put_back((frame.args, frame.kwargs), changes, sizes, self.head_in)

    def _run(self, turn: Turn, phase: str) -> bool:
        """Whether all rules of `turn` went well, before or after the call."""
        for session, progress in turn.stretch.progresses:
            session.at = progress
        try:
            request, span, _, _ = turn.stretch
            for rule in turn.rules:
                if span.is_piece:
                    request.pieces.act(rule, turn.frame, phase, span)
                else:
                    getattr(rule, phase)(turn.frame)
        except BaseException as error:  # a `SystemExit`, too, would end the engine
            self.fail(turn.stretch.request, error)
            return False
        return True


def _turns(batch: PackedBatch, frame: Frame) -> tuple[list[Turn], list[Stretch]]:
    """The turns at the module of `frame`, and the stretches that are only steered there."""
    module: nn.Module = frame.module
    turns: list[Turn] = []
    shifts: list[Stretch] = []
    for stretch in batch.stretches:
        request = stretch.request
        rules = request.rules.get(module)
        if rules is None or request.over:
            continue
        if module in request.shifts:
            shifts.append(stretch)
            continue
        if stretch.again:  # see NOTE [Rows that come again]
            rules = [rule for rule in rules if not keeps(rule)]
        turns.append(Turn(stretch, rules, Frame(frame.tap, (), {})))
    return turns, shifts
