"""Every peer in an environment of its own, one after the other, and the page that says what came out.

    python benchmarks/peers/run.py                        # all of them, and README.md beside this file
    python benchmarks/peers/run.py --only nnsight hooks   # some of them; the page keeps the others as they were
    python benchmarks/peers/run.py --lock                 # the newest releases first, into locks/

The environments are in .venv-peers, what was measured in build/peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import page

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS, BUILD = ROOT / ".venv-peers", ROOT / "build" / "peers"
LOCKS = HERE / "locks"
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


def measured(name: str, python: Path, rounds: int) -> dict[str, Any]:
    """One peer, by measure.py, in its own process."""
    out = BUILD / f"{name}.json"
    print(f"Measuring {name}", flush=True)
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    known = {"PYTHONPATH": str(ROOT)} if PEERS[name] is None else {}
    command = [str(python), str(HERE / "measure.py"), name, str(BUILD / "model"), str(out), "--rounds", str(rounds)]
    subprocess.run(command, check=True, env=os.environ | one_thread | known, cwd=BUILD)
    return json.loads(out.read_text())


def machine() -> str:
    """What it ran on, in a line."""
    cores = os.cpu_count()
    return f"{platform.system()}, {platform.machine()}, {cores} cores; one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[], choices=list(PEERS), metavar="NAME")
    parser.add_argument("--lock", action="store_true", help="install the newest releases, and write the locks anew")
    options = parser.parse_args()
    wanted = options.only or list(PEERS)
    BUILD.mkdir(parents=True, exist_ok=True)
    LOCKS.mkdir(exist_ok=True)
    if not (BUILD / "model").exists():
        code = "import sys, pathlib, jobs; jobs.make(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(BUILD / "model")], check=True, cwd=HERE)
    for name in wanted:
        try:
            measured(name, interpreter(name, options.lock), options.rounds)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
    there = [json.loads((BUILD / f"{name}.json").read_text()) for name in PEERS if (BUILD / f"{name}.json").exists()]
    (HERE / "README.md").write_text(page.page(there, machine()))
    missing = [name for name in PEERS if name not in {each["name"] for each in there}]
    sys.exit(f"Not measured: {', '.join(missing)}" if missing else 0)


if __name__ == "__main__":
    main()
