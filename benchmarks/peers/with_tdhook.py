"""tdhook: captures and replacements in a session, and methods that wrap a model for the time of a context."""

from __future__ import annotations

import jobs
import torch
from tdhook.session import HookSession
from tdhook.targets import Target
from torch import Tensor

PACKAGES = ("tdhook", "tensordict")
IMPORTED = "from tdhook.session import HookSession"
LACKS: dict[str, str] = {
    jobs.ALL: "a capture is of one tensor, and modules that return other things, or never run, have to be left out",
}
WHOLE = tuple(range(jobs.WIDTH))
TARGETS = [Target(name, "activation", -1, WHOLE) for name in jobs.NAMES]
GRADIENTS = [Target(name, "gradient", -1, WHOLE) for name in jobs.NAMES]


def ways(job: jobs.Job) -> jobs.Ways:
    """With a `HookSession`, made anew each time."""
    model, first = job.model, next(job.model.parameters())
    whole = [job.clean[layer] for layer in range(jobs.LAYERS)]

    def captured() -> list[Tensor]:
        with HookSession(model) as session:
            seen = [session.capture(target) for target in TARGETS]
            model(job.ids)
        return [each.values[0] for each in seen]

    def patched(layer: int = jobs.PATCHED, position: int = jobs.POSITIONS - 1) -> Tensor:
        at = Target(jobs.NAMES[layer], "activation", 1, (position,))
        with HookSession(model) as session:
            session.replace(at, whole[layer][:, [position]])
            return model(job.ids).logits

    def gradients() -> list[Tensor]:
        with torch.enable_grad(), HookSession(model) as session:
            seen = [session.capture(target) for target in GRADIENTS]
            value = jobs.logit_difference(model(job.ids).logits).sum()
            torch.autograd.grad(value, [first])
        return [each.values[0] for each in seen]

    def grid() -> Tensor:
        values = [jobs.logit_difference(patched(*cell)) for cell in jobs.GRID]
        return torch.cat(values).view(jobs.LAYERS, jobs.POSITIONS)

    return {
        jobs.BLOCKS: {"HookSession.capture": captured},
        jobs.PATCH: {"HookSession.replace": patched},
        jobs.GRADIENTS: {"HookSession.capture of gradients": gradients},
        jobs.SWEEP: {"HookSession.replace, a loop": grid},
    }
