"""One intervention of a sweep, and what is known of the base run that it is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nicehooks.errors import NiceHooksError
from nicehooks.experiments.grids import Cell
from nicehooks.experiments.recording import RecordedCall, Recording
from nicehooks.experiments.runs import Run


class Unfit(NiceHooksError):
    """A way to run a sweep does not fit this model; the message says why."""


class GridItem(NamedTuple):
    """One intervention of a sweep.

    Attributes:
        at: its place in the flat grid.
        alternative: which of the values it puts there.
        cell: where.
        call: the call of the module at which it acts first; None where nothing calls the module.
    """

    at: int
    alternative: int
    cell: Cell
    call: RecordedCall | None

    @property
    def time(self) -> tuple[int, int]:
        """When it begins, and where it stands among those that begin then."""
        return (0 if self.call is None else self.call.begin), self.at


class Base(NamedTuple):
    """What is known of the base run.

    Attributes:
        run: the model, its inputs and the metric.
        recording: its calls.
        stems: the values around the sites, by path.
        metric: of its output.
        seconds: how long it took.
        reuses: whether later runs may take the results of calls from the recording.
    """

    run: Run
    recording: Recording
    stems: dict[str, Any]
    metric: Tensor
    seconds: float
    reuses: bool

    def answers_by(self, tick: int, items: Sequence[GridItem]) -> dict[tuple[nn.Module, int], RecordedCall]:
        """The calls that are answered from the recording where `items` begin at `tick`, by module and number."""
        if not self.reuses:
            return {}
        counted = {item.cell.site.module for item in items if item.cell.path.call is not None}
        finished = [call for call in self.recording.finished_by(tick) if call.is_plain]
        inside = [{inner.module for inner in call.inside} for call in finished]
        return {(c.module, c.number): c for c, inner in zip(finished, inside, strict=True) if not inner & counted}
