"""In which chunks the interventions of a sweep run, and by which way; how far it is, and what is checked."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError, SweepMismatch
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.items import Base, GridItem, Unfit
from nicehooks.experiments.lanes import is_close
from nicehooks.experiments.positions import FromPosition, forwards_for
from nicehooks.experiments.singly import OneByOne
from nicehooks.experiments.telling import Telling, teller

BUDGET = 1 << 30
"""Bytes that a chunk may take, as far as they can be told beforehand; of a GPU half of what is free."""


SHARE = 0.01
"""Of the interventions, how many are compared with the plain loop, beside the first one."""

CHANGES = (
    "{verb}: runs of the model that should be equal are not, so there is no effect to measure: {what}.\n"
    "  The model, or a function that was given, may draw random numbers, or change something in itself when it runs "
    "(running statistics, a cache). Is the model in training mode?\n"
    "    model.eval()"
)

ENGINE = "sweep(…, engine={name!r}) does not fit this model: {what}\n    engine='auto' finds a way that does."


class Differs(Unfit):
    """A way to run a sweep gives another number than the plain loop."""


class Schedule:
    """Runs interventions in chunks.

    Attributes:
        notes: how it went, in sentences.
        later: a way that may be taken when the first chunk has said how long an intervention takes.
    """

    def __init__(
        self,
        base: Base,
        items: list[GridItem],
        ways: list[tuple[str, Any]],
        chunk_size: int | Literal["auto"],
        check: bool,
        progress: Telling,
    ) -> None:
        self.base = base
        self.items = items
        self.ways = ways
        self.size = base.run.lanes_in(BUDGET) if chunk_size == "auto" else chunk_size
        self.notes: list[str] = []
        self.metrics = torch.full((len(items), *base.metric.shape), torch.nan, dtype=base.metric.dtype)
        self.metrics = self.metrics.to(base.metric.device)
        self.asked = self.todo = list(items)
        self.later: list[FromPosition] = []
        self.check = check
        self.expected: dict[int, Tensor] = {}
        self.show = teller(progress, "sweep")

    def resume(self, effects: Effects | None) -> None:
        """Takes over what is done in `effects`."""
        if effects is None:
            return
        if not isinstance(effects, Effects):
            raise TypeError(f"resume={effects!r}: it is what an earlier sweep has returned")
        if effects.values.numel() != len(self.items):
            raise NiceHooksError(
                f"resume=…: these are the effects of another sweep, with {effects.values.numel()} cells and not "
                f"{len(self.items)}."
            )
        if list(effects.sites) != [str(item.cell.path) for item in self.items]:
            raise NiceHooksError("resume=…: these are the effects of another sweep, of other sites.")
        if not is_close(self.base.run, effects.baseline.to(self.base.metric), self.base.metric, self.base.metric):
            raise NiceHooksError(
                f"resume=…: these are the effects of another sweep: without an intervention the metric was "
                f"{_shown_notes(effects.baseline)} in it, and is {_shown_notes(self.base.metric)} now."
            )
        done = effects.examples if self.base.metric.ndim else effects.values
        if done is None:
            raise NiceHooksError("resume=…: these are the effects of another metric, one number for all examples.")
        self.metrics = done.reshape(self.metrics.shape).to(self.metrics) + self.base.metric
        missing = self.metrics.reshape(len(self.items), -1).isnan().any(1).tolist()
        self.asked = [item for item, gone in zip(self.items, missing, strict=True) if gone]

    def run(self, plain: OneByOne) -> Tensor:
        """The metric under each intervention; NaN where an interrupt came before.

        Args:
            plain: the plain loop, which a sample is compared with.
        """
        self.begin()
        try:
            while self.todo:
                self._next_chunk(plain)
        except KeyboardInterrupt:
            self.note_interrupt()
        return self.metrics

    def begin(self) -> None:
        """Nothing of what is asked is done: what another way has made of it, which did not fit, is forgotten."""
        self.todo = list(self.asked)
        self.metrics[[item.at for item in self.asked]] = torch.nan

    def note_interrupt(self) -> None:
        """Says how far it came."""
        done = len(self.items) - len(self.todo)
        self.notes.append(f"interrupted: {done} of {len(self.items)} are done; sweep(…, resume=effects) goes on.")

    def take(self, part: Sequence[GridItem], metrics: Tensor, notes: Sequence[str]) -> None:
        """Takes over the metrics of `part`, which were found elsewhere."""
        self.metrics[[item.at for item in part]] = metrics.to(self.metrics)
        done = {item.at for item in part}
        self.todo = [item for item in self.todo if item.at not in done]
        self.notes += [note for note in notes if note not in self.notes]
        self.show(len(self.items) - len(self.todo), len(self.items))

    def _next_chunk(self, plain: OneByOne) -> None:
        _, way = self.ways[0]
        self.todo.sort(key=way.order)
        chunk = self.todo[: min(self.size, len(self.asked) // 8 or 1) if self.later else self.size]
        start = time.perf_counter()
        try:
            metrics = way.measure(chunk)
            seconds = time.perf_counter() - start
            self._compare(plain, chunk, metrics)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            self.size = (len(chunk) + 1) // 2
            self.notes.append(f"out of memory with {len(chunk)} at once: {self.size} at once from there on.")
            return
        except (Unfit, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            self._give_up(error)
            return
        self.metrics[[item.at for item in chunk]] = metrics.to(self.metrics)
        del self.todo[: len(chunk)]
        self.show(len(self.items) - len(self.todo), len(self.items))
        self._choose(seconds / len(chunk))

    def _choose(self, seconds: float) -> None:
        """Goes on position by position, if an intervention takes as long as that the tokens which that saves count.

        That saves about half of the tokens, and costs some forwards more, each as long as the base run at most.

        Args:
            seconds: how long an intervention of the first chunk took.
        """
        for way in self.later:
            saved, spent = 0.5 * seconds * len(self.todo), forwards_for(self.base) * self.base.seconds
            if saved > 2 * spent:
                self.ways.insert(0, ("positions", way))
        self.later = []

    def _give_up(self, error: Exception) -> None:
        """Goes on to the next way; raises if there is none."""
        name, way = self.ways.pop(0)
        if isinstance(error, Differs):
            self.todo = list(self.asked)  # what it did before is no better
        if not self.ways:
            raise self._reason(error, name, way) from error
        if self.ways[0][0] != name:
            self.notes.append(f"{name} does not fit: {_first_line(error)}")

    def _reason(self, error: Exception, name: str, way: Any) -> Exception:
        """What to raise where no way is left."""
        if isinstance(error, Differs) and isinstance(way, OneByOne) and not way.answers:
            return SweepMismatch(CHANGES.format(verb="sweep", what=error))
        if isinstance(way, OneByOne) and not isinstance(error, Unfit):
            return error
        ours = isinstance(error, NiceHooksError)
        return (
            error if ours and not isinstance(error, Unfit) else Unfit(ENGINE.format(name=name, what=_first_line(error)))
        )

    def _compare(self, plain: OneByOne, chunk: Sequence[GridItem], metrics: Tensor) -> None:
        """Compares one of a chunk with the plain loop, as long as that is little beside all that was done."""
        if not self.check:
            return
        known = [at for at, item in enumerate(chunk) if item.at in self.expected]
        done = len(self.asked) - len(self.todo)
        if not known and len(self.expected) <= SHARE * done:
            known = [random.randrange(len(chunk))]
            self.expected[chunk[known[0]].at] = plain.metric(chunk[known[0]])
        for at in known:
            self._is_as_expected(chunk[at], metrics[at])

    def _is_as_expected(self, item: GridItem, metric: Tensor) -> None:
        expected = self.expected[item.at]
        if not is_close(self.base.run, metric, expected, self.base.metric):
            raise Differs(
                f"{str(item.cell.path)!r} is {_shown_notes(metric)}, and in the plain loop {_shown_notes(expected)}"
            )


def _shown_notes(metric: Tensor) -> str:
    return ", ".join([f"{one:.6g}" for one in metric.flatten().tolist()[:3]])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
