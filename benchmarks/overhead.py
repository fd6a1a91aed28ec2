"""What an intervention costs: nicehooks beside the bare model and hand-written ways, in one interleaved run.

    python benchmarks/overhead.py [--rounds 400] [--out overhead.json] [--only gpt2|chain]

Nothing is asserted about time; benchmarks/README.md says what each row means.
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
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nicehooks
from nicehooks import NotCalledWarning, capture, patch, select

Modules = dict[str, nn.Module]
Context = Callable[[], AbstractContextManager[Any]]
now = time.perf_counter if sys.platform == "win32" else time.thread_time
"""What this thread has run, not what it has waited for the processor; Windows counts that too coarsely."""
WARM = 2  # calls before each timed one, for every way alike


# --- The two models ---


def gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12, n_embd=64, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), torch.arange(16)[None]


class Alias(nn.Module):
    """The tiny layer: one new tensor over the same memory, about 1 µs, so that a raw hook on every module costs 2×."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def chain() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(Alias() for _ in range(400))).eval(), torch.randn(1, 8)


def modules_that_run(model: nn.Module, x: Tensor) -> Modules:
    """Without those that no forward reaches: containers, GPT-2's `attn_dropout` under fused attention."""
    with raw_hooks(dict(model.named_modules())) as seen:
        model(x)
    return {name: module for name, module in model.named_modules() if name in seen}


# --- The other ways to capture, written by hand for this comparison ---


@contextmanager
def raw_hooks(modules: Modules) -> Iterator[dict[str, Any]]:
    """`register_forward_hook` in a loop, into a dict."""
    activations: dict[str, Any] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            activations[name] = output

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    yield activations
    for handle in handles:
        handle.remove()


class Trace:
    """One traced module in the style of baukit: an object which is itself a context and retains what its hook saw."""

    output: Any = None

    def __init__(self, module: nn.Module, retain_output: bool = True, detach: bool = False, edit: Any = None):
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if edit is not None:
                output = edit(output)
            if retain_output:
                self.output = output.detach() if detach else output
            return output

        self.handle = module.register_forward_hook(hook)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


@contextmanager
def trace_dict(modules: Modules) -> Iterator[dict[str, Trace]]:
    """A `Trace` per module, entered and left together."""
    traces = {name: Trace(module) for name, module in modules.items()}
    for trace in traces.values():
        trace.__enter__()
    yield traces
    for trace in reversed(traces.values()):
        trace.__exit__(None, None, None)


@contextmanager
def rebound(modules: Modules) -> Iterator[dict[str, Any]]:
    """`forward` rebound by hand: the cheapest way known, with none of the laws (order, ownership, restoration, …)."""
    activations: dict[str, Any] = {}

    def bind(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            activations[name] = output = original(*args, **kwargs)
            return output

        return forward

    for name, module in modules.items():
        module.__dict__["forward"] = bind(name, module.forward)
    yield activations
    for module in modules.values():
        del module.__dict__["forward"]


@contextmanager
def raw_patch(module: nn.Module, value: Tensor) -> Iterator[None]:
    """A forward hook that copies the output and assigns its last position."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] = value
        return output

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


# --- The measures, each one sample in seconds ---


def bare(model: nn.Module, x: Tensor) -> float:
    for _ in range(WARM):
        model(x)
    start = now()
    model(x)
    return now() - start


def run_only(context: Context, model: nn.Module, x: Tensor) -> float:
    """Entering and leaving are outside the clock; so are two calls that warm the caches."""
    with context():
        return bare(model, x)


def idle(context: Context, model: nn.Module, x: Tensor) -> float:
    """The model after leaving, which must not only be as fast as it was but be what it was."""
    before = trace_of(model)
    with context():
        model(x)
    assert trace_of(model) == before, "leaving did not restore the model"
    return bare(model, x)


def end_to_end(context: Context, model: nn.Module, x: Tensor) -> float:
    model(x)
    start = now()
    with context() as activations:
        model(x)
    end = now()
    del activations  # freed outside the clock, for every way alike
    return end - start


def enter_leave(context: Context, model: nn.Module, x: Tensor) -> float:
    """Entering, and leaving after a call of the model that is not timed: what a user pays besides the call."""
    model(x)
    start = now()
    manager = context()
    activations = manager.__enter__()
    entered = now()
    model(x)
    leaving = now()
    manager.__exit__(None, None, None)
    end = now()
    del activations  # as above
    return (entered - start) + (end - leaving)


def enter_leave_loop(context: Context, model: nn.Module, x: Tensor) -> float:
    """The mean of up to ten times entering and leaving, with no call of the model in between to cool the caches.

    Leaving uncalled warns (law 7). The filter is set outside the clock; what is left of a warning is inside.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotCalledWarning)
        start, number = now(), 0
        while number < 10 and now() - start < 0.01:  # whatever is that slow needs no mean of ten
            with context():
                pass
            number += 1
        return (now() - start) / number


