"""Where the files of a store are: in a local directory, or at any address that `fsspec` knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from nicehooks.caches.arguments import BadArgument
from nicehooks.errors import FileFault, FileMissing
from nicehooks.extras import needs

UNFINISHED = ".unfinished"
"""The end of the name of a file that is being written."""


class Address(Protocol):
    """A directory with files in it."""

    is_local: bool

    def names(self) -> dict[str, int]:
        """The files that are there, with their sizes; none where there is no such directory."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Some bytes of a file, or all of them."""
        ...

    def write(self, name: str, pieces: Iterable[bytes | memoryview], head: Callable[[], bytes] = bytes) -> str:
        """Writes a file, under a name by which nobody looks for it; `publish` gives it its own.

        Args:
            name: of the file.
            pieces: what is in it.
            head: what stands before them, which may depend on what they were: it is asked before, for its length, and
                again when all of them have been given.
        """
        ...

    def publish(self, unfinished: str, name: str) -> None:
        """Puts what `write` has written in its place, at once."""
        ...

    def remove(self, name: str) -> None:
        """Takes a file away."""
        ...

    def full(self, name: str) -> str:
        """A file as messages name it."""
        ...


def address(where: Any) -> Address:
    """The directory `where`: a path, or an address such as `"s3://bucket/store"`.

    Raises:
        BadArgument: it is neither, or nothing here knows such addresses.
    """
    if not isinstance(where, str | os.PathLike) or not os.fspath(where):
        raise BadArgument(f"{where!r} is no place for a store: it is a directory, or an address such as 's3://bucket'")
    return _Remote(str(where)) if "://" in str(where) else _Local(Path(where))


def put(there: Address, name: str, pieces: Iterable[bytes | memoryview], by: str = "") -> None:
    """Writes a file, and shows it only when it is whole.

    Args:
        there: where.
        name: of the file.
        pieces: what is in it.
        by: whose it is while it is unfinished: the first part of its name then.
    """
    try:
        there.publish(there.write(f"{by}{name}", pieces), name)
    except OSError as error:
        raise FileFault(f"{there.full(name)!r} cannot be written: {error}") from None


class _Local:
    """A directory of this machine."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> dict[str, int]:
        found: dict[str, int] = {}
        try:
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # another process has just published it, under its own name
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise FileFault(f"{str(self.folder)!r} cannot be read: {error}") from None
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            with open(self.folder / name, "rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        except FileNotFoundError:
            raise FileMissing(f"there is no file {self.full(name)!r}.") from None
        except OSError as error:
            raise FileFault(f"{self.full(name)!r} cannot be read: {error}") from None

    def write(self, name: str, pieces: Iterable[bytes | memoryview], head: Callable[[], bytes] = bytes) -> str:
        unfinished = f"{name}.{uuid4().hex[:8]}{UNFINISHED}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.folder / unfinished, "wb", buffering=0) as file:
                _write_all(file, head())
                for piece in pieces:
                    _write_all(file, piece)
                file.seek(0)
                _write_all(file, head())
        except BaseException:
            (self.folder / unfinished).unlink(missing_ok=True)
            raise
        return unfinished

    def publish(self, unfinished: str, name: str) -> None:
        os.replace(self.folder / unfinished, self.folder / name)

    def remove(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise FileFault(f"{self.full(name)!r} cannot be removed: {error}") from None

    def full(self, name: str) -> str:
        return str(self.folder / name)


def _write_all(file: Any, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) :]


class _Remote:
    """An address of `fsspec`. A file appears there when it is whole, as is the rule where such addresses lead."""

    is_local = False

    def __init__(self, where: str) -> None:
        with needs("harvest"):
            import fsspec
        try:
            system, folder = fsspec.core.url_to_fs(where)
        except (ImportError, ValueError) as error:  # a package that is not there, a protocol that nobody knows
            raise BadArgument(f"{where!r} is no place for a store: {error}") from None
        self.system: Any = system
        self.where = where.rstrip("/")
        self.folder = folder.rstrip("/")
        self.waiting: dict[str, bytes] = {}

    def names(self) -> dict[str, int]:
        self.system.invalidate_cache(self.folder)
        if not self.system.isdir(self.folder):
            return {}
        entries = self.system.ls(self.folder, detail=True)
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            return self.system.cat_file(f"{self.folder}/{name}", start=start or None, end=stop)
        except FileNotFoundError:
            raise FileMissing(f"there is no file {self.full(name)!r}.") from None
        except OSError as error:
            raise FileFault(f"{self.full(name)!r} cannot be read: {error}") from None

    def write(self, name: str, pieces: Iterable[bytes | memoryview], head: Callable[[], bytes] = bytes) -> str:
        content = b"".join(pieces)
        self.waiting[name] = head() + content
        return name

    def publish(self, unfinished: str, name: str) -> None:
        self.system.makedirs(self.folder, exist_ok=True)
        self.system.pipe_file(f"{self.folder}/{name}", self.waiting.pop(unfinished))

    def remove(self, name: str) -> None:
        if self.system.exists(f"{self.folder}/{name}"):
            self.system.rm_file(f"{self.folder}/{name}")

    def full(self, name: str) -> str:
        return f"{self.where}/{name}"
