"""What a grid of patches costs by `sweep`, beside the loop of raw hooks in one interleaved run.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py [--rounds 5] [--only WORD …] [--out sweep.json]

Nothing is asserted about time; benchmarks/README.md says what each row means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks import capture, sweep

LAYERS, POSITIONS = 12, 16
Work = Callable[[], Tensor]


class Grid(NamedTuple):
    """One table: ways to make one grid of effects, each divided into the first.

    Attributes:
        what: the grid.
        ways: by name; the first is the loop that the others are faster than, and all give the same numbers.
        targets: by the names of ways: how many times faster they should be.
    """

    what: str
    ways: dict[str, Work]
    targets: dict[str, float]


def metric(output: Any) -> Tensor:
    """A difference of two logits at the last position, `[batch]`."""
    return output.logits[:, -1, 3] - output.logits[:, -1, 5]


def gpt2(width: int, vocabulary: int) -> Any:
    """A random GPT-2 of 12 layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=width, n_head=max(4, width // 64), vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def raw_loop(model: nn.Module, names: list[str], clean: dict[str, Tensor], **inputs: Any) -> Tensor:
    """One forward with one raw hook for each layer and position: what a user writes by hand."""
    effects: list[Tensor] = []
    baseline = metric(model(**inputs))
    for name in names:
        module = model.get_submodule(name)
        for position in range(inputs["input_ids"].shape[1]):

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = name, at: int = position) -> Tensor:
                output = output.clone()
                output[:, at] = clean[name][:, at]
                return output

            handle = module.register_forward_hook(hook)
            effects.append(metric(model(**inputs)) - baseline)
            handle.remove()
    return torch.stack(effects).reshape(len(names), -1)


def residual_grid(model: nn.Module, what: str, targets: dict[str, float], ways: dict[str, Any], **more: Any) -> Grid:
    """Layers × positions of the residual stream of a GPT-2."""
    names = [f"transformer.h.{layer}" for layer in range(LAYERS)]
    clean_ids, ids = torch.arange(POSITIONS)[None], torch.arange(POSITIONS).flip(0)[None]
    with capture(model, "transformer.h.*") as clean:
        model(input_ids=clean_ids)
    inputs = {"input_ids": ids, **more}

    def by(options: dict[str, Any]) -> Work:
        given: Any = {**options, **inputs}
        return lambda: sweep(model, "transformer.h.*[:, *]", clean, metric, **given).values

    all_ways: dict[str, Work] = {"raw hooks": lambda: raw_loop(model, names, clean, **inputs)}
    return Grid(what, {**all_ways, **{name: by(options) for name, options in ways.items()}}, targets)


WAYS: dict[str, Any] = {
    "sweep": {},
    "positions, unchecked": {"engine": "positions", "check": False},
    "growing, unchecked": {"engine": "growing", "check": False},
    "batch, unchecked": {"engine": "batch", "check": False},
    "vmap, unchecked": {"engine": "vmap", "check": False},
    "loop with reuse": {"engine": "loop", "check": False},
}


def grids() -> Iterator[Callable[[], Grid]]:
    """Each grid, made when it is its turn."""
    small, large = "12 × 16, width 64", "12 × 16, width 768"
    last = ", logits_to_keep=1"
    yield lambda: residual_grid(gpt2(64, 1000), small, {"sweep": 8.5}, WAYS)
    yield lambda: residual_grid(gpt2(64, 1000), small + last, {"sweep": 11.0}, WAYS, logits_to_keep=1)
    few = {name: WAYS[name] for name in ("sweep", "positions, unchecked", "growing, unchecked")}
    yield lambda: residual_grid(gpt2(768, 50257), large, {"growing, unchecked": 3.6, "sweep": 6.0}, few)
    yield lambda: residual_grid(
        gpt2(768, 50257), large + last, {"growing, unchecked": 3.6, "sweep": 6.0}, few, logits_to_keep=1
    )


def measured(grid: Grid, rounds: int) -> dict[str, Any]:
    """The median seconds of each way, and the median of its ratios to the first, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in grid.ways}
    for _ in range(rounds):
        expected: Tensor | None = None
        for name, work in grid.ways.items():
            start = time.thread_time()
            effects = work()
            seconds[name].append(time.thread_time() - start)
            expected = effects if expected is None else expected
            far = (effects - expected).abs().max().item()
            if not far <= 1e-4 * max(1.0, expected.abs().max().item()):
                raise AssertionError(f"{grid.what}, {name}: {far} away from the loop")
    base = seconds["raw hooks"]
    ratios = {
        name: statistics.median([a / b for a, b in zip(base, each, strict=True)]) for name, each in seconds.items()
    }
    return {"seconds": {name: statistics.median(each) for name, each in seconds.items()}, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {}
    for make in grids():
        grid = make()
        if options.only and not all([word in grid.what for word in options.only]):
            continue
        result = found[grid.what] = measured(grid, options.rounds)
        print(f"\n{grid.what}")
        for name in grid.ways:
            target = f"  (asked: {grid.targets[name]:g})" if name in grid.targets else ""
            print(
                f"  {name:24} {result['seconds'][name] * 1e3:10.1f} ms {result['ratios'][name]:8.2f} ×{target}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
