"""nnsight: code in a trace, which runs interleaved with the forward."""

from __future__ import annotations

from typing import Any

import jobs
import nnsight
import torch
from torch import Tensor

PACKAGES = ("nnsight",)
IMPORTED = "from nnsight import NNsight"
LACKS: dict[str, str] = {}


def ways(job: jobs.Job) -> jobs.Ways:
    """With `NNsight` around the module, made once and off the clock."""
    model: Any = nnsight.NNsight(job.model)
    ids, clean, rows_of_ids = job.ids, job.clean, job.rows
    blocks, positions, layers = model.transformer.h, torch.arange(jobs.POSITIONS), jobs.LAYERS

    def captured() -> list[Tensor]:
        with model.trace(ids):
            seen = [block.output for block in blocks]
            nnsight.save(seen)
        return list(seen)

    def cached() -> list[Any]:
        with model.trace(ids) as tracer:
            cache = tracer.cache(detach=False)
        return [cache[path].output for path in cache.keys()]  # noqa: SIM118, it has no iterator

    def patched() -> Tensor:
        with model.trace(ids):
            blocks[jobs.PATCHED].output[:, -1] = clean[jobs.PATCHED][:, -1]
            logits = model.output.logits.save()
        return logits

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            with model.trace(ids):
                seen = [block.output for block in blocks]
                value = jobs.logit_difference(model.output.logits).sum()
                found = torch.autograd.grad(value, seen)
                nnsight.save(found)
        return list(found)

    def grid() -> Tensor:
        with model.trace(rows_of_ids):
            for layer in range(layers):
                blocks[layer].output[positions + layer * jobs.POSITIONS, positions] = clean[layer][0]
            values = jobs.logit_difference(model.output.logits).save()
        return values.view(jobs.LAYERS, jobs.POSITIONS)

    return {
        jobs.BLOCKS: {"trace, save": captured},
        jobs.ALL: {"tracer.cache": cached},
        jobs.PATCH: {"trace": patched},
        jobs.GRADIENTS: {"trace, autograd.grad": gradients},
        jobs.SWEEP: {"one trace of a batch, a row for each cell": grid},
    }