def trace_of(model: nn.Module) -> dict[str, Any]:
    """Everything that is in any module's `vars()`, by identity and in order, and what is in the dicts among it."""

    def content(value: Any) -> Any:
        return [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else None

    return {
        name: [(key, id(value), content(value)) for key, value in vars(module).items()]
        for name, module in model.named_modules()
    }


# --- The rows ---


class Row(NamedTuple):
    what: str
    how: str
    sample: Callable[[nn.Module, Tensor], float]
    unit: str = "×"
    target: float | None = None


ENTERING = [("enter, leave", enter_leave), ("enter, leave in a loop", enter_leave_loop)]


def capture_rows(model: nn.Module, what: str, modules: Modules, where: str, targets: dict[str, float]) -> Iterator[Row]:
    """The same capture in every way. `where` is how a user writes it, the sites are the selection once it is known."""
    sites = select(model, list(modules))
    again = capture(model, *sites)
    by_hand = {
        "raw hooks": lambda: raw_hooks(modules),
        "baukit style": lambda: trace_dict(modules),
        "rebound by hand": lambda: rebound(modules),
    }
    fresh = {"nicehooks, the sites": lambda: capture(model, *sites)}
    ours = fresh | {"nicehooks, same context": lambda: again, f"nicehooks, {where!r}": lambda: capture(model, where)}
    for way, measure, unit, contexts in [
        ("run only", run_only, "×", by_hand | fresh),
        ("end to end", end_to_end, "×", by_hand | ours),
        *((way, measure, "µs", by_hand | ours) for way, measure in ENTERING),
    ]:
        for how, context in contexts.items():
            target = targets.get(way.removesuffix(" in a loop")) if how in list(ours)[:2] else None
            yield Row(f"{what}: {way}", how, functools.partial(measure, context), unit, target)


def gpt2_rows(model: nn.Module, x: Tensor) -> Iterator[Row]:
    running = modules_that_run(model, x)
    blocks = {name: running[name] for name in (f"transformer.h.{i}" for i in range(12))}
    yield from capture_rows(model, "12 blocks", blocks, "transformer.h.*", {"run only": 1.02, "enter, leave": 20})
    targets = {"run only": 1.10, "end to end": 1.15, "enter, leave": 150}
    yield from capture_rows(model, "every module", running, "**", targets)
    yield Row("idle after leaving", "nicehooks", functools.partial(idle, lambda: capture(model, "**")), target=1.00)
    value, block = torch.randn(1, 64), blocks["transformer.h.6"]
    patches: dict[str, tuple[Context, float | None]] = {
        "raw hook, clone and assign": (lambda: raw_patch(block, value), None),
        "nicehooks": (lambda: patch(model, {"transformer.h.6[:, -1]": value}), 1.02),
    }
    for how, (context, target) in patches.items():
        yield Row("one patched position: run only", how, functools.partial(run_only, context), target=target)


def chain_rows(model: nn.Module, x: Tensor) -> Iterator[Row]:
    targets = {"run only": 1.25, "end to end": 1.30}
    yield from capture_rows(model, "every module", modules_that_run(model, x), "**", targets)
    yield Row("idle after leaving", "nicehooks", functools.partial(idle, lambda: capture(model, "**")), target=1.00)


# --- Running them ---


@torch.no_grad()
def measure(rows: list[Row], model: nn.Module, x: Tensor, rounds: int) -> tuple[list[list[float]], float]:
    """The samples of each row, as ratios or in µs, and the median time of the bare model in ms.

    Every row has its turn once a round, in a new random order each round. What becomes a ratio is preceded by a call of
    the bare model and divided by it: so a neighbour that slows the machine down for a while slows down both.
    """
    samples: list[list[float]] = [[] for _ in rows]
    bases: list[float] = []
    gc.freeze()
    gc.disable()  # as timeit does, for every way alike
    for _ in range(rounds):
        for i in random.sample(range(len(rows)), len(rows)):
            if rows[i].unit == "×":
                bases.append(bare(model, x))
                samples[i].append(rows[i].sample(model, x) / bases[-1])
            else:
                samples[i].append(rows[i].sample(model, x) * 1e6)
        gc.collect()
    gc.enable()
    return samples, 1e3 * statistics.median(bases)


def summarised(group: str, rows: list[Row], samples: list[list[float]]) -> list[dict[str, Any]]:
    """Medians and quartiles over the rounds."""
    records = []
    for row, sample in zip(rows, samples, strict=True):
        low, middle, high = statistics.quantiles(sample, n=4)
        record = {"group": group, "what": row.what, "how": row.how, "unit": row.unit, "median": middle}
        records.append(record | {"quartiles": [low, high], "target": row.target})
    return records


def show(title: str, records: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':38}{'':29}{'median':>9}  {'quartiles':^15}  {'target':>8}")
    previous = None
    for r in records:
        form = "{:.3f}" if r["unit"] == "×" else "{:.1f}"
        low, middle, high = map(form.format, (r["quartiles"][0], r["median"], r["quartiles"][1]))
        target = "" if r["target"] is None else f"≤ {r['target']:g}" if r["target"] != 1 else "1.00"
        what = "" if r["what"] == previous else r["what"]
        print(f"{what:38}{r['how']:29}{middle:>7} {r['unit']:2} {low:>7}…{high:<7} {target:>8}")
        previous = r["what"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, help="write the table as JSON, too")
    parser.add_argument("--only", choices=["gpt2", "chain"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = {"python": platform.python_version(), "torch": torch.__version__, "nicehooks": nicehooks.__version__}
    about |= {"machine": platform.processor() or platform.machine(), "rounds": options.rounds, "threads": 1}
    print(" · ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for group, build, rows_of in [("gpt2", gpt2, gpt2_rows), ("chain", chain, chain_rows)]:
        if options.only in (None, group):
            model, x = build()
            twin = build()[0]  # stays as it is
            untouched = Row("bare", "a twin, never entered", lambda _, x, twin=twin: bare(twin, x))
            rows = [Row("bare", "again: the noise that is left", bare), untouched, *rows_of(model, x)]
            samples, milliseconds = measure(rows, model, x, options.rounds)
            records = summarised(group, rows, samples)
            show(f"{group}: {len(modules_that_run(model, x))} modules run, {milliseconds:.3f} ms bare", records)
            results += records
    if options.out is not None:
        options.out.write_text(json.dumps(about | {"rows": results}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
