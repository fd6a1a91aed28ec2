"""How near estimates come to exact patching on SmolLM2-135M, and how faithful its circuits are.

python benchmarks/attribution.py grids       # correlations of estimates with exact effects
python benchmarks/attribution.py circuits    # faithfulness over sizes, beside random circuits
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from nicehooks import anatomy, attribute, capture, circuit, edges, faithfulness
from nicehooks.cli.loading import load
from nicehooks.cli.prompts import encode_pair
from nicehooks.experiments.effects import Effects

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
SEED = 0


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of all cells."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def timed(what: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    return what(), time.perf_counter() - begun


def grids(model: Any, pair: Any, methods: list[str], points: int, every: int) -> None:
    """The estimates of each method beside exact effects, on four grids, of every so many layers."""
    parts, last = anatomy(model), len(pair.tokens) - 1
    where = {
        "z, layers × heads": [f"{part}[:, :, *]" for part in parts.z[::every]],
        "q at the last position, layers × heads": [f"{part}[:, {last}, *]" for part in parts.q[::every]],
        "resid_post, layers × positions": [f"{part}[:, *]" for part in parts.resid_post[::every]],
        "k, layers × heads": [f"{part}[:, :, *]" for part in parts.k[::every]],
    }
    with torch.no_grad(), capture(model, parts.resid_post, parts.z, parts.q, parts.k) as clean:
        model(**pair.clean)
    print(f"{'':40}{'method':12}{'correlation':>12}{'of sizes':>10}{'top 10':>8}{'seconds':>9}")
    for name, sites in where.items():
        run = (model, sites, clean, pair.logit_difference)
        first, _ = timed(lambda run=run: attribute(*run, **pair.corrupted))
        exact, seconds = timed(lambda first=first: first.verify(first.values.numel(), samples=0))
        print(f"{name:40}{'exact':12}{'':>30}{seconds:9.1f}", flush=True)
        for method in methods:
            more = {"method": method, "points": points, **pair.corrupted}
            effects, spent = timed(lambda run=run, more=more: attribute(*run, **more))
            sizes = correlation(effects.values.abs(), exact.values.abs())
            both = f"{correlation(effects.values, exact.values):12.3f}{sizes:10.3f}{shared_top(effects, exact):8}"
            print(f"{'':40}{method:12}{both}{spent:9.1f}", flush=True)


def shared_top(effects: Effects, exact: Effects) -> int:
    """How many of the ten largest effects are among the ten largest estimates."""
    return len({effect.site for effect in effects.top(10)} & {effect.site for effect in exact.top(10)})


SIZES = (100, 300, 1000, 3000, 10_000)


def circuits(model: Any, pair: Any, methods: list[str], points: int) -> None:
    """Faithfulness over sizes, by the effects of edges, beside random circuits of each size."""
    parts = anatomy(model)
    with torch.no_grad(), capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
        model(**pair.corrupted)
    for method in methods:
        more = {"method": method, "points": points, **pair.clean}
        found, seconds = timed(lambda more=more: edges(model, values, pair.logit_difference, **more))
        print(f"{method}: {found}, {seconds:.1f} s", flush=True)
        run = {"sizes": SIZES, "random": 2, **pair.clean}
        largest = circuit(found, top=1)
        curve, spent = timed(lambda c=largest, run=run: faithfulness(model, c, values, pair.logit_difference, **run))
        for size, shares in zip(SIZES, curve.shares.tolist(), strict=True):
            random = "".join([f"{share:8.2f}" for share in shares[1:]])
            print(f"{size:8} edges: {shares[0]:6.2f}   random{random}", flush=True)
        print(f"{len(SIZES) * 3 + 1} runs with edges patched: {spent:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grids", "circuits"])
    parser.add_argument("--methods", nargs="+", help="of the estimates")
    parser.add_argument("--every", type=int, default=1, help="so many layers, one")
    parser.add_argument("--points", type=int, default=5, help="of integrated gradients")
    chosen = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model, tokenizer = load()
    pair = encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")
    if chosen.what == "grids":
        grids(model, pair, chosen.methods or ["gradient", "atp*", "integrated"], chosen.points, chosen.every)
    else:
        circuits(model, pair, chosen.methods or ["eap", "eap-ig"], chosen.points)


if __name__ == "__main__":
    main()
