"""interp-engine: an engine with points that are named alike in every architecture."""

from __future__ import annotations

from typing import Any

import jobs
import torch
from interp_engine import Address, EagerModel, HookManager, SteerSpec, capture, steer
from torch import Tensor

PACKAGES = ("interp-engine",)
IMPORTED = "from interp_engine import EagerModel, capture"
LACKS: dict[str, str] = {}


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
    positions = torch.arange(job.positions)
    points = [f"resid_post.{layer}" for layer in range(job.layers)]
    everything = [Address(name) for name in modules_that_run(job)]

    def captured(at: list[Any], **options: Any) -> Any:
        return capture(engine, job.ids, at, **options)

    def write(ids: Tensor, patches: dict[int, tuple[Any, Any]]) -> Tensor:
        with HookManager() as hooks:
            for layer, (rows, where) in patches.items():

                def put(value: Tensor, layer: int = layer, rows: Any = rows, where: Any = where) -> Tensor:
                    value = value.clone()
                    value[rows, where] = job.clean[layer][0, where]
                    return value

                hooks.write(engine.get_submodule(job.names[layer]), put)
            return job.model(ids).logits

    def steered() -> Tensor:
        with steer(engine, [SteerSpec(job.direction, job.patched)]):
            return job.model.generate(job.ids, **job.generation)

    def both() -> tuple[list[Tensor], list[Tensor]]:
        with torch.enable_grad():
            cache = captured(points, detach=False)
            value, seen = job.metric(cache.output.logits).sum(), [cache[point] for point in points]
            return seen, list(torch.autograd.grad(value, seen))

    def grid() -> Tensor:
        patches = {layer: (positions + row * job.positions, positions) for row, layer in enumerate(job.swept)}
        return job.as_grid(job.metric(write(job.rows, patches)))

    def blocks() -> list[Tensor]:
        cache = captured(points)
        return [cache[point] for point in points]

    return {
        jobs.BLOCKS: {"capture": blocks},
        jobs.ALL: {"capture, by module paths": lambda: list(captured(everything).tensors.values())},
        jobs.PATCH: {"HookManager.write": lambda: write(job.ids, {job.patched: (slice(None), -1)})},
        jobs.STEER: {"steer": steered},
        jobs.GRADIENTS: {"capture, detach=False, autograd.grad": lambda: both()[1]},
        jobs.ATTRIBUTION: {"capture, detach=False, autograd.grad": lambda: job.estimates(*both())},
        jobs.SWEEP: {"HookManager.write, one batch, a row for each cell": grid},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """Steering and a hook that reads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    engine: Any = EagerModel(str(job.folder), hf_model=job.model, tokenizer=tokenizer, requires_grad=True)
    middle, behind = (engine.get_submodule(name) for name in job.names[job.patched : job.patched + 2])

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        with HookManager() as hooks:
            hooks.write(middle, lambda value: value + vector)
            hooks.read(behind, seen.append)
            output = (job.model if call is None else call)(ids, use_cache=False)
        return getattr(output, "logits", output), seen[0] if seen else torch.zeros(0)

    def put(value: Tensor) -> Tensor:
        patched = torch.cat([value[:1, :-1], job.clean[job.patched][:, -1:]], 1)
        return torch.cat([patched, value[1:2] + job.direction, value[2:] * 0])

    def examples(ids: Tensor) -> Tensor:
        with HookManager() as hooks:
            hooks.write(middle, put)
            return job.model(ids).logits

    return jobs.Changing(
        job.model, run, examples, "by a function of the whole value; for each request on vLLM (not tried)"
    )
