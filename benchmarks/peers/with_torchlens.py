"""torchlens: a log of a whole forward, operation by operation."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jobs
import torchlens
from torch import Tensor

PACKAGES = ("torchlens",)
IMPORTED = "import torchlens"
LACKS = {
    jobs.GRADIENTS: "not tried: it logs those of operations, in a second call",
    jobs.SWEEP: "not tried: it would be a trace for each cell, 192 times what one patch costs",
}


def ways(job: jobs.Job) -> jobs.Ways:
    """With `trace`, as it is called with torch's functions wrapped once for all."""
    model = job.model
    places = functools.reduce(operator.or_, map(torchlens.module, jobs.NAMES))

    def kept(**options: Any) -> list[Any]:
        """The values that a log of one forward has."""
        log: Any = torchlens.trace(model, job.ids, **options)
        return [each.out for each in log if each.out is not None]

    def recorded() -> list[Any]:
        """The same, with little metadata."""
        return [each.ram_payload for each in torchlens.record(model, job.ids, save=places)]

    def put(value: Tensor, **_: Any) -> Tensor:
        value = value.clone()
        value[:, -1] = job.clean[jobs.PATCHED][:, -1]
        return value

    def patched() -> Tensor:
        change = torchlens.when(torchlens.module(jobs.NAMES[jobs.PATCHED]), put)
        return kept(save=torchlens.module("lm_head"), intervene=change)[-1]

    return {
        jobs.BLOCKS: {"trace, save": lambda: kept(save=places), "record, save": recorded},
        jobs.ALL: {"trace": kept},
        jobs.PATCH: {"trace, intervene": patched},
    }
