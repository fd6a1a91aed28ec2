"""What `anatomy(model)` costs beside the forwards that it makes: a random Llama of 30 layers, SmolLM2-135M's shape.

    python benchmarks/anatomy_cost.py [--models 8]

Each time the model is a new one. Processor time of the thread, with the garbage collector on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nicehooks import anatomy

SIZES: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
HEADS: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


def costs() -> tuple[float, float, float]:
    """Seconds of a forward on as many tokens as `anatomy` takes, of `anatomy`, and of asking again."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval().requires_grad_(False)
    ids = torch.arange(14).view(2, 7)
    model(ids)
    forward = statistics.median(_seconds(model, ids) for _ in range(5))
    return forward, _seconds(anatomy, model), _seconds(anatomy, model)


def _seconds(call: Callable[..., object], *args: object) -> float:
    begin = time.thread_time()
    call(*args)
    return time.thread_time() - begin


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8, help="how many models")
    torch.set_num_threads(1)
    each = [costs() for _ in range(parser.parse_args().models)]
    forward, found, again = (statistics.median(column) for column in zip(*each, strict=True))
    beside = statistics.median(found - 3 * forward for forward, found, _ in each)
    print(f"a forward {forward:.3f} s · anatomy(model) {found:.3f} s · again {again:.4f} s")
    print(f"anatomy(model) less 3 forwards: {beside:.3f} s")


if __name__ == "__main__":
    main()
