"""One peer in the environment that runs this: its answers compared, then each of its ways on the clock.

    python benchmarks/peers/measure.py NAME MODEL OUT.json [--rounds 100]

`run.py` calls it, once for each peer.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jobs
import torch

cpu = time.process_time
"""What this process has run, in all of its threads; not what it has waited for others."""
SAME = 1e-4  # how far an answer may be off, in parts of its largest number
BUDGET = 6.0  # seconds for one way in all of its rounds, about


def megabytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def seconds(work: Callable[[], Any]) -> float:
    """One sample; what `work` returns is freed off the clock."""
    start = cpu()
    kept = work()
    end = cpu()
    del kept
    return end - start


def spread(samples: list[float]) -> dict[str, Any]:
    """The median with the quartiles."""
    low, middle, high = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=4)
    return {"median": middle, "quartiles": [low, high], "samples": len(samples)}


def import_seconds(line: str) -> list[float]:
    """What importing a peer adds to torch and the model's own code, each in a new process, on the clock of the wall."""
    code = (
        "import time, torch; from transformers import GPT2LMHeadModel\n"
        f"start = time.perf_counter(); {line}; print(time.perf_counter() - start)"
    )
    run = [sys.executable, "-W", "ignore", "-c", code]
    return [float(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1]) for _ in range(5)]


def compared(ways: jobs.Ways, answers: jobs.Answers) -> tuple[jobs.Ways, list[dict[str, Any]]]:
    """The ways that give the answer, and a record of each: how far it is off, or what was raised."""
    right: dict[str, dict[str, jobs.Way]] = {}
    records: list[dict[str, Any]] = []
    for job, some in ways.items():
        for how, way in some.items():
            record: dict[str, Any] = {"job": job, "how": how}
            try:
                answer = way()
                record["off"] = answers.off(job, answer)
                record |= {"values": len(answer)} if job == jobs.ALL else {}
            except Exception as error:
                record["raised"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            records.append(record)
            if record.get("off", 1.0) <= SAME:
                right.setdefault(job, {})[how] = way
    return right, records


def timed(ways: dict[str, jobs.Way], base: jobs.Way, rounds: int) -> dict[str, list[float]]:
    """The samples of each way, each over a bare call of the same turn; turns and what is in them in random order.

    A way that takes long has its turn in a part of the rounds. The collector of garbage is off while the clock runs.
    """
    every = {how: max(1, round(max(seconds(way), seconds(way)) * rounds / BUDGET)) for how, way in ways.items()}
    samples: dict[str, list[float]] = {how: [] for how in ways}
    gc.freeze()
    gc.disable()
    for number in range(rounds):
        for how in random.sample(list(ways), len(ways)):
            if number % every[how] == 0:
                both = [(how, ways[how]), ("", base)]
                found: dict[str, float] = {}
                for which, work in random.sample(both, 2):
                    work()  # warm, for every way alike
                    found[which] = seconds(work)
                samples[how].append(found[how] / found[""])
        gc.collect()
    gc.enable()
    return samples


def one(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """All that there is to say of one peer."""
    bare = jobs.load(folder)
    ids = torch.arange(jobs.POSITIONS)[None] * 7 + 3
    clean = jobs.clean_blocks(bare, ids)
    answers = jobs.answers(bare, ids, clean)
    for _ in range(200):
        bare(ids)
    alone, before = megabytes(), statistics.median(seconds(lambda: bare(ids)) for _ in range(200))

    peer: Any = importlib.import_module(f"with_{name}")
    imported = megabytes()
    job = jobs.Job(folder, jobs.load(folder), ids, clean)
    pristine = jobs.marks(job.model)
    right, records = compared(peer.ways(job), answers)
    used = megabytes()
    flat = {f"{work}\n{how}": way for work, some in right.items() for how, way in some.items()}
    idle = _logits_of(job.model, ids)
    flat |= {"idle\nthe model that the peer was given": lambda: job.model(ids)} if idle is not None else {}
    samples = timed(flat, lambda: bare(ids), rounds)
    after = statistics.median(seconds(lambda: bare(ids)) for _ in range(200))

    for record in records:
        found = samples.get(f"{record['job']}\n{record['how']}")
        record |= spread(found) if found else {}
    left = jobs.marks(job.model)
    return {
        "name": name,
        "versions": {package: _version(package) for package in ("torch", "transformers", *peer.PACKAGES)},
        "python": platform.python_version(),
        "records": records,
        "lacks": peer.LACKS,
        "import": spread(import_seconds(peer.IMPORTED)) if peer.IMPORTED else None,
        "idle": spread(samples["idle\nthe model that the peer was given"]) if idle is not None else None,
        "idle_off": None if idle is None else jobs.apart(answers.logits, idle),
        "changed": sum(1 for path in pristine if left.get(path) != pristine[path]),
        "modules": len(pristine),
        "bystander": after / before,
        "bare": before,
        "memory": {"bare": alone, "imported": imported - alone, "used": used - imported},
    }


def _logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """What the model that the peer was given says now; None where it cannot be called any more."""
    try:
        return model(ids).logits
    except Exception:
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "this checkout"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(io.StringIO()):  # bars of progress, one for each sweep
        found = one(options.name, options.model, options.rounds)
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
