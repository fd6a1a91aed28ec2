"""A sweep spread over the workers of a Ray cluster, in parts: some of its cells, over some of its prompts.

NOTE [What a worker of a sweep does]
Each worker is an actor that is given the whole sweep once: the model, the inputs, the values, the metric. A part goes
to it as a sweep over some of the prompts to go on with, in which all cells but some are done. So a worker runs what one
process runs, with the same reuse and the same checks, and looks whether its model gives the same without an
intervention. When one dies, Ray starts another one and hands its part over. Neighbours in the grid are in different
parts: each has cells of all depths.

What comes back is taken over when all prompts of its cells are there. A part makes a base run of its own, which takes
less over fewer prompts; so the prompts are cut first, and the cells as far as there are too few parts, and once, so
that some cells are done before others. Where prompts depend on each other (NOTE [Cut by prompts]) a part has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.items import GridItem
from nicehooks.experiments.prompts import NotCut, Prompts, rows_in
from nicehooks.experiments.runs import sessions_acting_on
from nicehooks.experiments.scheduling import Schedule
from nicehooks.extras import needs

PARTS_OF_A_WORKER = 2
"""How many parts there are for each worker: it takes the next one when it is done with one."""


class SpreadSweep(NamedTuple):
    """A sweep as workers are to run it.

    Attributes:
        job: `job(rows, effects)` is the sweep over `rows` of the batch in one process, to go on with from `effects`.
        as_effects: `as_effects(each, baseline)` is the grid of the metrics `[item]` or `[item, batch]`.
        refuse_cut: `refuse_cut(parts)` raises `NotCut` where these parts of the batch depend on each other.
    """

    job: Callable[[Prompts, Effects], Effects]
    as_effects: Callable[[Tensor, Tensor], Effects]
    refuse_cut: Callable[[Sequence[Prompts]], None]


class _Part(NamedTuple):
    """Some cells over some prompts; `group` is the number of the cells."""

    group: int
    items: list[GridItem]
    rows: Prompts


class _DonePart(NamedTuple):
    """What came back for a part: its metrics `[item]`, or `[item, row]`."""

    rows: Prompts
    metrics: Tensor
    notes: list[str]


def spread(schedule: Schedule, sweep: SpreadSweep, workers: int, options: Mapping[str, Any]) -> Tensor:
    """The metric under each intervention of `schedule`; NaN where an interrupt came before.

    Args:
        schedule: what is to be done, and what is done already.
        sweep: what workers run.
        workers: how many there are.
        options: of each, as `ray.remote` takes them: `num_cpus=4`, `num_gpus=1`, …
    """
    refuse_interventions(schedule)
    with needs("ray"):
        import ray
    count, batch = PARTS_OF_A_WORKER * workers, schedule.base.run.batch
    there = ray.put(sweep.job)
    worker = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(_SweepWorker)

    actors: list[Any] = []

    def done(cut: Sequence[Prompts]) -> None:
        parts = _parts_of(schedule.asked, cut, count)
        actors.extend([worker.remote(there) for _ in range(len(actors), min(workers, len(parts)))])
        _collect(schedule, parts, actors, sweep.as_effects)

    cut = rows_in(batch, count // max(1, min(PARTS_OF_A_WORKER, len(schedule.asked))))
    try:
        try:
            if len(cut) > 1:
                sweep.refuse_cut(cut)
            done(cut)
        except NotCut as reason:
            schedule.notes.append(f"every worker had all prompts: {reason}")
            done(rows_in(batch, 1))
    except KeyboardInterrupt:
        schedule.note_interrupt()
    finally:
        for actor in actors:
            ray.kill(actor)
    return schedule.metrics


def _parts_of(asked: list[GridItem], cut: Sequence[Prompts], count: int) -> list[_Part]:
    """About `count` parts; those of the same cells come one after the other."""
    groups = -(-count // len(cut))
    return [_Part(at, asked[at::groups], rows) for at in range(min(groups, len(asked))) for rows in cut]


def _collect(
    schedule: Schedule, parts: list[_Part], actors: list[Any], as_effects: Callable[[Tensor, Tensor], Effects]
) -> None:
    """Gives each worker that is free a part, and takes over what comes back."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    left, free, running = list(parts), list(actors), dict[Any, tuple[Any, _Part]]()
    found: dict[int, list[_DonePart]] = {part.group: [] for part in parts}
    schedule.begin()
    while left or running:
        while left and free:
            actor, part = free.pop(), left.pop(0)
            running[actor.done.remote(part.rows, _to_go_on_with(schedule, part, as_effects))] = actor, part
        (ready, *_), _ = ray.wait(list(running))
        actor, part = running.pop(ready)
        try:
            metrics, notes = ray.get(ready)
        except RayTaskError as error:
            if part.rows.are_all:
                raise error.cause from None
            raise NotCut(str(error.cause).partition("\n")[0]) from None  # all of them raise it, if it is not that
        except RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise NiceHooksError(NO_WORKER.format(kind=type(error).__name__, last=last)) from error
        free.append(actor)
        there = found[part.group]
        there.append(_DonePart(part.rows, metrics[[item.at for item in part.items]], notes))
        if sum([one.rows.stop - one.rows.start for one in there]) == part.rows.batch:
            each = [one.metrics for one in sorted(there, key=lambda one: one.rows)]
            schedule.take(part.items, torch.cat(each, -1), [note for one in there for note in one.notes])


def _to_go_on_with(schedule: Schedule, part: _Part, as_effects: Callable[[Tensor, Tensor], Effects]) -> Effects:
    """Effects on the prompts of `part` in which all cells but its own are done."""
    baseline = part.rows.of_metric(schedule.base.metric.cpu())
    metrics = baseline.expand(len(schedule.items), *baseline.shape).clone()
    metrics[[item.at for item in part.items]] = float("nan")
    return as_effects(metrics, baseline)


class _SweepWorker:
    """Has the model, and runs the part of a sweep that it is given."""

    def __init__(self, job: Callable[[Prompts, Effects], Effects]) -> None:
        self.job = job

    def done(self, rows: Prompts, part: Effects) -> tuple[Tensor, list[str]]:
        """The metrics of the whole grid, of which those count that were not there, and what is to be noted."""
        effects = self.job(rows, part)
        each = effects.values if effects.examples is None else effects.examples
        return (each.reshape(-1, *effects.baseline.shape) + effects.baseline).cpu(), list(effects.notes)


def refuse_interventions(schedule: Schedule) -> None:
    """Refuses interventions that act here: a worker has a copy of the model, without them.

    Raises:
        NiceHooksError: there is one; the message names it.
    """
    for session in sessions_acting_on(schedule.base.run.model):
        raise NiceHooksError(NOT_CARRIED.format(label=session.label))


NO_WORKER = (
    "sweep(…, engine='ray'): a worker of the cluster did not start, or was lost ({kind}: {last}).\n"
    "  Whatever the model, the values and the metric are defined in has to be importable there."
)

NOT_CARRIED = (
    "sweep(…, engine='ray'): {label} acts on the model here, and would not on the copies that the workers have.\n"
    "  Leave it before, or take another engine."
)
