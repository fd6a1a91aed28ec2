"""What an intervention costs, in the words that users write, beside the same by hand in one interleaved run.

    python benchmarks/overhead.py [--rounds 200] [--out overhead.json] [--only WORD …]

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workloads
from torch import Tensor, nn
from workloads import BLOCKS, Context, Work

from nicehooks import capture, patch

cpu = time.perf_counter if sys.platform == "win32" else time.thread_time
"""What this thread has run, not what it has waited for the processor; Windows counts that too coarsely."""
WARM = 2  # calls before each timed one, for every way alike
MEAN_OF = 20  # how often something of microseconds is done for one sample
Sample = Callable[[], float]


class Row(NamedTuple):
    """One line of the table, or several: ways to do one thing, each over the same base.

    Attributes:
        what: the thing.
        base: what all ways are divided by; None where the figure is in seconds.
        ways: a sample of each way, in seconds; the last one is nicehooks.
        target: what the last way should reach.
        every: in how many rounds once; for what takes long.
    """

    what: str
    base: Sample | None
    ways: dict[str, Sample]
    target: float
    every: int = 1


# --- the measures, each one sample in seconds ---


def once(work: Work, clock: Callable[[], float] = cpu) -> Sample:
    """`work`, after it was done `WARM` times off the clock; what it returns is freed off the clock."""

    def sample() -> float:
        for _ in range(WARM):
            work()
        start = clock()
        kept = work()
        end = clock()
        del kept
        return end - start

    return sample


def cold(work: Work, clock: Callable[[], float] = cpu) -> Sample:
    """`work`, once: for what takes long anyway."""

    def sample() -> float:
        start = clock()
        work()
        return clock() - start

    return sample


def many(work: Work) -> Sample:
    """The mean of `MEAN_OF` times `work`."""
    return lambda: cold(lambda: [work() for _ in range(MEAN_OF)])() / MEAN_OF


def end_to_end(context: Context, model: nn.Module, x: Tensor) -> Sample:
    """Enter, one call, leave, after a call of the bare model."""

    def work() -> Any:
        with context() as activations:
            model(x)
        return activations

    def sample() -> float:
        model(x)
        start = cpu()
        activations = work()
        end = cpu()
        del activations  # freed outside the clock, for every way alike
        return end - start

    return sample


def running(context: Context, model: nn.Module, x: Tensor) -> Sample:
    """A call inside; entering and leaving are off the clock, and so are the calls that warm the caches."""

    def sample() -> float:
        with context():
            return once(lambda: model(x))()

    return sample


# --- the rows ---


def model_rows(model: nn.Module, x: Tensor, fresh: float, inside: float) -> Iterator[Row]:
    """Every module of a model by `"**"`: end to end, and running only."""
    raw = functools.partial(workloads.raw_hooks, workloads.modules_that_run(model, x))
    base = once(lambda: model(x))
    for way, measure, target in [("fresh, end to end", end_to_end, fresh), ("running only", running, inside)]:
        ways = {"raw hooks": raw, 'capture(model, "**")': lambda: capture(model, "**")}
        samples = {how: measure(context, model, x) for how, context in ways.items()}
        yield Row(f"every module, {way}", base, samples, target)


def chain_rows() -> Iterator[Row]:
    """401 modules that do next to nothing: what it costs for each."""
    for row in model_rows(*workloads.chain(), fresh=3.5, inside=1.45):
        yield row._replace(what=f"chain: {row.what}")


def gpt2_rows() -> Iterator[Row]:
    """The small GPT-2."""
    model, x = workloads.gpt2()
    base = once(lambda: model(x))
    ways: dict[str, Context] = {
        "raw hooks": lambda: workloads.raw_hooks(workloads.blocks_of(model)),
        f'capture(model, "{BLOCKS}")': lambda: capture(model, BLOCKS),
    }
    samples = {how: end_to_end(context, model, x) for how, context in ways.items()}
    yield Row("12 blocks by path, fresh, end to end", base, samples, 1.06)
    yield from model_rows(model, x, fresh=1.28, inside=1.15)
    value, block = torch.randn(1, workloads.WIDTH), model.get_submodule("transformer.h.6")
    patches: dict[str, Context] = {
        "a raw hook": lambda: workloads.raw_patch(block, (slice(None), -1), value),
        'patch(model, "….h.6[:, -1]", v)': lambda: patch(model, "transformer.h.6[:, -1]", value),
    }
    samples = {how: end_to_end(context, model, x) for how, context in patches.items()}
    yield Row("one patched position, fresh, end to end", base, samples, 1.06)


def grid_rows() -> Iterator[Row]:
    """Activation patching at 12 layers and 16 positions of the small GPT-2."""
    model, x = workloads.gpt2()
    with capture(model, BLOCKS) as acts:
        model(x + 1)
    clean = dict(acts)

    def over(what: str, by_hand: Callable[..., None], ours: Callable[..., None], target: float) -> Row:
        base, sample = (cold(functools.partial(work, model, x, clean)) for work in (by_hand, ours))
        return Row(what, base, {"nicehooks": sample}, target, every=10)

    yield over("12 × 16 patches in a loop", workloads.raw_patch_loop, workloads.patch_loop, 1.05)
    yield over("192 keys in one patch", workloads.raw_patch_rows, workloads.patch_rows, 1.15)


def gradient_rows() -> Iterator[Row]:
    """Gradients of a logit difference at the blocks of the small GPT-2."""
    model, x = workloads.gpt2()
    raw = functools.partial(workloads.raw_hooks, workloads.blocks_of(model))
    base = once(lambda: workloads.gradients(raw, model, x))
    by_path = once(lambda: workloads.gradients(lambda: capture(model, BLOCKS), model, x))
    yield Row("capture, then autograd.grad", base, {"nicehooks": by_path}, 1.06)
    yield Row("grad_at", base, {"nicehooks": once(lambda: workloads.gradients_at(model, x))}, 1.10)


def entering_rows() -> Iterator[Row]:
    """Entering and leaving in large models."""
    few, lots = workloads.flat(40), workloads.flat(4000)

    def entered(model: nn.Module) -> Sample:
        return many(lambda: workloads.enter_leave(lambda: patch(model, "7", 0.0)))

    def in_a_new_model(work: Callable[[nn.Module], None]) -> Sample:
        """Nothing is known of the model yet, which is made off the clock."""
        return lambda: cold(functools.partial(work, workloads.branches(5000)))()

    def by_hand(forest: nn.Module) -> None:
        middle = {name: branch.get_submodule("b") for name, branch in forest.named_children()}
        workloads.enter_leave(lambda: workloads.raw_hooks(middle))

    def by_path(forest: nn.Module) -> None:
        workloads.enter_leave(lambda: capture(forest, "{0..4999}.b"))

    ways = {"raw hooks": in_a_new_model(by_hand), "nicehooks": in_a_new_model(by_path)}
    yield Row("one name in 4,000 modules over 40", entered(few), {"nicehooks": entered(lots)}, 2.0)
    yield Row("{0..4999}.b in 20,000 modules", None, ways, 1.0, every=20)


def command_rows() -> Iterator[Row]:
    """Starting the command, on the clock of the wall."""
    commands = {"python -c pass": ["-c", "pass"], "nicehooks --help": ["-m", "nicehooks.cli.command", "--help"]}
    ways = {how: cold(workloads.command(*given), time.perf_counter) for how, given in commands.items()}
    yield Row("nicehooks --help", None, ways, 0.5, every=20)


def all_rows(words: list[str]) -> list[Row]:
    """The rows that hold one of `words`; all of them if there is none."""
    groups = [gpt2_rows, chain_rows, grid_rows, gradient_rows, entering_rows, command_rows]
    rows = [row for group in groups for row in group()]
    return [row for row in rows if not words or any(word in row.what for word in words)]


# --- running them ---


@torch.no_grad()
def measure(rows: list[Row], rounds: int) -> list[dict[str, list[float]]]:
    """The samples of each way of each row, as ratios, or in seconds where there is no base.

    Every row has its turn once a round, in a new random order each round, and in it the base and the ways, likewise;
    each way is divided by the base of the same turn. So a neighbour that slows the machine down slows down both.
    """
    samples: list[dict[str, list[float]]] = [{how: [] for how in row.ways} for row in rows]
    gc.freeze()
    gc.disable()  # as timeit does, for every way alike
    with workloads.not_called():
        for number in range(rounds):
            for i in random.sample(range(len(rows)), len(rows)):
                if number % rows[i].every == 0:
                    for how, value in turn(rows[i]).items():
                        samples[i][how].append(value)
            gc.collect()
    gc.enable()
    return samples


def turn(row: Row) -> dict[str, float]:
    """One sample of each way, over that of the base."""
    everything = [*row.ways.items(), *([] if row.base is None else [("", row.base)])]
    seconds = {how: sample() for how, sample in random.sample(everything, len(everything))}
    return {how: seconds[how] / seconds.get("", 1.0) for how in row.ways}


def records_of(rows: list[Row], samples: list[dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """Medians and quartiles over the rounds; only the last way, which is nicehooks, is asked for anything."""
    for row, ways in zip(rows, samples, strict=True):
        for how, found in ways.items():
            low, middle, high = statistics.quantiles(found * 2 if len(found) == 1 else found, n=4)
            record = {"what": row.what, "how": how, "unit": "s" if row.base is None else "×", "got": middle}
            yield record | {"quartiles": [low, high], "asked": row.target if how == list(ways)[-1] else None}


def show(records: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'':42}{'':34}{'asked':>7} {'got':>8}     quartiles")
    previous = None
    for r in records:
        what = "" if r["what"] == previous else r["what"]
        asked = "" if r["asked"] is None else f"≤ {r['asked']:g}"
        low, high = r["quartiles"]
        print(f"{what:42}{r['how']:34}{asked:>7} {r['got']:>8.3f} {r['unit']} {low:>7.3f}…{high:.3f}")
        previous = r["what"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the table as JSON, too")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="rows that hold one of these words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = {"python": platform.python_version(), "torch": torch.__version__}
    about |= {"machine": platform.processor() or platform.machine(), "rounds": options.rounds, "threads": 1}
    print(" · ".join(f"{key} {value}" for key, value in about.items()))
    rows = all_rows(options.only)
    records = list(records_of(rows, measure(rows, options.rounds)))
    show(records)
    if options.out is not None:
        options.out.write_text(json.dumps(about | {"rows": records}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
