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
    jobs.ATTRIBUTION: "not tried: the same",
    jobs.ALL: "not tried: each place is an entry of the configuration, with its positions",
}


def ways(job: jobs.Job) -> jobs.Ways:
    """With an `IntervenableModel` for each configuration, made on the clock where a user would make it for one use."""
    positions = list(range(job.positions))

    def model_for(layers: Any, kind: Any, units: int = 1) -> Any:
        same = {"component": "block_output", "unit": "pos", "max_number_of_units": units, "intervention_type": kind}
        wanted = [{"layer": layer, **same} for layer in layers]
        return pyvene.IntervenableModel(pyvene.IntervenableConfig(wanted), model=job.model)

    def collected() -> list[Tensor]:
        made = model_for(range(job.layers), pyvene.CollectIntervention, job.positions)
        found = made({"input_ids": job.ids}, unit_locations={"base": [[positions]] * job.layers})
        return list(found[0][1])

    def steered() -> Tensor:
        same = {"component": "block_output", "intervention_type": pyvene.AdditionIntervention}
        config = pyvene.IntervenableConfig([{"layer": job.patched, **same}])
        made = pyvene.IntervenableModel(config, model=job.model)
        _, tokens = made.generate(
            {"input_ids": job.ids},
            source_representations={next(iter(made.interventions)): job.direction},
            intervene_on_prompt=True,
            **job.generation,
        )
        return tokens

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
        made = model_for([job.patched], pyvene.VanillaIntervention)
        return put(made, job.ids, job.patched, [[job.positions - 1]])

    def grid() -> Tensor:
        ids, each = job.ids.expand(job.positions, -1), [[position] for position in positions]
        made = [(layer, model_for([layer], pyvene.VanillaIntervention)) for layer in job.swept]
        return job.as_grid(job.metric(put(one, ids, layer, each)) for layer, one in made)

    return {
        jobs.BLOCKS: {"CollectIntervention": collected},
        jobs.PATCH: {"VanillaIntervention": patched},
        jobs.STEER: {"AdditionIntervention, generate": steered},
        jobs.SWEEP: {"VanillaIntervention, a batch of the positions for each layer": grid},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """An addition and a collection in one configuration."""

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        if call is not None and not isinstance(call, torch.nn.Module):
            raise NotImplementedError("it calls the model itself")
        kinds = (pyvene.AdditionIntervention, pyvene.CollectIntervention)
        wanted = [
            {"layer": job.patched + more, "component": "block_output", "intervention_type": kind}
            for more, kind in enumerate(kinds)
        ]
        made: Any = pyvene.IntervenableModel(
            pyvene.IntervenableConfig(wanted), model=job.model if call is None else call
        )
        found, changed = made(
            {"input_ids": ids},
            source_representations={next(iter(made.interventions)): vector},
            output_original_output=True,
        )
        return changed.logits, found[1][0][None]

    return jobs.Changing(job.model, run)
