"""In which chunks the interventions of a sweep run, and by which way; how far it is, and what is checked."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.lanes import Base, Item, Unfit, is_close
from nicehooks.experiments.singly import OneByOne

BUDGET = 1 << 30
"""Bytes that a chunk may take, as far as they can be told beforehand; of a GPU half of what is free."""


class SweepMismatch(NiceHooksError, RuntimeError):
    """Runs of a sweep that should be equal are not: the model draws random numbers, or changes from run to run."""


class Schedule:
    """Runs interventions in chunks.

    Attributes:
        notes: how it went, in sentences.
    """

    def __init__(
        self,
        base: Base,
        items: list[Item],
        ways: list[tuple[str, Any]],
        chunk_size: int | Literal["auto"],
        check: bool,
        progress: bool | Callable[[int, int], None],
    ) -> None:
        self.base = base
        self.items = items
        self.ways = ways
        self.size = base.run.lanes_in(BUDGET) if chunk_size == "auto" else max(chunk_size, 1)
        self.notes: list[str] = []
        self.metrics = torch.full((len(items), *base.metric.shape), torch.nan, dtype=base.metric.dtype)
        self.metrics = self.metrics.to(base.metric.device)
        self.todo = list(items)
        self.check = check
        self.expected: dict[int, Tensor] = {}
        self.show = _shown_on_stderr() if progress is True else progress or _not_shown

    def resume(self, effects: Effects | None) -> None:
        """Takes over what is done in `effects`."""
        if effects is None:
            return
        if effects.values.numel() != len(self.items):
            raise NiceHooksError(
                f"resume=…: these are the effects of another sweep, with {effects.values.numel()} cells and not "
                f"{len(self.items)}."
            )
        done = effects.examples if self.base.metric.ndim else effects.values
        if done is None:
            raise NiceHooksError("resume=…: these are the effects of another metric, one number for all examples.")
        self.metrics = done.reshape(self.metrics.shape).to(self.metrics) + self.base.metric
        missing = self.metrics.reshape(len(self.items), -1).isnan().any(1).tolist()
        self.todo = [item for item, gone in zip(self.items, missing, strict=True) if gone]

    def run(self, plain: OneByOne) -> Tensor:
        """The metric under each intervention; NaN where an interrupt came before.

        Args:
            plain: the plain loop, which a sample is compared with.
        """
        self.todo.sort(key=_time_of)
        try:
            while self.todo:
                self._next_chunk(plain)
        except KeyboardInterrupt:
            done = len(self.items) - len(self.todo)
            self.notes.append(f"interrupted: {done} of {len(self.items)} are done; sweep(…, resume=effects) goes on.")
        return self.metrics

    def _next_chunk(self, plain: OneByOne) -> None:
        chunk = self.todo[: self.size]
        name, way = self.ways[0]
        try:
            metrics = way.measure(chunk)
            self._compare(plain, chunk, metrics, name)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            self.size = (len(chunk) + 1) // 2
            self.notes.append(f"out of memory with {len(chunk)} at once: {self.size} at once from there on.")
            return
        except (Unfit, RuntimeError, ValueError, TypeError, IndexError) as error:
            self._give_up(error)
            return
        self.metrics[[item.index for item in chunk]] = metrics.to(self.metrics)
        del self.todo[: len(chunk)]
        self.show(len(self.items) - len(self.todo), len(self.items))

    def _give_up(self, error: Exception) -> None:
        """Goes on to the next way; raises if there is none."""
        name, _ = self.ways.pop(0)
        if not self.ways:
            raise error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.notes.append(f"{name} does not fit: {reason}")

    def _compare(self, plain: OneByOne, chunk: Sequence[Item], metrics: Tensor, name: str) -> None:
        """Compares some of a chunk with the plain loop."""
        if not self.check:
            return
        for at in random.sample(range(len(chunk)), 1):
            item = chunk[at]
            if item.index not in self.expected:
                self.expected[item.index] = plain.metric(item)
            expected = self.expected[item.index]
            if not is_close(metrics[at], expected, self.base.metric, self.base.run.sample):
                raise Unfit(f"{str(item.cell.path)!r} is {metrics[at].tolist()}, and alone {expected.tolist()}")


def _time_of(item: Item) -> tuple[int, int]:
    return (0 if item.call is None else item.call.begin), item.index


def _not_shown(done: int, count: int) -> None:
    pass


def _shown_on_stderr() -> Callable[[int, int], None]:
    start = time.perf_counter()

    def show(done: int, count: int) -> None:
        rate = done / max(time.perf_counter() - start, 1e-9)
        end = "\n" if done == count else ""
        print(f"\rsweep: {done} of {count}, {rate:.3g}/s", end=end, file=sys.stderr, flush=True)

    return show
