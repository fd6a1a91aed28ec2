"""What a grid of patches costs by `sweep`, beside the loop of raw hooks in one interleaved run.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py [--rounds 5] [--only small demo …] [--out sweep.json]

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

from nicehooks import capture, patch, sweep
from nicehooks.cli.prompts import last_logits_only

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


def one_growing_forward(model: nn.Module, names: list[str], clean: dict[str, Tensor], **inputs: Any) -> Tensor:
    """One forward in which a raw hook on each layer appends a row for each position: as quick as it is by hand."""
    places = torch.arange(POSITIONS)

    def appending(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            rows = output[:1].repeat(POSITIONS, 1, 1)
            rows[places, places] = clean[name][0]
            return torch.cat([output, rows])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(appending(name)) for name in names]
    metrics = metric(model(**inputs))
    for handle in handles:
        handle.remove()
    return (metrics[1:] - metrics[0]).reshape(len(names), -1)


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

    all_ways: dict[str, Work] = {
        "raw hooks": lambda: raw_loop(model, names, clean, **inputs),
        "raw hooks, growing": lambda: one_growing_forward(model, names, clean, **inputs),
    }
    return Grid(what, {**all_ways, **{name: by(options) for name, options in ways.items()}}, targets)


def smollm() -> tuple[Any, Any]:
    """SmolLM2-135M, and the prompts of the demo."""
    from nicehooks.cli.command import ANSWER, CLEAN, CORRUPTED, WRONG
    from nicehooks.cli.loading import load
    from nicehooks.cli.prompts import encode_pair

    model, tokenizer = load()
    return model, encode_pair(tokenizer, CLEAN, CORRUPTED, ANSWER, WRONG)


def batched_loop(model: Any, pair: Any, clean: Any, batch: int = 16) -> Tensor:
    """The loop that the demo had: the positions of one layer side by side, each in a row of its own."""
    base = pair.logit_difference(model(**pair.corrupted)).item()
    found: list[Tensor] = []
    for site, value in clean.items():
        for start in range(0, value.shape[1], batch):
            places = list(range(start, min(start + batch, value.shape[1])))
            rows = {f"{site}[{row}, {place}]": value[0, place] for row, place in enumerate(places)}
            inputs = {name: given.expand(len(places), -1) for name, given in pair.corrupted.items()}
            with torch.no_grad(), patch(model, rows):
                found.append(pair.logit_difference(model(**inputs)) - base)
    return torch.cat(found).reshape(len(clean), -1)


ENGINES = {"sweep": "auto", "positions": "positions", "growing": "growing"}


def demo_grid() -> Grid:
    """Layers × positions of SmolLM2, beside the loop over batches of 16 that the demo had."""
    model, pair = smollm()
    with capture(model, "model.layers.*") as clean:
        model(**pair.clean)

    def loop() -> Tensor:
        return batched_loop(model, pair, clean)

    def swept(engine: Any) -> Work:
        given: Any = {"engine": engine, **pair.corrupted, **last_logits_only(model)}
        return lambda: sweep(model, "model.layers.*[:, *]", clean, pair.logit_difference, **given).values

    ways = {"batched loop": loop, **{name: swept(engine) for name, engine in ENGINES.items()}}
    return Grid("SmolLM2, 30 layers × 14 positions", ways, {"sweep": 3.0})


def heads_grid() -> Grid:
    """All heads of SmolLM2 ablated, on four prompts; of the loop only a part is run, which counts for all of it."""
    model, pair = smollm()
    ids, where = pair.corrupted["input_ids"].repeat(4, 1), "model.layers.*.self_attn.o_proj@input[0]/9[:, :, *]"
    ids[:, 1] += torch.arange(4)  # four prompts that are not the same
    paths = [where.replace("*", str(cell // 9), 1).replace("*", str(cell % 9)) for cell in range(0, 270, HEADS_SKIPPED)]

    def loop() -> Tensor:
        effects: list[Tensor] = []
        baseline = metric(model(ids))
        for path in paths:
            with patch(model, path, 0.0):
                effects.append((metric(model(ids)) - baseline).mean())
        return torch.stack(effects)

    last: Any = last_logits_only(model)
    ways: dict[str, Work] = {
        "loop": loop,
        "sweep": lambda: sweep(model, where, 0.0, metric, ids, **last).values.flatten()[::HEADS_SKIPPED],
    }
    return Grid(
        f"SmolLM2, 30 × 9 heads, 4 prompts (loop: one in {HEADS_SKIPPED})", ways, {"sweep": 5.0 / HEADS_SKIPPED}
    )


HEADS_SKIPPED = 18
"""One in so many heads is patched by the loop: all of them would take minutes."""


WAYS: dict[str, Any] = {
    "sweep": {},
    "positions, unchecked": {"engine": "positions", "check": False},
    "growing, unchecked": {"engine": "growing", "check": False},
    "batch, unchecked": {"engine": "batch", "check": False},
    "vmap, unchecked": {"engine": "vmap", "check": False},
    "loop with reuse": {"engine": "loop", "check": False},
}


def grids(only: list[str]) -> Iterator[Callable[[], Grid]]:
    """Each grid whose name is among `only`, made when it is its turn."""
    for name, make in every_grid().items():
        if not only or name in only:
            yield make


def every_grid() -> dict[str, Callable[[], Grid]]:
    """How to make each grid, by a short name."""
    small, large = "12 × 16, width 64", "12 × 16, width 768"
    last = ", logits_to_keep=1"
    few = {name: WAYS[name] for name in ("sweep", "positions, unchecked", "growing, unchecked")}
    asked = {"growing, unchecked": 3.6, "sweep": 6.0}
    return {
        "small": lambda: residual_grid(gpt2(64, 1000), small, {"sweep": 8.5}, WAYS),
        "small-last": lambda: residual_grid(gpt2(64, 1000), small + last, {"sweep": 11.0}, WAYS, logits_to_keep=1),
        "large": lambda: residual_grid(gpt2(768, 50257), large, asked, few),
        "large-last": lambda: residual_grid(gpt2(768, 50257), large + last, asked, few, logits_to_keep=1),
        "demo": demo_grid,
        "heads": heads_grid,
    }


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
    base = seconds[next(iter(grid.ways))]
    ratios = {
        name: statistics.median([a / b for a, b in zip(base, each, strict=True)]) for name, each in seconds.items()
    }
    return {"seconds": {name: statistics.median(each) for name, each in seconds.items()}, "ratios": ratios}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(every_grid()))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for make in grids(options.only):
        grid = make()
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
