"""The lock: it has one version for each package that is asked for, and pyproject.toml allows that version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}


def asked_for() -> Iterator[Requirement]:
    """What pyproject.toml asks for, extras included, and what the Makefile adds to it."""
    makefile = (ROOT / "Makefile").read_text()
    added = re.findall(r"^(?:BUILD|\w+_MODELS) := (.*)$", makefile, re.MULTILINE)
    pinned = re.findall(r"^\w.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    wanted = [*(requires("nicehooks") or []), *" ".join(added).split(), *pinned]
    yield from (wish for wish in map(Requirement, wanted) if wish.name != "nicehooks")


@pytest.mark.parametrize("wish", sorted({str(wish).split(";")[0] for wish in asked_for()}))
def test_what_is_asked_for_has_a_version_that_is_allowed(wish: str) -> None:
    """Where not: `make lock`."""
    requirement = Requirement(wish)
    assert LOCKED[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lock_serves_every_machine() -> None:
    """Plain versions, each once: no local part, hash, address or path."""
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(LOCKED) == len(LINES)
    assert "nicehooks" not in LOCKED


@pytest.mark.parametrize("peer", sorted((ROOT / "benchmarks" / "peers").glob("with_*.py")), ids=lambda path: path.stem)
def test_each_peer_is_measured_with_the_same_torch(peer: Path) -> None:
    """From a lock of its own, but for those that run in the environment of this checkout."""
    lock = ROOT / "benchmarks" / "peers" / "locks" / f"{peer.stem.removeprefix('with_')}.txt"
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)$", lock.read_text(), re.MULTILINE)) if lock.exists() else LOCKED
    assert lock.exists() or peer.stem in ("with_hooks", "with_nicehooks")
    for package in ("torch", "transformers", "safetensors"):
        assert locked[package] == LOCKED[package]
