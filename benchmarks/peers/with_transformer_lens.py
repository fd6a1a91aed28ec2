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


def ways(job: jobs.Job) -> jobs.Ways:
    """With a `TransformerBridge` over the module, made once and off the clock."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    bridge: Any = TransformerBridge.boot_transformers(
        str(job.folder), hf_model=job.model, tokenizer=tokenizer, device="cpu"
    )
    bridge.eval()
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(job.layers)]
    clean, positions = dict(zip(points, job.clean, strict=True)), torch.arange(job.positions)

    def captured(**options: Any) -> Any:
        return bridge.run_with_cache(job.ids, **options)[1]

    def blocks() -> list[Tensor]:
        cache = captured(names_filter=points)
        return [cache[name] for name in points]

    def put(value: Tensor, hook: Any, name: str, rows: Any, where: Any) -> Tensor:
        value = value.clone()
        value[rows, where] = clean[name][0, where]
        return value

    def patched() -> Tensor:
        name = points[job.patched]
        hooks = [(name, partial(put, name=name, rows=slice(None), where=-1))]
        return bridge.run_with_hooks(job.ids, fwd_hooks=hooks)

    def steered(**more: Any) -> Tensor:
        options = {"stop_at_eos": False, "do_sample": False, "return_type": "tokens", "prepend_bos": False}
        with bridge.hooks(fwd_hooks=[(points[job.patched], lambda value, hook: value + job.direction)]):
            return bridge.generate(job.ids, max_new_tokens=jobs.NEW, verbose=False, **options, **more)

    def both() -> tuple[list[Tensor], list[Tensor]]:
        seen: list[Tensor] = []
        with torch.enable_grad():
            hooks = [(name, lambda value, hook: seen.append(value)) for name in points]
            logits = bridge.run_with_hooks(job.ids, fwd_hooks=hooks)
            return seen, list(torch.autograd.grad(job.metric(logits).sum(), seen))

    def batch() -> Tensor:
        hooks = [
            (name, partial(put, name=name, rows=positions + row * job.positions, where=positions))
            for row, name in enumerate(points[layer] for layer in job.swept)
        ]
        logits = bridge.run_with_hooks(job.rows, fwd_hooks=hooks)
        return job.as_grid(job.metric(logits))

    def tool() -> Tensor:
        return patching.generic_activation_patch(
            bridge,
            job.ids,
            clean,  # pyright: ignore
            lambda logits: job.metric(logits)[0],
            patching.layer_pos_patch_setter,
            "resid_post",
            index_axis_names=("layer", "pos"),
        )

    return {
        jobs.BLOCKS: {"run_with_cache, names_filter": blocks},
        jobs.ALL: {"run_with_cache": lambda: list(captured().values())},
        jobs.PATCH: {"run_with_hooks": patched},
        jobs.STEER: {
            "hooks, generate": steered,
            "hooks, generate(use_past_kv_cache=False)": lambda: steered(use_past_kv_cache=False),
        },
        jobs.GRADIENTS: {"run_with_hooks, autograd.grad": lambda: both()[1]},
        jobs.ATTRIBUTION: {"run_with_hooks, autograd.grad": lambda: job.estimates(*both())},
        jobs.SWEEP: {
            "run_with_hooks, one batch, a row for each cell": batch,
            "patching.generic_activation_patch": tool,
        },
    }


def changing(job: jobs.Job) -> jobs.Changing:
    """Hooks at two points of a bridge."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    bridge: Any = TransformerBridge.boot_transformers(
        str(job.folder), hf_model=job.model, tokenizer=tokenizer, device="cpu"
    )
    bridge.eval()
    middle, behind = (f"blocks.{layer}.hook_resid_post" for layer in (job.patched, job.patched + 1))

    def run(call: Any, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def keep(value: Tensor, hook: Any) -> None:
            seen.append(value)

        with bridge.hooks(fwd_hooks=[(middle, lambda value, hook: value + vector), (behind, keep)]):
            output = (bridge if call is None else call)(ids)
        return getattr(output, "logits", output), seen[0] if seen else torch.zeros(0)

    def put(value: Tensor) -> Tensor:
        patched = torch.cat([value[:1, :-1], job.clean[job.patched][:, -1:]], 1)
        return torch.cat([patched, value[1:2] + job.direction, value[2:] * 0])

    def examples(ids: Tensor) -> Tensor:
        return bridge.run_with_hooks(ids, fwd_hooks=[(middle, lambda value, hook: put(value))])

    return jobs.Changing(bridge, run, examples, "by a function of the whole value")
