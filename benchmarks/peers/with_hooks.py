"""Raw hooks: what PyTorch itself has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jobs
import torch
from torch import Tensor, nn

PACKAGES: tuple[str, ...] = ()
IMPORTED = ""
LACKS: dict[str, str] = {}


def ways(job: jobs.Job) -> jobs.Ways:
    """`register_forward_hook` in loops."""
    model, positions = job.model, torch.arange(job.positions)
    middle = job.names[job.patched]
    modules = dict(model.named_modules())

    def run(hooks: Iterable[tuple[str, Callable[..., Any]]], ids: Tensor) -> Tensor:
        handles = [modules[name].register_forward_hook(hook) for name, hook in hooks]
        logits = model(ids).logits
        for handle in handles:
            handle.remove()
        return logits

    def kept(names: Iterable[str]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = output

            return hook

        run([(name, hook_for(name)) for name in names], job.ids)
        return seen

    def assign(layer: int, rows: Any, where: Any) -> tuple[str, Callable[..., Tensor]]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[rows, where] = job.clean[layer][0, where]
            return output

        return job.names[layer], hook

    def steered() -> Tensor:
        handle = modules[middle].register_forward_hook(lambda *call: call[-1] + job.direction)
        tokens = model.generate(job.ids, **job.generation)
        handle.remove()
        return tokens

    def both() -> tuple[list[Tensor], list[Tensor]]:
        with torch.enable_grad():
            seen: list[Tensor] = []
            logits = run([(name, lambda *call: seen.append(call[-1])) for name in job.names], job.ids)
            return seen, list(torch.autograd.grad(job.metric(logits).sum(), seen))

    def grid() -> Tensor:
        hooks = [assign(layer, positions + row * job.positions, positions) for row, layer in enumerate(job.swept)]
        return job.as_grid(job.metric(run(hooks, job.rows)))

    return {
        jobs.BLOCKS: {"register_forward_hook": lambda: list(kept(job.names).values())},
        jobs.ALL: {"register_forward_hook": lambda: list(kept(modules).values())},
        jobs.PATCH: {"register_forward_hook": lambda: run([assign(job.patched, slice(None), -1)], job.ids)},
        jobs.STEER: {"register_forward_hook": steered},
        jobs.GRADIENTS: {"register_forward_hook, autograd.grad": lambda: both()[1]},
        jobs.ATTRIBUTION: {"register_forward_hook, autograd.grad": lambda: job.estimates(*both())},
        jobs.SWEEP: {"one batch, a row for each cell": grid},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """Hooks on two blocks."""
    middle, behind = (job.model.get_submodule(job.names[job.patched + more]) for more in (0, 1))

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        handles = [
            middle.register_forward_hook(lambda *given: given[-1] + vector),
            behind.register_forward_hook(lambda *given: seen.append(given[-1])),
        ]
        try:
            output = (job.model if call is None else call)(ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return getattr(output, "logits", output), seen[0] if seen else torch.zeros(0)

    def put(value: Tensor) -> Tensor:
        patched = torch.cat([value[:1, :-1], job.clean[job.patched][:, -1:]], 1)
        return torch.cat([patched, value[1:2] + job.direction, value[2:] * 0])

    def examples(ids: Tensor) -> Tensor:
        handle = middle.register_forward_hook(lambda *given: put(given[-1]))
        logits = job.model(ids).logits
        handle.remove()
        return logits

    return jobs.Changing(job.model, run, examples, "by a function of the whole value")
