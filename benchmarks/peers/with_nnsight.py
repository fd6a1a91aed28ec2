"""nnsight: code in a trace, which runs interleaved with the forward."""

from __future__ import annotations

from typing import Any

import jobs
import nnsight
import torch
from torch import Tensor

PACKAGES = ("nnsight",)
IMPORTED = "from nnsight import NNsight"
LACKS: dict[str, str] = {}


def ways(job: jobs.Job) -> jobs.Ways:
    """With `NNsight` around the module, made once and off the clock."""
    from transformers import AutoTokenizer

    model: Any = nnsight.NNsight(job.model)
    ids, clean, rows_of_ids, swept = job.ids, job.clean, job.rows, job.swept
    blocks, positions = model.get(job.of.blocks), torch.arange(job.positions)
    generating: Any = nnsight.LanguageModel(job.model, tokenizer=AutoTokenizer.from_pretrained(job.folder))
    steps, direction, middle = jobs.NEW, job.direction, generating.get(job.names[job.patched])

    def captured() -> list[Tensor]:
        with model.trace(ids):
            seen = [block.output for block in blocks]
            nnsight.save(seen)
        return list(seen)

    def cached() -> list[Any]:
        with model.trace(ids) as tracer:
            cache = tracer.cache(detach=False)
        return [cache[path].output for path in cache.keys()]  # noqa: SIM118, it has no iterator

    def patched() -> Tensor:
        with model.trace(ids):
            blocks[job.patched].output[:, -1] = clean[job.patched][:, -1]
            logits = model.output.logits.save()
        return logits

    def steered() -> Tensor:
        with generating.generate(ids, **job.generation) as tracer:
            for _ in tracer.iter[:steps]:
                middle.output = middle.output + direction
            tokens = tracer.result.save()
        return tokens

    def both() -> tuple[list[Tensor], list[Tensor]]:
        with torch.enable_grad():
            with model.trace(ids):
                seen = [block.output for block in blocks]
                value = job.metric(model.output.logits).sum()
                found = torch.autograd.grad(value, seen)
                nnsight.save(seen)
                nnsight.save(found)
        return list(seen), list(found)

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            with model.trace(ids):
                seen = [block.output for block in blocks]
                value = job.metric(model.output.logits).sum()
                found = torch.autograd.grad(value, seen)
                nnsight.save(found)
        return list(found)

    def grid() -> Tensor:
        with model.trace(rows_of_ids):
            for row, layer in enumerate(swept):
                blocks[layer].output[positions + row * job.positions, positions] = clean[layer][0]
            values = job.metric(model.output.logits).save()
        return job.as_grid(values)

    return {
        jobs.BLOCKS: {"trace, save": captured},
        jobs.ALL: {"tracer.cache": cached},
        jobs.PATCH: {"trace": patched},
        jobs.STEER: {"generate, tracer.iter": steered},
        jobs.GRADIENTS: {"trace, autograd.grad": gradients},
        jobs.ATTRIBUTION: {"trace, autograd.grad": lambda: job.estimates(*both())},
        jobs.SWEEP: {"one trace of a batch, a row for each cell": grid},
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """A trace; a compiled model is wrapped after it was compiled, and an invoke for each example."""
    from transformers import AutoTokenizer

    wrapped: list[Any] = []  # only once it is needed, as a model that is wrapped is not compiled
    middle, behind = job.names[job.patched : job.patched + 2]

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        if call is not None and not isinstance(call, torch.nn.Module):
            raise NotImplementedError("a trace calls the model itself")
        if call is not None or not wrapped:
            wrapped.append(nnsight.NNsight(job.model if call is None else call))
        model = wrapped[-1]
        blocks: Any = model.get(middle), model.get(behind)
        with model.trace(ids, use_cache=False):
            blocks[0].output = blocks[0].output + vector
            value = blocks[1].output.save()
            logits = model.output.logits.save()
        return logits, value

    def examples(ids: Tensor) -> Tensor:
        batches: Any = nnsight.LanguageModel(job.model, tokenizer=AutoTokenizer.from_pretrained(job.folder))
        block, new, vector = batches.get(middle), job.clean[job.patched][:, -1], job.direction
        with batches.trace() as tracer:
            with tracer.invoke(ids[:1]):
                block.output[:, -1] = new
            with tracer.invoke(ids[1:2]):
                block.output = block.output + vector
            with tracer.invoke(ids[2:]):
                block.output = block.output * 0
            with tracer.invoke():
                logits = batches.output.logits.save()
        return logits

    return jobs.Changing(job.model, run, examples, "an invoke for each")
