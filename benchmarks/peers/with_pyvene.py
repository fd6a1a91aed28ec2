"""pyvene: an intervenable model from a configuration."""

from __future__ import annotations

from typing import Any

import jobs
import pyvene
import torch
from torch import Tensor

PACKAGES = ("pyvene",)
IMPORTED = "import pyvene"
LACKS = {
    jobs.GRADIENTS: "not tried: what it collects is a copy that the metric does not depend on",
    jobs.ALL: "not tried: each place is an entry of the configuration, with its positions",
}


def ways(job: jobs.Job) -> jobs.Ways:
    """With an `IntervenableModel` for each configuration, made on the clock where a user would make it for one use."""
    positions = list(range(jobs.POSITIONS))

    def model_for(layers: Any, kind: Any, units: int = 1) -> Any:
        same = {"component": "block_output", "unit": "pos", "max_number_of_units": units, "intervention_type": kind}
        wanted = [{"layer": layer, **same} for layer in layers]
        return pyvene.IntervenableModel(pyvene.IntervenableConfig(wanted), model=job.model)

    def collected() -> list[Tensor]:
        made = model_for(range(jobs.LAYERS), pyvene.CollectIntervention, jobs.POSITIONS)
        found = made({"input_ids": job.ids}, unit_locations={"base": [[positions]] * jobs.LAYERS})
        return list(found[0][1])

    def put(made: Any, ids: Tensor, layer: int, where: list[list[int]]) -> Tensor:
        """Another position in each example."""
        values = torch.stack([job.clean[layer][0, here] for here in where])
        _, changed = made(
            {"input_ids": ids},
            unit_locations={"sources->base": (None, [where])},
            source_representations={next(iter(made.interventions)): values},
        )
        return changed.logits

    def patched() -> Tensor:
        made = model_for([jobs.PATCHED], pyvene.VanillaIntervention)
        return put(made, job.ids, jobs.PATCHED, [[jobs.POSITIONS - 1]])

    def grid() -> Tensor:
        ids, each = job.ids.expand(jobs.POSITIONS, -1), [[position] for position in positions]
        made = [model_for([layer], pyvene.VanillaIntervention) for layer in range(jobs.LAYERS)]
        rows = [jobs.logit_difference(put(one, ids, layer, each)) for layer, one in enumerate(made)]
        return torch.stack(rows)

    return {
        jobs.BLOCKS: {"CollectIntervention": collected},
        jobs.PATCH: {"VanillaIntervention": patched},
        jobs.SWEEP: {"VanillaIntervention, a batch of the positions for each layer": grid},
    }
