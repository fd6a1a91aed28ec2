"""Every peer in an environment of its own, one after the other, and the page that says what came out.

    python benchmarks/peers/run.py                        # all of them, and README.md beside this file
    python benchmarks/peers/run.py --only nnsight hooks   # some of them; the page has the others as before
    python benchmarks/peers/run.py --models small         # on one of the models; the page has the others as before
    python benchmarks/peers/run.py --try                  # one round of each, no page: are answers right?
    python benchmarks/peers/run.py --page                 # only the page, from what was measured
    python benchmarks/peers/run.py --lock                 # the newest releases first, into locks/

The environments are in .venv-peers, the models and what was measured in build/peers: a file for each peer and model, so
that a run may be cut short, and go on with `--only` and `--models`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jobs
import moving_over
import page

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS, BUILD = ROOT / ".venv-peers", ROOT / "build" / "peers"
LOCKS = HERE / "locks"
HEADLINES = "headlines"
SHARED = ("torch", "transformers", "safetensors")
"""What all of them measure with, in the versions of requirements.lock."""

PEERS: dict[str, str | None] = {
    "nicehooks": None,
    "hooks": None,
    "interp_engine": "interp-engine",
    "nnsight": "nnsight",
    "transformer_lens": "transformer-lens",
    "tdhook": "tdhook",
    "pyvene": "pyvene",
    "torchlens": "torchlens",
}
"""What each is called by the package index; those without a name run in the environment of this checkout."""


def python_of(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def pip(environment: Path, *arguments: str) -> str:
    """What pip prints."""
    command = [str(python_of(environment)), "-m", "pip", *arguments, "--disable-pip-version-check"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def shared_versions() -> list[str]:
    """The lines of requirements.lock for what all measure with."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in SHARED]


def interpreter(name: str, renew: bool) -> Path:
    """The interpreter for a peer; its environment is made where it is not there, or where the lock is newer."""
    package = PEERS[name]
    if package is None:
        return Path(sys.executable)
    environment, lock = ENVIRONMENTS / name, LOCKS / f"{name}.txt"
    made = environment / "made"
    if not renew and made.exists() and made.stat().st_mtime > lock.stat().st_mtime:
        return python_of(environment)
    print(f"Installing {package} into {environment.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
    if renew:
        pip(environment, "install", "-q", package, *shared_versions())
        found = pip(environment, "freeze", "--all", "--exclude", "pip", "--exclude", "setuptools")
        lines = [line.partition("+")[0] for line in found.splitlines()]
        first = f"# Made by `run.py --lock`: {package}, what it needs, and what all peers measure with."
        lock.write_text("\n".join([first, *lines]) + "\n")
    else:
        pip(environment, "install", "-q", "--no-deps", "-r", str(lock))
    made.touch()
    return python_of(environment)


def run(name: str, python: Path, file: str, *arguments: object) -> None:
    """A file of this folder in the environment of a peer, in a process of its own."""
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    known = {"PYTHONPATH": str(ROOT)} if PEERS.get(name) is None else {}
    command = [str(python), str(HERE / file), *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | one_thread | known, cwd=BUILD)


def folder_of(key: str) -> Path:
    """Where a model is saved, with the answers beside it; they are made anew where jobs.py is newer."""
    folder = BUILD / "models" / key
    facts = folder / "facts.pt"
    if not facts.exists() or facts.stat().st_mtime < (HERE / "jobs.py").stat().st_mtime:
        print(f"Making {jobs.MODELS[key].title}", flush=True)
        run("nicehooks", Path(sys.executable), "jobs.py", key, folder)
    return folder


def out_of(name: str, key: str) -> Path:
    """What is found out about a peer on a model."""
    return BUILD / key / f"{name}.json"


def measured(name: str, python: Path, key: str, only_try: bool) -> None:
    """One peer on one model, by measure.py; to try it leaves nothing behind."""
    out = BUILD / "tried.json" if only_try else out_of(name, key)
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    run(name, python, "measure.py", name, key, folder_of(key), out, *(["--rounds", 1] if only_try else []))
    records = json.loads(out.read_text())["records"]
    wrong = [
        f"{each['job']} by {each['how']}: {each.get('raised', each.get('off'))}" for each in records if not right(each)
    ]
    print(f"{name} on {key}: {time.monotonic() - begun:.0f} s", *wrong, sep="\n  ", flush=True)


def test() -> int:
    """The rows of the pages for who moves over, with nicehooks and then with each of the others."""
    BUILD.mkdir(parents=True, exist_ok=True)
    out, failed = BUILD / "moving_over.pt", 0
    run("nicehooks", Path(sys.executable), "moving_over.py", "ours", out)
    for name in moving_over.PAGES:
        print(f"From {name}", flush=True)
        try:
            run(name, interpreter(name, renew=False), "moving_over.py", name, out)
        except subprocess.CalledProcessError:
            failed = 1
    return failed


def right(record: dict[str, Any]) -> bool:
    """Whether a way was measured, which it is where its answer is right."""
    return "median" in record


def machine() -> str:
    """What it ran on, in a line."""
    cores = os.cpu_count()
    return f"{platform.system()}, {platform.machine()}, {cores} cores; one thread"


def found(key: str) -> list[dict[str, Any]]:
    """What was measured on a model, so far."""
    return [json.loads(out_of(name, key).read_text()) for name in PEERS if out_of(name, key).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=list(PEERS), metavar="NAME")
    parser.add_argument("--models", nargs="*", default=[], choices=[*jobs.MODELS, HEADLINES])
    parser.add_argument("--try", action="store_true", dest="only_try", help="one round of each, and no page")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page")
    parser.add_argument("--lock", action="store_true", help="install the newest releases, and write the locks anew")
    parser.add_argument("--test", action="store_true", help="run the rows of the pages for who moves over instead")
    options = parser.parse_args()
    if options.test:
        sys.exit(test())
    if not options.page:
        measure(
            options.only or list(PEERS), options.models or [*jobs.MODELS, HEADLINES], options.only_try, options.lock
        )
    if options.only_try:
        return
    there = {key: found(key) for key in jobs.MODELS}
    (HERE / "README.md").write_text(page.page(there, found(HEADLINES), machine()))
    missing = [
        f"{name} on {key}" for key in [*jobs.MODELS, HEADLINES] for name in PEERS if not out_of(name, key).exists()
    ]
    sys.exit(f"Not measured: {', '.join(missing)}" if missing else 0)


def measure(names: list[str], keys: list[str], only_try: bool, renew: bool) -> None:
    """Each peer on each model; one that fails is named, and the others go on."""
    BUILD.mkdir(parents=True, exist_ok=True)
    LOCKS.mkdir(exist_ok=True)
    pythons = {name: interpreter(name, renew) for name in names}
    for key in keys:
        for name, python in pythons.items():
            try:
                if key == HEADLINES:
                    tried(name, python)
                else:
                    measured(name, python, key, only_try)
            except subprocess.CalledProcessError as error:
                print(f"{name} on {key}: {error}", file=sys.stderr)


def tried(name: str, python: Path) -> None:
    """One peer, by headlines.py."""
    out_of(name, HEADLINES).parent.mkdir(exist_ok=True)
    print(f"Trying {name} in compiled code, transforms, threads and batches", flush=True)
    run(name, python, "headlines.py", name, folder_of("small"), out_of(name, HEADLINES))


if __name__ == "__main__":
    main()
