"""One intervention of a sweep, and what is known of the base run that it is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.errors import NiceHooksError
from nicehooks.experiments.grids import Cell
from nicehooks.experiments.recording import RecordedCall, Recording
from nicehooks.experiments.runs import Run
from nicehooks.paths.grammar import ModulePath


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


class StemCall(NamedTuple):
    """The value at a stem in one call of the base run.

    Attributes:
        path: of the value in this call.
        number: of the call; None where there is one alone, or the stem itself says which.
        value: the value.
    """

    path: str
    number: int | None
    value: Any

    def of_cell(self, cell: Cell) -> str:
        """The path of a cell of the stem in this call."""
        return str(cell.path if self.number is None else replace(cell.path, call=self.number))


class Stems(dict[str, Any]):
    """The values at the stems of the base run, by path: of several calls the last, where the path does not say which.

    Args:
        seen: what was captured there, of all calls.
    """

    def __init__(self, seen: ActivationCache) -> None:
        super().__init__()
        self.seen = seen
        self._calls: dict[str, list[StemCall]] = {}

    def __missing__(self, stem: str) -> Any:
        self[stem] = self.calls(ModulePath.parse(stem))[-1].value
        return self[stem]

    def calls(self, stem: ModulePath) -> list[StemCall]:
        """The value of each call that `stem` stands for."""
        text = str(stem)
        if text not in self._calls:
            each = self.seen.calls(replace(stem, call=None))
            if stem.call is not None:
                found = [StemCall(text, None, each[int(stem.call)])]
            elif len(each) == 1:
                found = [StemCall(text, None, each[0])]
            else:
                found = [StemCall(str(replace(stem, call=at)), at, one) for at, one in enumerate(each)]
            self._calls[text] = found
        return self._calls[text]


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
    stems: Stems
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
