"""The cells of a sweep spread over the workers of a Ray cluster.

NOTE [What a worker of a sweep does]
Each worker is an actor that is given the whole sweep once: the model, the inputs, the values, the metric. A part of the
grid goes to it as a sweep to go on with, in which all other cells are done. So a worker runs what one process runs,
with the same reuse and the same checks, and looks whether its model gives the same without an intervention. When one
dies, Ray starts another one and hands its part over. Neighbours in the grid are in different parts: each has cells of
all depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nicehooks.errors import NiceHooksError
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.items import GridItem
from nicehooks.experiments.runs import sessions_acting_on
from nicehooks.experiments.scheduling import Schedule
from nicehooks.extras import needs

PARTS_OF_A_GRID = 2
"""How many parts of the grid there are for each worker: it takes the next one when it is done with one."""


def spread(
    schedule: Schedule,
    job: Callable[..., Effects],
    as_effects: Callable[[Tensor], Effects],
    workers: int,
    options: Mapping[str, Any],
) -> Tensor:
    """The metric under each intervention of `schedule`; NaN where an interrupt came before.

    Args:
        schedule: what is to be done, and what is done already.
        job: `job(resume=effects)` is the sweep in one process.
        as_effects: the grid of some metrics, `[item]` or `[item, batch]`.
        workers: how many there are.
        options: of each, as `ray.remote` takes them: `num_cpus=4`, `num_gpus=1`, …
    """
    refuse_interventions(schedule)
    with needs("ray"):
        import ray
    asked = schedule.asked
    parts = [part for start in range(PARTS_OF_A_GRID * workers) if (part := asked[start :: PARTS_OF_A_GRID * workers])]
    there = ray.put(job)
    worker = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(_SweepWorker)
    actors: list[Any] = [worker.remote(there) for _ in range(min(workers, len(parts)))]
    try:
        _collect(schedule, parts, actors, as_effects)
    except KeyboardInterrupt:
        schedule.note_interrupt()
    finally:
        for actor in actors:
            ray.kill(actor)
    return schedule.metrics


def _collect(
    schedule: Schedule, parts: Sequence[list[GridItem]], actors: list[Any], as_effects: Callable[[Tensor], Effects]
) -> None:
    """Gives each worker that is free a part, and takes over what comes back."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    left, running = list(parts), dict[Any, tuple[Any, list[GridItem]]]()
    free = list(actors)
    schedule.todo = list(schedule.asked)
    while left or running:
        while left and free:
            actor, part = free.pop(), left.pop(0)
            running[actor.done.remote(as_effects(_to_go_on_with(schedule, part)))] = actor, part
        (ready, *_), _ = ray.wait(list(running))
        actor, part = running.pop(ready)
        try:
            found, notes = ray.get(ready)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise NiceHooksError(NO_WORKER.format(kind=type(error).__name__, last=last)) from error
        free.append(actor)
        schedule.take(part, found[[item.at for item in part]], notes)


def _to_go_on_with(schedule: Schedule, part: Sequence[GridItem]) -> Tensor:
    """Metrics in which all cells but those of `part` are done."""
    metrics = schedule.base.metric.expand(schedule.metrics.shape).clone()
    metrics[[item.at for item in part]] = float("nan")
    return metrics.cpu()


class _SweepWorker:
    """Has the model, and runs the part of a grid that it is given."""

    def __init__(self, job: Callable[..., Effects]) -> None:
        self.job = job

    def done(self, part: Effects) -> tuple[Tensor, list[str]]:
        """The metrics of the whole grid, of which those count that were not there, and what is to be noted."""
        effects = self.job(resume=part)
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
