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
    model, positions = job.model, torch.arange(jobs.POSITIONS)
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

        return jobs.NAMES[layer], hook

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            seen: list[Tensor] = []
            logits = run([(name, lambda *call: seen.append(call[-1])) for name in jobs.NAMES], job.ids)
            return list(torch.autograd.grad(jobs.logit_difference(logits).sum(), seen))

    def grid() -> Tensor:
        hooks = [assign(layer, positions + layer * jobs.POSITIONS, positions) for layer in range(jobs.LAYERS)]
        return jobs.logit_difference(run(hooks, job.rows)).view(jobs.LAYERS, jobs.POSITIONS)

    return {
        jobs.BLOCKS: {"register_forward_hook": lambda: list(kept(jobs.NAMES).values())},
        jobs.ALL: {"register_forward_hook": lambda: list(kept(modules).values())},
        jobs.PATCH: {"register_forward_hook": lambda: run([assign(jobs.PATCHED, slice(None), -1)], job.ids)},
        jobs.GRADIENTS: {"register_forward_hook, autograd.grad": gradients},
        jobs.SWEEP: {"one batch, a row for each cell": grid},
    }
