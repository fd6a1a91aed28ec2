"""TransformerLens: a bridge over the model's own code, with hook points."""

from __future__ import annotations

from functools import partial
from typing import Any

import jobs
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

PACKAGES = ("transformer-lens",)
IMPORTED = "from transformer_lens.model_bridge import TransformerBridge"
LACKS: dict[str, str] = {}
POINTS = [f"blocks.{layer}.hook_resid_post" for layer in range(jobs.LAYERS)]


def ways(job: jobs.Job) -> jobs.Ways:
    """With a `TransformerBridge` over the module, made once and off the clock."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    bridge: Any = TransformerBridge.boot_transformers(
        str(job.folder), hf_model=job.model, tokenizer=tokenizer, device="cpu"
    )
    bridge.eval()
    clean, positions = dict(zip(POINTS, job.clean, strict=True)), torch.arange(jobs.POSITIONS)

    def captured(**options: Any) -> Any:
        return bridge.run_with_cache(job.ids, **options)[1]

    def blocks() -> list[Tensor]:
        cache = captured(names_filter=POINTS)
        return [cache[name] for name in POINTS]

    def put(value: Tensor, hook: Any, name: str, rows: Any, where: Any) -> Tensor:
        value = value.clone()
        value[rows, where] = clean[name][0, where]
        return value

    def patched() -> Tensor:
        name = POINTS[jobs.PATCHED]
        hooks = [(name, partial(put, name=name, rows=slice(None), where=-1))]
        return bridge.run_with_hooks(job.ids, fwd_hooks=hooks)

    def gradients() -> list[Tensor]:
        seen: list[Tensor] = []
        with torch.enable_grad():
            hooks = [(name, lambda value, hook: seen.append(value)) for name in POINTS]
            logits = bridge.run_with_hooks(job.ids, fwd_hooks=hooks)
            return list(torch.autograd.grad(jobs.logit_difference(logits).sum(), seen))

    def batch() -> Tensor:
        hooks = [
            (name, partial(put, name=name, rows=positions + layer * jobs.POSITIONS, where=positions))
            for layer, name in enumerate(POINTS)
        ]
        logits = bridge.run_with_hooks(job.rows, fwd_hooks=hooks)
        return jobs.logit_difference(logits).view(jobs.LAYERS, jobs.POSITIONS)

    def tool() -> Tensor:
        return patching.generic_activation_patch(
            bridge,
            job.ids,
            clean,  # pyright: ignore
            lambda logits: jobs.logit_difference(logits)[0],
            patching.layer_pos_patch_setter,
            "resid_post",
            index_axis_names=("layer", "pos"),
        )

    return {
        jobs.BLOCKS: {"run_with_cache, names_filter": blocks},
        jobs.ALL: {"run_with_cache": lambda: list(captured().values())},
        jobs.PATCH: {"run_with_hooks": patched},
        jobs.GRADIENTS: {"run_with_hooks, autograd.grad": gradients},
        jobs.SWEEP: {
            "run_with_hooks, one batch, a row for each cell": batch,
            "patching.generic_activation_patch": tool,
        },
    }
