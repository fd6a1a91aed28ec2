"""What was converted is kept whole or not at all: whatever is damaged, killed or done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nicehooks.models import keeping
from nicehooks.models.keeping import is_whole, keep


def write(folder: Path, text: str = "abc") -> None:
    (folder / "a.bin").write_text(text)
    (folder / "b.bin").write_text(text * 2)


def test_what_is_kept_is_whole(tmp_path: Path):
    keep(tmp_path / "deep" / "kept", write)
    assert is_whole(tmp_path / "deep" / "kept")
    assert sorted(os.listdir(tmp_path / "deep")) == ["kept"]
    assert (tmp_path / "deep" / "kept" / "b.bin").read_text() == "abcabc"


def shorten(folder: Path) -> None:
    (folder / "a.bin").write_text("ab")


def flip_a_bit(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abb")


def lose_a_file(folder: Path) -> None:
    (folder / "b.bin").unlink()


def lose_the_list(folder: Path) -> None:
    (folder / keeping.LIST).unlink()


def damage_the_list(folder: Path) -> None:
    (folder / keeping.LIST).write_bytes(b"\xff\xfe{")


def empty_the_list(folder: Path) -> None:
    (folder / keeping.LIST).write_text("{}")


def write_another_list(folder: Path) -> None:
    (folder / keeping.LIST).write_text('["a.bin"]')


@pytest.mark.parametrize(
    "damage",
    [shorten, flip_a_bit, lose_a_file, lose_the_list, damage_the_list, empty_the_list, write_another_list],
)
def test_what_is_damaged_is_not_whole_and_is_replaced(tmp_path: Path, damage):
    keep(tmp_path / "kept", write)
    damage(tmp_path / "kept")
    assert not is_whole(tmp_path / "kept")
    keep(tmp_path / "kept", write)
    assert is_whole(tmp_path / "kept")
    assert sorted(os.listdir(tmp_path)) == ["kept"]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path):
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        keep(tmp_path / "kept", fail)
    assert os.listdir(tmp_path) == []


def test_a_process_that_is_killed_while_writing_leaves_nothing_that_looks_whole(tmp_path: Path):
    code = f"""
import os, signal
from pathlib import Path
from nicehooks.models.keeping import keep
def write(folder):
    (folder / "a.bin").write_text("abc")
    os.kill(os.getpid(), signal.SIGKILL)
keep(Path({str(tmp_path)!r}) / "kept", write)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "kept").exists()
    (left,) = tmp_path.iterdir()
    keep(tmp_path / "kept", write)
    assert is_whole(tmp_path / "kept")
    assert left.exists()  # it might be another's who is still at it

    old = time.time() - 2 * keeping.ABANDONED
    os.utime(left, (old, old))
    keep(tmp_path / "kept", write)
    assert sorted(os.listdir(tmp_path)) == ["kept"]


def test_many_may_keep_the_same_at_once(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: keep(tmp_path / "kept", write), range(32)))
    assert is_whole(tmp_path / "kept")
    assert sorted(os.listdir(tmp_path)) == ["kept"]
