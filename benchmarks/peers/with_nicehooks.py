"""nicehooks, from this checkout."""

from __future__ import annotations

from typing import Any

import jobs
import torch
from torch import Tensor

from nicehooks import capture, grad_at, patch, sweep

PACKAGES = ("nicehooks",)
IMPORTED = "from nicehooks import capture, grad_at, patch, sweep"
LACKS: dict[str, str] = {}
BLOCKS = "transformer.h.*"


def ways(job: jobs.Job) -> jobs.Ways:
    """As the README writes them."""
    model, clean = job.model, dict(zip(jobs.NAMES, job.clean, strict=True))

    def captured(where: str) -> list[Any]:
        with capture(model, where) as acts:
            model(job.ids)
        return list(acts.values())

    def patched() -> Tensor:
        with patch(model, {"transformer.h.6[:, -1]": clean["transformer.h.6"][:, -1]}):
            return model(job.ids).logits

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            _, found = grad_at(model, BLOCKS, lambda out: jobs.logit_difference(out.logits).sum())(job.ids)
        return list(found.values())

    def grid(**options: Any) -> Tensor:
        def metric(out: Any) -> Tensor:
            return jobs.logit_difference(out.logits)

        effects = sweep(model, f"{BLOCKS}[:, *]", clean, metric, job.ids, **options)
        return effects.values + effects.baseline

    return {
        jobs.BLOCKS: {"capture": lambda: captured(BLOCKS)},
        jobs.ALL: {"capture": lambda: captured("**")},
        jobs.PATCH: {"patch": patched},
        jobs.GRADIENTS: {"grad_at": gradients},
        jobs.SWEEP: {"sweep": grid, "sweep, check=False": lambda: grid(check=False)},
    }
