"""What it costs to serve requests under interventions: tokens per second over the bare engine's.

    python benchmarks/serving.py                  # SmolLM2-135M's sizes, random weights
    python benchmarks/serving.py --small          # a tiny model, where the work of Python shows most

64 requests of which half are steered, each by another vector. Both ways run in turn, in random order; the figures are
the medians of the ratios of neighbours: by processor time of all threads, which other work on the machine hardly
touches, and by the wall clock.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from nicehooks import serving, steer

SMOL: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
ENGINE: dict[str, Any] = {"page_size": 32, "num_blocks": 256, "max_batch_tokens": 512}


class Took(NamedTuple):
    """Seconds from the first request to the last result."""

    cpu: float
    wall: float

    @classmethod
    def since(cls, begun: Took) -> Took:
        return cls(time.process_time() - begun.cpu, time.perf_counter() - begun.wall)


NEVER = Took(0.0, 0.0)


def bare(model: Any, prompts: list[list[int]], new: int) -> Took:
    """What the engine takes alone."""
    off: dict[str, Any] = {"use_async_batching": False, "use_cuda_graph": False}
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=new)
    manager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**ENGINE, **off)
    )
    manager.warmup()
    manager.start()
    begun = Took.since(NEVER)
    for prompt in prompts:
        manager.add_request(prompt)
    for _ in prompts:
        result = manager.get_result(timeout=600)
        assert result is not None and len(result.generated_tokens) == new
    took = Took.since(begun)
    manager.stop(block=True)
    return took


def served(model: Any, prompts: list[list[int]], new: int, vectors: Any, where: str) -> Took:
    """What the same requests take, every other one steered."""
    with serving(model, generation={"do_sample": False, "eos_token_id": -1}, **ENGINE) as server:
        begun = Took.since(NEVER)
        handles = [
            server.submit(prompt, under=[steer(model, where, vector)] if vector is not None else [], max_new_tokens=new)
            for prompt, vector in zip(prompts, vectors, strict=True)
        ]
        for handle in handles:
            assert len(handle.result(600).tokens) == new
        return Took.since(begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = TINY if given.small else SMOL
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    prompts = [[random.randrange(1, 1000) for _ in range(random.randrange(8, 24))] for _ in range(given.requests)]
    vectors = [torch.randn(sizes["hidden_size"]) if at % 2 else None for at in range(given.requests)]
    where = f"model.layers.{sizes['num_hidden_layers'] // 2}"
    ways = {
        "bare": lambda: bare(model, prompts, given.new),
        "served": lambda: served(model, prompts, given.new, vectors, where),
    }
    ratios: list[Took] = []
    for turn in range(given.rounds + 1):
        took = {name: ways[name]() for name in random.sample(list(ways), len(ways))}
        if turn:  # the first one warms up
            ratios.append(Took(*[one / other for one, other in zip(took["bare"], took["served"], strict=True)]))
            rate = {name: given.requests * given.new / seconds.wall for name, seconds in took.items()}
            print(
                f"  bare {rate['bare']:8.1f} tokens/s   served {rate['served']:8.1f}   {ratios[-1].wall:.3f} ×"
                f"   by processor time {ratios[-1].cpu:.3f} ×",
                flush=True,
            )
    cpu, wall = [statistics.median(each) for each in zip(*ratios, strict=True)]
    print(
        f"{given.requests} requests, half steered: {cpu:.3f} × the bare engine's rate by processor time, "
        f"{wall:.3f} × by the clock"
    )


if __name__ == "__main__":
    main()
