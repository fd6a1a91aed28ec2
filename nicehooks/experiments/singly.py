"""Interventions in forwards of their own: one after the other, or those at one place together by `vmap`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.contexts.patching import patch
from nicehooks.core.frames import Frame
from nicehooks.core.selection import Group, Site
from nicehooks.experiments.acting import Intervened, intervening
from nicehooks.experiments.items import Base, GridItem, Unfit
from nicehooks.experiments.recording import CallsAround, FrameAction, RecordedCall
from nicehooks.experiments.replacements import Replacements
from nicehooks.values import trees


class OneByOne:
    """Runs each intervention in a forward of its own.

    Args:
        base: the base run.
        replacements: what is put into the cells.
        answers: whether calls that were over before are answered from the recording.
    """

    def __init__(self, base: Base, replacements: Replacements, answers: bool) -> None:
        self.base = base
        self.replacements = replacements
        self.answers = answers and base.reuses

    def order(self, item: GridItem) -> tuple[int, ...]:
        """What is run together comes one after the other."""
        return item.time

    def measure(self, items: Sequence[GridItem]) -> Tensor:
        """The metric under each of `items`: `[item]`, or `[item, batch]`."""
        return torch.stack([self.metric(item) for item in items])

    def metric(self, item: GridItem) -> Tensor:
        """The metric under `item`: the loop over contexts that a sweep has to be equal to."""
        run, place = self.base.run, Intervened(item.alternative, item.cell)
        from_record = answered(self.base, item) if self.answers else nullcontext()
        with from_record, intervening(run.model, self.replacements, self.base.stems, [place]):
            return run.measured(run.output())


class Mapped:
    """Runs the interventions at one place by `vmap` over what they make of the value there; for any module."""

    def __init__(self, base: Base, replacements: Replacements) -> None:
        self.base = base
        self.replacements = replacements

    def order(self, item: GridItem) -> tuple[int, ...]:
        """What is run together comes one after the other."""
        return item.time

    def measure(self, items: Sequence[GridItem]) -> Tensor:
        """The metric under each of `items`: `[item]`, or `[item, batch]`.

        Raises:
            Unfit: the model, or the metric, does not work under `vmap`.
        """
        places: dict[str, list[int]] = {}
        for at, item in enumerate(items):
            places.setdefault(str(item.cell.stem), []).append(at)
        metrics: dict[int, Tensor] = {}
        for stem, of_stem in places.items():
            found = self._at(stem, [items[at] for at in of_stem])
            metrics.update(zip(of_stem, found, strict=True))
        return torch.stack([metrics[at] for at in range(len(items))])

    def _at(self, stem: str, items: list[GridItem]) -> Tensor:
        run, base = self.base.run, self.base.stems[stem]
        several = items[0].cell.path.call is None and len(self.base.recording.calls_of(items[0].cell.site.module)) > 1
        differ = self.replacements.differ_by_call or self.replacements.depend_on_region
        if several and (differ or items[0].cell.chain):
            raise Unfit(f"{stem!r} is called several times")
        wholes = [trees.leaves(self._whole(item, base)) for item in items]
        tensors = [at for at, leaf in enumerate(wholes[0]) if isinstance(leaf, Tensor)]
        stacked = [torch.stack([leaves[at] for leaves in wholes]) for at in tensors]

        def metric(*values: Tensor) -> Tensor:
            each = iter(values)
            with answered(self.base, items[0]), patch(run.model, stem, trees.map_tensors(lambda _: next(each), base)):
                return run.measured(run.output())

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "There is a performance drop", UserWarning
                )  # it is faster all the same
                return torch.vmap(metric, randomness="same")(*stacked)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise Unfit(f"vmap: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error

    def _whole(self, item: GridItem, base: Any) -> Any:
        return trees.rewrite(
            base, item.cell.chain, lambda region: self.replacements.new(item.alternative, item.cell, base, region)
        )


def answered(base: Base, item: GridItem) -> Any:
    """A context in which what was over before `item` begins is answered from the recording."""
    if item.call is None:
        return nullcontext()
    calls = base.answers_by(item.call.end if item.cell.path.port.is_output else item.call.begin, [item])
    if not calls:
        return nullcontext()
    sites = {call.module: call.site for call in calls.values()}
    return CallsAround(base.run.model, [(Group(True, list(sites.values()), True), _Answers(calls))])


class _Answers(FrameAction):
    __slots__ = ("calls", "counts")

    def __init__(self, calls: dict[tuple[nn.Module, int], RecordedCall]) -> None:
        self.calls = calls
        self.counts: Counter[nn.Module] = Counter()

    def before(self, frame: Frame, site: Site) -> None:
        call = self.calls.get((site.module, self.counts[site.module]))
        self.counts[site.module] += 1
        if call is not None:
            self.counts.update([inner.module for inner in call.inside])
            frame.answer = (trees.map_tensors(Tensor.clone, call.value),)

    def after(self, frame: Frame, site: Site) -> None:
        if frame.answer is not None:
            (frame.value,) = frame.answer
