"""nicehooks, from this checkout."""

from __future__ import annotations

from typing import Any

import jobs
import torch
from torch import Tensor

from nicehooks import ablate, attribute, capture, grad_at, patch, steer, sweep

PACKAGES = ("nicehooks",)
IMPORTED = "from nicehooks import attribute, capture, grad_at, patch, steer, sweep"
LACKS: dict[str, str] = {}


def ways(job: jobs.Job) -> jobs.Ways:
    """As the README writes them."""
    model, clean = job.model, dict(zip(job.names, job.clean, strict=True))
    blocks, middle = f"{job.of.blocks}.*", job.names[job.patched]
    every = job.of.every == 1
    cells: Any = f"{blocks}[:, *]" if every else [f"{job.names[layer]}[:, *]" for layer in job.swept]

    def captured(where: str) -> list[Any]:
        with capture(model, where) as acts:
            model(job.ids)
        return list(acts.values())

    def patched() -> Tensor:
        with patch(model, f"{middle}[:, -1]", clean[middle][:, -1]):
            return model(job.ids).logits

    def steered() -> Tensor:
        with steer(model, middle, job.direction):
            return model.generate(job.ids, **job.generation)

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            _, found = grad_at(model, blocks, lambda out: job.metric(out.logits).sum())(job.ids)
        return list(found.values())

    def metric(out: Any) -> Tensor:
        return job.metric(out.logits)

    def estimated() -> Tensor:
        return attribute(model, f"{blocks}[:, *]", clean, metric, job.ids).values

    def grid(**options: Any) -> Tensor:
        effects = sweep(model, cells, clean, metric, job.ids, **options)
        return effects.values + effects.baseline

    return {
        jobs.BLOCKS: {"capture": lambda: captured(blocks)},
        jobs.ALL: {"capture": lambda: captured("**")},
        jobs.PATCH: {"patch": patched},
        jobs.STEER: {"steer": steered},
        jobs.GRADIENTS: {"grad_at": gradients},
        jobs.ATTRIBUTION: {"attribute": estimated},
        jobs.SWEEP: {"sweep, check=False": lambda: grid(check=False), "sweep": grid},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """Two contexts around a call, and three for the examples of a batch."""
    middle, behind = job.names[job.patched : job.patched + 2]

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        with steer(job.model, middle, vector), capture(job.model, behind) as acts:
            output = (job.model if call is None else call)(ids, use_cache=False)
        return getattr(output, "logits", output), acts[behind]

    def examples(ids: Tensor) -> Tensor:
        with (
            patch(job.model, f"{middle}[0, -1]", job.clean[job.patched][0, -1]),
            steer(job.model, f"{middle}[1]", job.direction),
            ablate(job.model, f"{middle}[2]"),
        ):
            return job.model(ids).logits

    return jobs.Changing(job.model, run, examples, "a context for each")
