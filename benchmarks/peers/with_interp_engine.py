"""interp-engine: an engine with points that are named alike in every architecture."""

from __future__ import annotations

from typing import Any

import jobs
import torch
from interp_engine import Address, EagerModel, HookManager, capture
from torch import Tensor

PACKAGES = ("interp-engine",)
IMPORTED = "from interp_engine import EagerModel, capture"
LACKS: dict[str, str] = {}
POINTS = [f"resid_post.{layer}" for layer in range(jobs.LAYERS)]


def modules_that_run(job: jobs.Job) -> list[str]:
    """The names with a dot, which are how it knows a path, of those modules that the forward calls."""
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *call, name=name: seen.append(name))
        for name, module in job.model.named_modules()
        if "." in name
    ]
    job.model(job.ids)
    for handle in handles:
        handle.remove()
    return seen


def ways(job: jobs.Job) -> jobs.Ways:
    """With an `EagerModel` around the module, made once and off the clock."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    engine: Any = EagerModel(str(job.folder), hf_model=job.model, tokenizer=tokenizer, requires_grad=True)
    positions = torch.arange(jobs.POSITIONS)
    everything = [Address(name) for name in modules_that_run(job)]

    def captured(points: list[Any], **options: Any) -> Any:
        return capture(engine, job.ids, points, **options)

    def write(ids: Tensor, patches: dict[int, tuple[Any, Any]]) -> Tensor:
        with HookManager() as hooks:
            for layer, (rows, where) in patches.items():

                def put(value: Tensor, layer: int = layer, rows: Any = rows, where: Any = where) -> Tensor:
                    value = value.clone()
                    value[rows, where] = job.clean[layer][0, where]
                    return value

                hooks.write(engine.get_submodule(jobs.NAMES[layer]), put)
            return job.model(ids).logits

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            cache = captured(POINTS, detach=False)
            value = jobs.logit_difference(cache.output.logits).sum()
            return list(torch.autograd.grad(value, [cache[point] for point in POINTS]))

    def grid() -> Tensor:
        patches = {layer: (positions + layer * jobs.POSITIONS, positions) for layer in range(jobs.LAYERS)}
        return jobs.logit_difference(write(job.rows, patches)).view(jobs.LAYERS, jobs.POSITIONS)

    def blocks() -> list[Tensor]:
        cache = captured(POINTS)
        return [cache[point] for point in POINTS]

    return {
        jobs.BLOCKS: {"capture": blocks},
        jobs.ALL: {"capture, by module paths": lambda: list(captured(everything).tensors.values())},
        jobs.PATCH: {"HookManager.write": lambda: write(job.ids, {jobs.PATCHED: (slice(None), -1)})},
        jobs.GRADIENTS: {"capture, detach=False, autograd.grad": gradients},
        jobs.SWEEP: {"HookManager.write, one batch, a row for each cell": grid},
    }
