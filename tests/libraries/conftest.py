"""These tests need packages that no other test does; `make test-libraries` has them, in an environment of its own."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("peft", "bitsandbytes", "torchao", "tensordict")

collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]
