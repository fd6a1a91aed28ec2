"""One writer of a store: rows are gathered until a shard is full, and written while the next one fills.

NOTE [A shard is there or it is not]
A shard is written under another name and renamed when it is whole, in the order of the shards. Its metadata says how
far the stream of batches was read when it was full. So whatever the moment of a kill, the shards that are there are
the rows up to some place of the stream, and the last one says which: a resumed harvest reads the same batches from the
first one on, runs the model from that place, and nothing is lost or written twice.
"""

from __future__ import annotations

import errno
import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import FileFault
from nicehooks.harvesting.addresses import UNFINISHED, Address
from nicehooks.harvesting.manifest import Manifest, ShardRecord
from nicehooks.harvesting.rows import Block, Reached
from nicehooks.harvesting.shards import Body, head_of, read_head

ORIGIN = "/"
"""Before the names of what a row says of its origin: no path begins with it."""

FIRST_LOOK = 1 << 16
"""How many bytes are read of a file to find its head; most are smaller."""


class Writer:
    """Writes the shards of one part of a store.

    Args:
        there: where.
        manifest: of the store.
        part: which part.
        shards: those that are there already.
        progress: how far the stream was read for them.
    """

    def __init__(
        self, there: Address, manifest: Manifest, part: int, shards: list[ShardRecord], progress: Reached | None
    ) -> None:
        self.there = there
        self.manifest = manifest
        self.part = part
        self.shards = shards
        self.progress = progress
        self.threads = ThreadPoolExecutor(2)
        self.jobs: list[tuple[Future[ShardRecord], dict[str, Tensor]]] = []
        self.free: list[dict[str, Tensor]] = []
        self.filled = 0
        self.checked = False  # whether a row of this run was seen to be what the manifest says
        self.buffer = self._buffer()

    def add(self, block: Block) -> None:
        """Takes the rows of a batch."""
        given = {**block.columns, **{ORIGIN + name: value for name, value in block.origin.items()}}
        count = len(next(iter(given.values()))) if given else 0
        before = block.progress.rows - count
        at = 0
        while at < count:
            more = min(count - at, self.manifest.shard_rows - self.filled)
            for name, value in given.items():
                self.buffer[name][self.filled : self.filled + more].copy_(value[at : at + more])
            at, self.filled = at + more, self.filled + more
            self.progress = Reached(block.progress.batches, before + at, block.progress.digest)
            if self.filled == self.manifest.shard_rows:
                self._ship()
        self.progress = block.progress

    def close(self) -> list[ShardRecord]:
        """Writes what is left, and waits until everything is there."""
        try:
            if self.filled:
                self._ship()
            while self.jobs:
                self._settle()
        finally:
            self.threads.shutdown(cancel_futures=True)
        return self.shards

    def abandon(self) -> None:
        """Ends without the rows that fill no shard; those that are full are still written."""
        self.filled = 0
        with suppress(FileFault):  # what went wrong first is on its way already
            self.close()

    def _ship(self) -> None:
        """Hands the full buffer to a thread."""
        while len(self.jobs) >= 2:
            self._settle()
        number = len(self.shards) + len(self.jobs)
        rows = {name: tensor[: self.filled] for name, tensor in self.buffer.items()}
        assert self.progress is not None
        before = self.jobs[-1][0] if self.jobs else None
        self.jobs.append((self.threads.submit(self._write, number, rows, self.progress, before), self.buffer))
        self.buffer, self.filled = self._buffer(), 0

    def _settle(self) -> None:
        """Waits for the oldest job."""
        job, buffer = self.jobs.pop(0)
        self.shards.append(job.result())
        self.free.append(buffer)

    def _write(
        self, number: int, rows: dict[str, Tensor], progress: Reached, before: Future[ShardRecord] | None
    ) -> ShardRecord:
        file = shard_name(self.part, number)
        body = Body(rows)
        count = len(next(iter(rows.values())))
        said = {"rows": str(count), "progress": json.dumps(asdict(progress)), "model": self.manifest.fingerprint}
        try:
            unfinished = self.there.write(file, body, lambda: head_of(rows, {"checksum": body.checksum, **said}))
            if before is not None and before.exception() is not None:
                self.there.remove(unfinished)
                raise FileFault(f"{self.there.full(file)!r} was not written: the shard before it was not.")
            self.there.publish(unfinished, file)
        except OSError as error:
            raise error if isinstance(error, FileFault) else self._fault(file, number, error) from None
        return ShardRecord(file, count, body.checksum)

    def _fault(self, file: str, number: int, error: OSError) -> FileFault:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
        size = self.manifest.shard_rows * self.manifest.row_bytes
        return FileFault(NOT_WRITTEN_ROWS.format(file=self.there.full(file), why=why, size=size, number=number))

    def _buffer(self) -> dict[str, Tensor]:
        if self.free:
            return self.free.pop()
        rows = self.manifest.shard_rows
        columns = {**self.manifest.columns, **{ORIGIN + name: c for name, c in self.manifest.origin.items()}}
        return {name: torch.empty((rows, *column.shape), dtype=column.dtype) for name, column in columns.items()}


# --- what is there ----------------------------------------------------------------------------------------------------


def shard_name(part: int, number: int) -> str:
    """The name of a shard."""
    return f"{part:05}-{number:08}.safetensors"


def shards_of(there: Address, part: int) -> list[str]:
    """The shards of a part that are there, up to the first one that is missing."""
    names = there.names()
    found: list[str] = []
    while shard_name(part, len(found)) in names:
        found.append(shard_name(part, len(found)))
    return found


def record_of(there: Address, file: str, size: int) -> tuple[ShardRecord, Reached]:
    """What a shard says of itself, and how far the stream was read for it.

    Raises:
        FileFault: it is damaged.
    """
    header = header_of(there, file, size)
    try:
        said: Any = header.metadata
        return ShardRecord(file, int(said["rows"]), said["checksum"]), Reached(**json.loads(said["progress"]))
    except (KeyError, ValueError, TypeError):
        raise FileFault(f"{there.full(file)!r} is no shard of a store: it does not say how far it goes.") from None


def model_of(there: Address, file: str) -> str | None:
    """The fingerprint of the model whose activations a shard has, if it says so."""
    return header_of(there, file, there.names()[file]).metadata.get("model")


def header_of(there: Address, file: str, size: int) -> Any:
    """The head of a shard."""
    found = read_head(there.read(file, 0, min(size, FIRST_LOOK)), size, there.full(file))
    return read_head(there.read(file, 0, found), size, there.full(file)) if isinstance(found, int) else found


def clean(there: Address, part: int) -> None:
    """Takes away what a killed writer of this part has not finished."""
    for name in there.names():
        if name.endswith(UNFINISHED) and name.startswith((f"{part:05}-", f"{part:05}.")):
            there.remove(name)


def remove_shards(there: Address, part: int, good: int) -> None:
    """Takes away what a writer of this part left behind the shards that count."""
    kept = {shard_name(part, number) for number in range(good)}
    for name in there.names():
        if re.fullmatch(rf"{part:05}-\d+\.safetensors", name) and name not in kept:
            there.remove(name)


NOT_WRITTEN_ROWS = """\
{file!r} ({size:,} bytes) cannot be written: {why}.
  The {number} shards before it are there. Once there is room, harvest(…, resume=True) goes on behind them."""
