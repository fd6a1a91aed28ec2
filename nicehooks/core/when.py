"""At which steps of the model, and at which calls of a module, an intervention acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicehooks.paths.ports import EVERY_CALL


class When:
    """Which steps and which calls an intervention acts at.

    Args:
        steps, calls: an int, a slice, a list of ints, a predicate `(number) -> bool`, or None for all.
        call: the call number of the path, if it has one.

    Attributes:
        counts: whether anything is filtered or told apart by numbers.
        numbers_calls: whether the number of the call is asked for.
        numbers_steps: whether the number of the step is asked for.
        optional: whether it may never admit anything, and that is fine.
        shown: the filters as text.
    """

    __slots__ = ("admits_call", "admits_step", "counts", "numbers_calls", "numbers_steps", "optional", "shown")

    def __init__(self, steps: Any, calls: Any, call: int | str | None) -> None:
        number = None if call == EVERY_CALL else call
        self.admits_step = _filter("steps", steps)
        by_option, by_path = _filter("calls", calls), _filter("calls", number)
        self.admits_call = lambda number: by_option(number) and by_path(number)
        self.counts = not (steps is None and calls is None and call is None)
        self.numbers_calls = not (calls is None and call is None)
        self.numbers_steps = steps is not None
        self.optional = callable(steps) or callable(calls)  # a predicate may well never say yes
        given = {"steps": steps, "calls": calls, "call": call}
        self.shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)

    def admits(self, step: int, call: int) -> bool:
        """Whether to act at this call of this step."""
        return self.admits_step(max(step, 0)) and self.admits_call(call)


def _filter(name: str, wanted: Any) -> Callable[[int], bool]:
    if wanted is None:
        return lambda number: True
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return lambda number: number == wanted
    if isinstance(wanted, slice):
        if any(bound is not None and bound < 0 for bound in (wanted.start, wanted.stop, wanted.step)):
            raise ValueError(f"{name}={wanted}: nobody knows how many there will be, so counting from the end fails")
        # as arithmetic: Dynamo has no `range` for it
        first, last, each = wanted.start or 0, wanted.stop, wanted.step or 1
        return lambda number: number >= first and (last is None or number < last) and (number - first) % each == 0
    if callable(wanted):
        return lambda number: bool(wanted(number))
    if isinstance(wanted, list | tuple | range | set | frozenset) and all(type(number) is int for number in wanted):
        return lambda number: number in wanted
    raise TypeError(f"{name}={wanted!r}: give an int, a slice, a list of ints or a predicate (number) -> bool")


ALWAYS = When(None, None, None)
"""Every call of every step."""
