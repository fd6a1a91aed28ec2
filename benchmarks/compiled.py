"""What an intervention costs in compiled code, and how often it makes the compiler work: nicehooks beside raw hooks.

    python benchmarks/compiled.py [--width 256] [--blocks 12] [--positions 64] [--rounds 60] [--out compiled.json]

Needs a C++ compiler. Nothing is asserted about time; benchmarks/README.md says what each row means.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._dynamo.utils
from torch import Tensor, nn
from torch.nn import functional

import nicehooks
from nicehooks import capture, patch, select, steer

Context = Callable[[], AbstractContextManager[Any]]
now = time.perf_counter if sys.platform == "win32" else time.thread_time
WARM = 2  # calls before each timed one, for every way alike
PLACES = 10  # how many interventions follow on each other in the rows about compiling
LIMIT = 64  # Dynamo gives up after 8 graphs of one function (`recompile_limit`); ten places are more


# --- The model ---


class Block(nn.Module):
    """A transformer block, pre-norm, causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Model(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(width, width // 32) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return self.norm(x)


# --- The interventions: one steering vector, and every block captured ---


@contextmanager
def by_hooks(model: Any, at: int, vector: Tensor) -> Iterator[dict[str, Tensor]]:
    """Raw forward hooks that do the same."""
    activations: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            activations[name] = output

        return hook

    handles = [model.h[at].register_forward_hook(lambda module, args, output: output + vector)]
    handles += [block.register_forward_hook(hook_for(f"h.{i}")) for i, block in enumerate(model.h)]
    yield activations
    for handle in handles:
        handle.remove()


@contextmanager
def by_nicehooks(model: nn.Module, at: int, vector: Tensor) -> Iterator[Any]:
    with steer(model, select(model, f"h.{at}"), vector), capture(model, "h.*") as activations:
        yield activations


# --- Running: ratios to the compiled model without anything, in one interleaved run ---


class Row(NamedTuple):
    what: str
    call: Callable[[], Any]
    context: Context
    target: float | None = None


def sample(row: Row) -> float:
    """Seconds of one call; entering, leaving and two calls before it are outside the clock."""
    with row.context():
        for _ in range(WARM):
            row.call()
        start = now()
        row.call()
        return now() - start


def measure(rows: list[Row], bare: Row, rounds: int) -> tuple[list[list[float]], float]:
    """The ratios of each row to a call of `bare` just before it, and the median time of that in ms."""
    samples: list[list[float]] = [[] for _ in rows]
    bases: list[float] = []
    gc.freeze()
    gc.disable()
    for _ in range(rounds):
        for i in random.sample(range(len(rows)), len(rows)):
            bases.append(sample(bare))
            samples[i].append(sample(rows[i]) / bases[-1])
        gc.collect()
    gc.enable()
    return samples, 1e3 * statistics.median(bases)


def running(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steady calls: everything is compiled before the clock runs."""
    torch._dynamo.reset()
    models = [Model(options.blocks, options.width).eval() for _ in range(4)]
    x, vector, at = torch.randn(1, options.positions, options.width), torch.randn(options.width), options.blocks // 2
    bare, ours, hooked, eager = models
    # Dynamo looks for hooks once, when it compiles: the model with raw hooks is one of its own, which keeps them.
    calls = [torch.compile(model, fullgraph=True) for model in (bare, ours, hooked)]
    by_hand = by_hooks(hooked, at, vector)
    compiled_bare = Row("compiled, nothing", functools.partial(calls[0], x), ExitStack)
    rows = [
        Row("compiled, nothing, again: the noise that is left", functools.partial(calls[0], x), ExitStack),
        Row(
            "compiled, nicehooks",
            functools.partial(calls[1], x),
            functools.partial(by_nicehooks, ours, at, vector),
            target=1.05,
        ),
        Row("compiled, nicehooks, after leaving", functools.partial(calls[1], x), ExitStack, target=1.0),
        Row("compiled, raw hooks that stay", functools.partial(calls[2], x), ExitStack),
        Row("eager, nothing", functools.partial(eager, x), ExitStack),
        Row("eager, raw hooks", functools.partial(eager, x), functools.partial(by_hooks, eager, at, vector)),
        Row("eager, nicehooks", functools.partial(eager, x), functools.partial(by_nicehooks, eager, at, vector)),
    ]
    with by_hand:
        calls[2](x)
        samples, milliseconds = measure(rows, compiled_bare, options.rounds)
    records: list[dict[str, Any]] = []
    for row, ratios in zip(rows, samples, strict=True):
        low, middle, high = statistics.quantiles(ratios, n=4)
        records.append({"what": row.what, "median": middle, "quartiles": [low, high], "target": row.target})
    print(f"\nrunning; {milliseconds:.2f} ms compiled, with nothing")
    print(f"{'':50}{'median':>9}   {'quartiles':^15}  {'target':>8}")
    for r in records:
        target = "" if r["target"] is None else f"≤ {r['target']:.2f}"
        low, high = r["quartiles"]
        print(f"{r['what']:50}{r['median']:>7.3f} ×   {low:>6.3f}…{high:<6.3f}   {target:>8}")
    return records


# --- Compiling: ten interventions after each other ---


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def following(
    options: argparse.Namespace, hook_guards: bool, context: Callable[[nn.Module, int], AbstractContextManager[Any]]
) -> tuple[list[int], list[float]]:
    """How many graphs each of ten interventions has had compiled, and the seconds of its first call."""
    torch._dynamo.reset()
    gc.collect()
    model: Any = Model(options.blocks, options.width).eval()
    x = torch.randn(1, options.positions, options.width)
    compiled = torch.compile(model, fullgraph=True)
    compiled_graphs: list[int] = []
    seconds: list[float] = []
    with torch._dynamo.config.patch(recompile_limit=LIMIT, skip_nnmodule_hook_guards=not hook_guards):
        compiled(x)
        for i in range(PLACES):
            before = graphs()
            with context(model, i):
                start = time.perf_counter()  # the compiler works in other threads and processes, too
                out = compiled(x)
                seconds.append(time.perf_counter() - start)
                expected = model(x)
            assert torch.allclose(out, expected, atol=1e-3), "the compiled model does something else"
            compiled_graphs.append(graphs() - before)
            compiled(x)
    return compiled_graphs, seconds


def compiling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same kind of intervention with new values, and one at ten places."""
    at = options.blocks // 2

    def new_vector(i: int) -> Tensor:
        return torch.randn(options.width, generator=torch.Generator().manual_seed(i))

    ways: list[tuple[str, bool, Callable[[Any, int], AbstractContextManager[Any]]]] = [
        ("new values, steer and capture", False, lambda m, i: by_nicehooks(m, at, new_vector(i))),
        ("new values, raw hooks, guarded", True, lambda m, i: by_hooks(m, at, new_vector(i))),
        ("new values, patch one position", False, lambda m, i: patch(m, {f"h.{at}[:, -1]": new_vector(i)})),
        ("ten places, steer and capture", False, lambda m, i: by_nicehooks(m, i % options.blocks, new_vector(i))),
        ("ten places, raw hooks, guarded", True, lambda m, i: by_hooks(m, i % options.blocks, new_vector(i))),
    ]
    print(f"\ncompiling; {PLACES} interventions after each other{'':12}graphs of each{'':12}first calls, seconds")
    records: list[dict[str, Any]] = []
    for what, hook_guards, context in ways:
        counts, seconds = following(options, hook_guards, context)
        records.append({"what": what, "graphs": counts, "seconds": seconds})
        shown = f"first {seconds[0]:.2f}, then {min(seconds[1:]):.3f}…{max(seconds[1:]):.3f}, all {sum(seconds):.2f}"
        print(f"{what:36}{' '.join(map(str, counts)):24} = {sum(counts):<3} {shown}", flush=True)
    return records


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32, the width of a head")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", choices=["running", "compiling"])
    parser.add_argument("--out", type=Path, help="write the table as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = {"python": platform.python_version(), "torch": torch.__version__, "nicehooks": nicehooks.__version__}
    about |= {"machine": platform.processor() or platform.machine(), "threads": 1, "rounds": options.rounds}
    about |= {name: getattr(options, name) for name in ("blocks", "width", "positions")}
    print(" · ".join(f"{key} {value}" for key, value in about.items()))
    parts = {"running": running, "compiling": compiling}
    results = {name: part(options) for name, part in parts.items() if options.only in (None, name)}
    if options.out is not None:
        options.out.write_text(json.dumps(about | results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
