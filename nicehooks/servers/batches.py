"""One forward of the engine: whose rows are in it, and the rule that hands each request its own at a module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from nicehooks.core.frames import Frame, Rule
from nicehooks.core.rules import OutputRule
from nicehooks.servers.requests import Request, Stretch
from nicehooks.servers.rows import Change, Packed, put_back, taken_out


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
        turns = list(_turns(batch, frame))
        if turns:
            frame.kept[self] = batch.sizes, turns
            self._arguments(frame, turns, batch.sizes)

    def after(self, frame: Frame) -> None:
        sizes, turns = frame.kept.pop(self, (None, ()))
        changes: list[Change] = []
        for turn in turns:
            if turn.stretch.request.over:
                continue
            own = taken_out(frame.value, turn.stretch.span, sizes, self.head, _keeps(turn.rules))
            turn.frame.value = own
            if self._run(turn, lambda rule, frame: rule.after(frame)) and turn.frame.value is not own:
                changes.append(Change(turn.stretch.span, own, turn.frame.value))
        if changes:
            frame.value = put_back(frame.value, changes, sizes, self.head)

    def _arguments(self, frame: Frame, turns: list[Turn], sizes: Packed) -> None:
        """Lets the rules act before the call; those about its arguments get the rows of their request."""
        changes: list[Change] = []
        for turn in turns:
            plain = all([isinstance(rule, OutputRule) for rule in turn.rules])
            given: Any = (frame.args, frame.kwargs)
            own = given if plain else taken_out(given, turn.stretch.span, sizes, self.head_in, _keeps(turn.rules))
            turn.frame.args, turn.frame.kwargs = own
            if self._run(turn, lambda rule, frame: rule.before(frame)) and not plain:
                changes.append(Change(turn.stretch.span, own, (turn.frame.args, turn.frame.kwargs)))
        if changes:
            frame.args, frame.kwargs = put_back((frame.args, frame.kwargs), changes, sizes, self.head_in)

    def _run(self, turn: Turn, act: Callable[[Any, Frame], None]) -> bool:
        """Whether all rules of `turn` went well."""
        for session, progress in turn.stretch.progresses:
            session.at = progress
        try:
            for rule in turn.rules:
                act(rule, turn.frame)
        except Exception as error:
            self.fail(turn.stretch.request, error)
            return False
        return True


def _turns(batch: PackedBatch, frame: Frame) -> Iterator[Turn]:
    module: nn.Module = frame.module
    for stretch in batch.stretches:
        rules = stretch.request.rules.get(module)
        if rules is None or stretch.request.over:
            continue
        if stretch.again:  # see NOTE [Rows that come again]
            rules = [rule for rule in rules if not _keeps([rule])]
        yield Turn(stretch, rules, Frame(frame.tap, (), {}))


def _keeps(rules: list[Any]) -> bool:
    """Whether any of `rules` keeps what it sees."""
    return any([hasattr(rule, "action") and not rule.action.changes for rule in rules])
