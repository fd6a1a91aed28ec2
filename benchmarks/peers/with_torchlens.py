"""torchlens: a log of a whole forward, operation by operation."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jobs
import torchlens
from torch import Tensor, nn

PACKAGES = ("torchlens",)
IMPORTED = "import torchlens"
LACKS = {
    jobs.GRADIENTS: "not tried: it logs those of operations, in a second call",
    jobs.ATTRIBUTION: "not tried: the same",
    jobs.STEER: "not tried: it logs a forward, and a generation is many",
    jobs.SWEEP: "not tried: it would be a trace for each cell, 192 times what one patch costs",
}


def ways(job: jobs.Job) -> jobs.Ways:
    """With `trace`, as it is called with torch's functions wrapped once for all."""
    model = job.model
    places = functools.reduce(operator.or_, map(torchlens.module, job.names))

    def kept(**options: Any) -> list[Any]:
        """The values that a log of one forward has."""
        log: Any = torchlens.trace(model, job.ids, **options)
        return [each.out for each in log if each.out is not None]

    def recorded() -> list[Any]:
        """The same, with little metadata."""
        return [each.ram_payload for each in torchlens.record(model, job.ids, save=places)]

    def put(value: Tensor, **_: Any) -> Tensor:
        value = value.clone()
        value[:, -1] = job.clean[job.patched][:, -1]
        return value

    def patched() -> Tensor:
        change = torchlens.when(torchlens.module(job.names[job.patched]), put)
        return kept(save=torchlens.module("lm_head"), intervene=change)[-1]

    return {
        jobs.BLOCKS: {"record, save": recorded, "trace, save": lambda: kept(save=places)},
        jobs.ALL: {"trace": kept},
        jobs.PATCH: {"trace, intervene": patched},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """A trace with an intervention, which keeps the value behind it and the logits."""
    middle, behind = (torchlens.module(name) for name in job.names[job.patched : job.patched + 2])

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        if call is not None and not isinstance(call, nn.Module):
            raise NotImplementedError("it calls the model itself")

        def add(value: Tensor, **_: Any) -> Tensor:
            return value + vector

        save = behind | torchlens.module("lm_head")
        log: Any = torchlens.trace(
            job.model if call is None else call, ids, save=save, intervene=torchlens.when(middle, add)
        )
        values = [each.out for each in log if each.out is not None]
        return values[-1], values[0]

    return jobs.Changing(job.model, run)
