"""The report of `check_auto_hook`: what is wrong, and where, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Failure(NamedTuple):
    """One thing that is not as it should be.

    Attributes:
        check: the name of the check; see `check_auto_hook`.
        hook_point: the name of the hook point, or "" where the check is about the whole model.
        says: what is wrong.
    """

    check: str
    hook_point: str
    says: str


@dataclass(frozen=True)
class HookCheckReport:
    """What `check_auto_hook` has found.

    Attributes:
        model: the name of the class.
        hook_points: the names of the hook points.
        checks: the names of the checks that were made.
        failures: what is wrong; nothing, it is hoped.
        without_gradient: the hook points with no value that could have a gradient, where no backward hook can be.
        notes: what could not be checked, and why.
    """

    model: str
    hook_points: tuple[str, ...]
    checks: tuple[str, ...]
    failures: tuple[Failure, ...]
    without_gradient: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def __str__(self) -> str:
        failed = dict.fromkeys(failure.check for failure in self.failures)
        if not failed:
            points = "1 hook point" if len(self.hook_points) == 1 else f"{len(self.hook_points)} hook points"
            lines = [f"{self.model}: {len(self.checks)} checks passed at {points}"]
        else:
            lines = [f"{self.model}: {len(failed)} of {len(self.checks)} checks failed"]
        lines += [f"  {check}{f' at {point!r}' if point else ''}: {says}" for check, point, says in self.failures]
        if self.without_gradient:
            lines.append(f"  no gradients at: {', '.join(self.without_gradient)}")
        return "\n".join([*lines, *(f"  not checked: {note}" for note in self.notes)])
