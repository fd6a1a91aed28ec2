"""A folder that was made once is kept on disk: whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LIST = "whole.json"
"""The file that is written last, and says how long each of the others is, and its checksum."""

BLOCK = 1 << 22
"""How many bytes of a file are read at once."""

ABANDONED = 24 * 3600.0
"""After how many seconds a folder that nobody has finished is nobody's."""


def is_whole(folder: Path) -> bool:
    """Whether every file of a kept folder is there as it was written, to the bit.

    >>> is_whole(Path("nowhere"))
    False
    """
    try:
        listed = json.loads((folder / LIST).read_text())
        return bool(listed) and all(_entry(folder / name) == entry for name, entry in listed.items())
    except (OSError, ValueError, AttributeError):  # not there, not to be read, no list, a list of something else
        return False


def keep(folder: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a folder beside `folder`, and gives it that name when all is on disk.

    Whoever looks for `folder` finds nothing or a whole one, however many processes keep it at once and wherever one of
    them is killed. What stands there and is not whole is replaced.

    >>> keep(Path("kept"), lambda new: (new / "a.txt").write_text("a"))
    >>> is_whole(Path("kept")), sorted(os.listdir("kept"))
    (True, ['a.txt', 'whole.json'])

    Args:
        folder: where it will be.
        write: is called with an empty folder, and puts files into it.

    Raises:
        OSError: the disk is full, or not to be written on.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep_out(folder)
    new = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        write(new)
        files = sorted(path for path in new.iterdir())
        (new / LIST).write_text(json.dumps({path.name: _entry(path) for path in files}))
        for path in [*files, new / LIST]:
            _to_disk(path)
        _take_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _take_place(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`, which one of several that do so at once succeeds in."""
    if folder.exists() and not is_whole(folder):
        broken = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
        with suppress(FileNotFoundError):  # another has just done so
            folder.rename(broken / "broken")
        shutil.rmtree(broken, ignore_errors=True)
    try:
        new.rename(folder)
    except OSError:  # another was quicker
        if not folder.exists():
            raise


def _sweep_out(folder: Path) -> None:
    """Removes what killed processes have left unfinished."""
    for path in folder.parent.glob(f"{_prefix(folder)}*"):
        with suppress(FileNotFoundError):  # its owner has just finished with it
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".{folder.name}."


def _entry(path: Path) -> list[int]:
    """The length and the checksum of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
        return [file.tell(), checksum]


def _to_disk(path: Path) -> None:
    """Waits until a file would survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
