"""One peer in the environment that runs this: its answers compared, then each of its ways on the clock.

    python benchmarks/peers/measure.py NAME MODEL FOLDER OUT.json [--rounds 100]

`run.py` calls it, once for each peer and model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
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
LONG = 1.0  # seconds from which on a call needs no other before it to be warm
IDLE = "idle\nthe model that the peer was given"


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


def compared(ways: jobs.Ways, answers: dict[str, Any], all_of_them: bool) -> tuple[jobs.Ways, list[dict[str, Any]]]:
    """The ways that give the answer, and a record of each: how far it is off, or what was raised.

    On the larger models the first way that gives the answer is enough.
    """
    right: dict[str, dict[str, jobs.Way]] = {}
    records: list[dict[str, Any]] = []
    for job, some in ways.items():
        for how, way in some.items():
            record: dict[str, Any] = {"job": job, "how": how}
            try:
                answer = way()
                record["off"] = jobs.off(job, answers[job], answer)
                record |= {"values": len(answer)} if job == jobs.ALL else {}
            except Exception as error:
                record["raised"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            records.append(record)
            if record.get("off", 1.0) <= SAME:
                right.setdefault(job, {})[how] = way
                if not all_of_them:
                    break
    return right, records


def timed(ways: dict[str, jobs.Way], bases: dict[str, jobs.Way], rounds: int, budget: float) -> dict[str, list[float]]:
    """The samples of each way, each over a bare call of the same turn; turns and what is in them in random order.

    A way that takes long has its turn in a part of the rounds, always in the first. The collector of garbage is off
    while the clock runs.

    Args:
        ways: by job and name, in two lines.
        bases: for each of them what it is over.
        rounds: how often a way has its turn, at most.
        budget: seconds for one way in all of its rounds, about.
    """
    every = {how: max(1, round(_warm_seconds(way) * rounds / budget)) for how, way in ways.items()}
    samples: dict[str, list[float]] = {how: [] for how in ways}
    gc.freeze()
    gc.disable()
    for number in range(rounds):
        for how in random.sample(list(ways), len(ways)):
            if number % every[how] == 0:
                samples[how].append(_ratio(ways[how], bases[how]))
        gc.collect()
    gc.enable()
    return samples


def _warm_seconds(way: jobs.Way) -> float:
    first = seconds(way)
    return first if first > LONG else max(first, seconds(way))


def _ratio(way: jobs.Way, base: jobs.Way) -> float:
    """The time of a way over that of what stands beside it, one after the other in random order, both warm."""
    found: list[float] = [0.0, 0.0]
    for which in random.sample((0, 1), 2):
        work = (way, base)[which]
        first = seconds(work)
        found[which] = first if first > LONG and which == 0 else seconds(work)
    return found[0] / found[1]


def bare_seconds(bare: jobs.Way, budget: float) -> float:
    """The median of a bare call."""
    first = max(seconds(bare), 1e-6)
    return statistics.median(seconds(bare) for _ in range(max(3, min(200, int(budget / first)))))


def one(name: str, key: str, folder: Path, rounds: int) -> dict[str, Any]:
    """All that there is to say of one peer on one model."""
    of, facts = jobs.MODELS[key], torch.load(folder / "facts.pt")
    untouched, ids, answers = jobs.load(folder), facts["ids"], facts["answers"]

    def bare() -> Any:
        return untouched(ids)

    bare_seconds(bare, 0.3)
    alone, before = megabytes(), bare_seconds(bare, of.seconds / 3)

    peer: Any = importlib.import_module(f"with_{name}")
    imported = megabytes()
    job = jobs.job_of(key, folder, jobs.load(folder), facts)
    given, pristine = megabytes(), jobs.marks(job.model)
    right, records = compared(peer.ways(job), answers, all_of_them=key == "small")
    used = megabytes()
    flat = {f"{work}\n{how}": way for work, some in right.items() for how, way in some.items()}
    idle = _logits_of(job.model, ids)
    flat |= {IDLE: lambda: job.model(ids)} if idle is not None else {}
    generating = functools.partial(untouched.generate, ids, **job.generation)
    bases: dict[str, jobs.Way] = {how: generating if how.startswith(f"{jobs.STEER}\n") else bare for how in flat}
    samples = timed(flat, bases, rounds, of.seconds)
    after = bare_seconds(bare, of.seconds / 3)

    for record in records:
        found = samples.get(f"{record['job']}\n{record['how']}")
        record |= spread(found) if found else {}
    left = jobs.marks(job.model)
    return {
        "name": name,
        "model": key,
        "date": datetime.date.today().isoformat(),
        "versions": {package: version_of(package) for package in ("torch", "transformers", *peer.PACKAGES)},
        "python": platform.python_version(),
        "records": records,
        "lacks": peer.LACKS,
        "import": spread(import_seconds(peer.IMPORTED)) if peer.IMPORTED and key == "small" else None,
        "idle": spread(samples[IDLE]) if idle is not None else None,
        "idle_off": None if idle is None else jobs.apart(answers["logits"], idle),
        "changed": sum(1 for path in pristine if left.get(path) != pristine[path]),
        "modules": len(pristine),
        "bystander": after / before,
        "bare": before,
        "memory": {"bare": alone, "imported": imported - alone, "used": used - given},
    }


def _logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """What the model that the peer was given says now; None where it cannot be called any more."""
    try:
        return model(ids).logits
    except Exception:
        return None


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "this checkout"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("model", choices=list(jobs.MODELS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, help="how often each way has its turn, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(io.StringIO()):  # bars of progress, one for each sweep
        rounds = options.rounds or jobs.MODELS[options.model].rounds
        found = one(options.name, options.model, options.folder, rounds)
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
