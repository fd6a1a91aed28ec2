"""Ways to generate, prompts to begin with, and a hook that counts steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from gallery.architectures import tokens
from torch import Tensor, nn

NEW = 6
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(11))


def left_padded() -> dict[str, Tensor]:
    """Prompts of 7, 4 and 2 tokens."""
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 5 + [1] * 2])
    return {"input_ids": tokens(3) * mask, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 0},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}
PROMPTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one": lambda: {"input_ids": tokens(1, batch=1), "attention_mask": torch.ones(1, 7, dtype=torch.long)},
    "left-padded": left_padded,
}


def generate(model: Any, prompt: dict[str, Tensor], **how: Any) -> Tensor:
    """The prompt and `NEW` tokens after it, with the random numbers of one seed."""
    torch.manual_seed(7)
    return model.generate(**prompt, **{"max_new_tokens": NEW, "min_new_tokens": NEW, **how})


@contextmanager
def stepwise_hook(model: nn.Module, name: str, fn: Callable[[Any, int], Any]) -> Generator[None]:
    """By hand: `fn(value, step)` changes what the module `name` returns; steps are counted at the root."""
    step = -1

    def count(module: nn.Module, args: Any) -> None:
        nonlocal step
        step += 1

    handles = [
        model.register_forward_pre_hook(count),
        model.get_submodule(name).register_forward_hook(lambda module, args, output: fn(output, step)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
