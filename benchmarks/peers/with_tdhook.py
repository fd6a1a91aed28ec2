"""tdhook: captures and replacements in a session, and methods that wrap a model for the time of a context."""

from __future__ import annotations

from typing import Any

import jobs
import torch
from tdhook.latent.steering_vectors import SteeringVectors
from tdhook.session import HookSession
from tdhook.targets import Target
from torch import Tensor

PACKAGES = ("tdhook", "tensordict")
IMPORTED = "from tdhook.session import HookSession"
LACKS: dict[str, str] = {
    jobs.ALL: "a capture is of one tensor, and modules that return other things, or never run, have to be left out",
}


def ways(job: jobs.Job) -> jobs.Ways:
    """With a `HookSession`, made anew each time."""
    model, first, everything = job.model, next(job.model.parameters()), tuple(range(job.width))
    targets, of_gradients = (
        [Target(name, kind, -1, everything) for name in job.names] for kind in ("activation", "gradient")
    )
    whole = [job.clean[layer] for layer in range(job.layers)]

    def captured() -> list[Tensor]:
        with HookSession(model) as session:
            seen = [session.capture(target) for target in targets]
            model(job.ids)
        return [each.values[0] for each in seen]

    def patched(layer: int = job.patched, position: int = job.positions - 1) -> Tensor:
        at = Target(job.names[layer], "activation", 1, (position,))
        with HookSession(model) as session:
            session.replace(at, whole[layer][:, [position]])
            return model(job.ids).logits

    def steered() -> Any:
        with SteeringVectors([job.names[job.patched]], add).prepare(model):
            return model.generate(job.ids, **job.generation)

    def add(output: Tensor, **_: Any) -> Tensor:
        return output + job.direction

    def seen_under(wanted: list[Target]) -> list[Tensor]:
        with torch.enable_grad(), HookSession(model) as session:
            seen = [session.capture(target) for target in wanted]
            value = job.metric(model(job.ids).logits).sum()
            torch.autograd.grad(value, [first])
        return [each.values[0] for each in seen]

    def estimated() -> Tensor:
        found = seen_under([*targets, *of_gradients])
        return job.estimates(found[: job.layers], found[job.layers :])

    def grid() -> Tensor:
        return job.as_grid(job.metric(patched(*cell)) for cell in job.cells)

    return {
        jobs.BLOCKS: {"HookSession.capture": captured},
        jobs.PATCH: {"HookSession.replace": patched},
        jobs.STEER: {"SteeringVectors": steered},
        jobs.GRADIENTS: {"HookSession.capture of gradients": lambda: seen_under(of_gradients)},
        jobs.ATTRIBUTION: {"HookSession.capture of values and gradients": estimated},
        jobs.SWEEP: {"HookSession.replace, a loop": grid},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """`SteeringVectors`, and a session that captures."""
    model, (middle, behind) = job.model, job.names[job.patched : job.patched + 2]
    target = Target(behind, "activation", -1, tuple(range(job.width)))

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        def add(output: Tensor, **_: Any) -> Tensor:
            return output + vector

        with SteeringVectors([middle], add).prepare(model), HookSession(model) as session:
            seen = session.capture(target, detach=False)
            output = (model if call is None else call)(ids, use_cache=False)
        return getattr(output, "logits", output), seen.values[0] if seen.values else torch.zeros(0)

    def examples(ids: Tensor) -> Tensor:
        def put(output: Tensor, **_: Any) -> Tensor:
            patched = torch.cat([output[:1, :-1], job.clean[job.patched][:, -1:]], 1)
            return torch.cat([patched, output[1:2] + job.direction, output[2:] * 0])

        with SteeringVectors([middle], put).prepare(model):
            return model(ids).logits

    return jobs.Changing(model, run, examples, "by a function of the whole value")
