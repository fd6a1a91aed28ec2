"""At which steps of the model, and at which calls of a module, an intervention acts.

NOTE [Counting in traced code]
Dynamo takes most ints for constants and would compile again for each. So a count is no int but an object that knows
what the filter says to it, and which count comes after it: a chain that ends in a circle, as what a filter says to
numbers does. Traced code goes along it, is guarded on the answers alone, and is compiled once for each. A predicate may
say anything, and its counts are made as they are needed, from ints.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any, NamedTuple

from nicehooks.paths.ports import EVERY_CALL


class Count:
    """A number of a step, or of a call, and what the filter says to it; see NOTE [Counting in traced code].

    Attributes:
        number: zero only where it is that; later ones in a circle have that of their first time round.
    """

    __slots__ = ("_admitted", "_after", "number")

    def __init__(self, number: int, admitted: bool) -> None:
        self.number = number
        self._admitted = admitted
        self._after: Count = self

    def admits(self) -> bool:
        """Whether to act at this number."""
        return self._admitted

    def after(self) -> Count:
        """The next number."""
        return self._after

    def before(self) -> Count:
        """What comes before this number, and is treated as this number is."""
        count = Count(self.number - 1, self.admits())
        count._after = self
        return count


class _OpenCount(Count):
    """Of a filter that may say anything to any number."""

    __slots__ = ("test",)

    def __init__(self, number: int, test: Callable[[int], bool]) -> None:
        self.number = number
        self.test = test

    def admits(self) -> bool:
        return self.test(max(self.number, 0))

    def after(self) -> Count:
        return _OpenCount(self.number + 1, self.test)

    def before(self) -> Count:
        return _OpenCount(self.number - 1, self.test)


class _Filter(NamedTuple):
    """What is wanted of numbers, and from where on it says the same again and again: None where that is not known."""

    test: Callable[[int], bool]
    settled: int | None = 1
    circle: int = 1

    def __and__(self, other: _Filter) -> _Filter:
        settled = None if self.settled is None or other.settled is None else max(self.settled, other.settled)
        return _Filter(lambda number: self.test(number) and other.test(number), settled, lcm(self.circle, other.circle))

    def first(self) -> Count:
        """The count of the number zero."""
        if self.settled is None or self.settled + self.circle > MOST_COUNTS:
            return _OpenCount(0, self.test)
        counts = [Count(number, bool(self.test(number))) for number in range(self.settled + self.circle)]
        for count, after in zip(counts, [*counts[1:], counts[self.settled]], strict=True):
            count._after = after  # pyright: ignore[reportPrivateUsage]
        return counts[0]


MOST_COUNTS = 10_000
"""How long a chain of counts may be; longer ones are made as they are needed."""


class When:
    """Which steps and which calls an intervention acts at.

    Args:
        steps, calls: an int, a slice, a list of ints, a predicate `(number) -> bool`, or None for all.
        call: the call number of the path, if it has one.

    Attributes:
        counts: whether anything is filtered or told apart by numbers.
        first_call: the count of the first call in a step; None where the number of the call is not asked for.
        no_step: the count before the first step, likewise.
        optional: whether it may never admit anything, and that is fine.
        shown: the filters as text.
    """

    __slots__ = ("counts", "first_call", "no_step", "optional", "shown")

    def __init__(self, steps: Any, calls: Any, call: int | str | None) -> None:
        by_path = _Filter(lambda number: True, None) if call == EVERY_CALL else _filter("calls", call)
        by_option, by_step = _filter("calls", calls), _filter("steps", steps)
        numbers_calls = not (calls is None and call is None)
        self.first_call = (by_option & by_path).first() if numbers_calls else None
        self.no_step = None if steps is None else by_step.first().before()
        self.counts = not (steps is None and calls is None and call is None)
        self.optional = callable(steps) or callable(calls)  # a predicate may well never say yes
        given = {"steps": steps, "calls": calls, "call": call}
        self.shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)


def _filter(name: str, wanted: Any) -> _Filter:
    if wanted is None:
        return _Filter(lambda number: True)
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return _Filter(lambda number: number == wanted, max(wanted, 0) + 1)
    if isinstance(wanted, slice):
        if any(bound is not None and bound < 0 for bound in (wanted.start, wanted.stop, wanted.step)):
            raise ValueError(f"{name}={wanted}: nobody knows how many there will be, so counting from the end fails")
        first, last, each = wanted.start or 0, wanted.stop, wanted.step or 1
        settled, circle = (max(first, 1), each) if last is None else (last + 1, 1)
        # as arithmetic: Dynamo has no `range` for it
        return _Filter(lambda n: first <= n and (last is None or n < last) and (n - first) % each == 0, settled, circle)
    if callable(wanted):
        return _Filter(lambda number: bool(wanted(number)), None)
    if isinstance(wanted, list | tuple | range | set | frozenset) and all(type(number) is int for number in wanted):
        return _Filter(lambda number: number in wanted, max([0, *wanted]) + 1)
    raise TypeError(f"{name}={wanted!r}: give an int, a slice, a list of ints or a predicate (number) -> bool")


ALWAYS = When(None, None, None)
"""Every call of every step."""
