"""docs/libraries.md: every row is from tests that are there, and every such test file has a row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "libraries.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")][1:]
TESTS = [row[3].strip("`") for row in ROWS if row[0] != "---"]


def test_each_library_has_a_row() -> None:
    first = " ".join(row[0] for row in ROWS)
    for name in (
        "PEFT",
        "bitsandbytes",
        "torchao",
        "accelerate",
        "`DistributedDataParallel`",
        "FSDP2",
        "tensor parallelism",
        "`nn.DataParallel`",
        "tensordict",
        "nested tensors",
    ):
        assert name in first


def test_each_row_is_from_tests_that_are_there() -> None:
    assert all((ROOT / test).is_file() for test in TESTS)
    heavy = {str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "libraries").glob("test_*.py")}
    assert heavy <= set(TESTS)


def test_the_lock_of_the_heavy_ones_has_what_they_ask_for() -> None:
    wanted = (ROOT / "tests" / "libraries" / "requirements.in").read_text()
    locked = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "tests/libraries/requirements.lock").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\w+$", wanted, re.MULTILINE)) <= set(locked)
    for name, version in re.findall(r"\| (PEFT|bitsandbytes|torchao|tensordict) (\d+\.\d+)", PAGE):
        assert locked[name.lower()].startswith(version + ".")
