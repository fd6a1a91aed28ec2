"""The shards of a store as one long tensor for each column, of which any rows can be had."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import FileFault, FileMissing
from nicehooks.harvesting.addresses import Address
from nicehooks.harvesting.manifest import ShardRecord
from nicehooks.harvesting.shards import SAME_SIZE, Header, ShardColumn, as_rows, checksum_of, mapped
from nicehooks.harvesting.writing import header_of

OPEN = 4096
"""How many shards are open at most: a system maps only so many files into one process."""


class ShardFiles:
    """The files of a store, opened when they are looked at.

    Args:
        there: where they are.
        records: the shards, in the order of the rows.
        columns: what they hold, by the names of their tensors.
    """

    def __init__(self, there: Address, records: Sequence[ShardRecord], columns: dict[str, ShardColumn]) -> None:
        self.there = there
        self.records = list(records)
        self.columns = columns
        self.starts = [0, *accumulate(record.rows for record in self.records)]
        self._sizes = there.names()
        self._open: OrderedDict[int, Any] = OrderedDict()

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return self.starts[-1]

    def part(self, name: str, first: int, stop: int) -> Tensor:
        """Rows that follow each other; not copied, where they are in one local file."""
        pieces: list[Tensor] = []
        while first < stop:
            number = bisect_right(self.starts, first) - 1
            start, end = self.starts[number], min(stop, self.starts[number + 1])
            pieces.append(self._some(number, name, first - start, end - start))
            first = end
        if not pieces:
            column = self.columns[name]
            return torch.empty((0, *column.shape), dtype=column.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gather(self, names: Sequence[str], rows: Tensor) -> list[Tensor]:
        """Any rows of some columns, in the order in which they are asked for."""
        sorted_rows, order = rows.sort()
        found = [self._empty(name, len(rows)) for name in names]
        shards = torch.searchsorted(torch.tensor(self.starts), sorted_rows, right=True) - 1
        touched, counts = torch.unique_consecutive(shards, return_counts=True)
        at = 0
        for number, count in zip(touched.tolist(), counts.tolist(), strict=True):
            local = sorted_rows[at : at + count] - self.starts[number]
            for name, into in zip(names, found, strict=True):
                self._pick(number, name, local, into[at : at + count])
            at += count
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return [
            into.index_select(0, back).view(self.columns[name].dtype) for name, into in zip(names, found, strict=True)
        ]

    def _empty(self, name: str, rows: int) -> Tensor:
        column = self.columns[name]
        return torch.empty((rows, *column.shape), dtype=SAME_SIZE[column.dtype.itemsize])

    def _pick(self, number: int, name: str, local: Tensor, into: Tensor) -> None:
        """Reads some rows of one shard, which are in order, as plain numbers of their size."""
        opened = self._opened(number)
        if not isinstance(opened, Header):
            torch.index_select(opened[name].view(into.dtype), 0, local, out=into)
            return
        ends = (local[1:] - local[:-1] != 1).nonzero().squeeze(1).add(1).tolist()
        for first, stop in zip([0, *ends], [*ends, len(local)], strict=True):
            some = self._some(number, name, int(local[first]), int(local[stop - 1]) + 1)
            into[first:stop] = some.view(into.dtype)

    def _some(self, number: int, name: str, first: int, stop: int) -> Tensor:
        opened = self._opened(number)
        if not isinstance(opened, Header):
            return opened[name][first:stop]
        place = opened.places[name]
        content = bytearray(self.there.read(self.records[number].file, *place.of_rows(first, stop)))
        return as_rows(torch.frombuffer(content, dtype=torch.uint8), place.column, stop - first)

    def _opened(self, number: int) -> Any:
        """The tensors of a local shard, the head of a remote one."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        record = self.records[number]
        header = self._header(record)
        self._open[number] = mapped(self.there.full(record.file), header) if self.there.is_local else header
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return self._open[number]

    def _header(self, record: ShardRecord) -> Header:
        if record.file not in self._sizes:
            raise FileMissing(f"{self.there.full(record.file)!r}, a shard of the store, is not there any more.")
        header: Header = header_of(self.there, record.file, self._sizes[record.file])
        wanted = {name: (column, record.rows) for name, column in self.columns.items()}
        checksum = header.metadata.get("checksum", record.checksum)  # those of Ray say it otherwise
        if {name: place[:2] for name, place in header.places.items()} != wanted or checksum != record.checksum:
            raise FileFault(f"{self.there.full(record.file)!r} is not the shard that the manifest of the store means.")
        return header

    def check(self) -> None:
        """Reads everything, and compares the checksums.

        Raises:
            FileFault: a shard is damaged.
        """
        for number, record in enumerate(self.records):
            start, stop = self.starts[number], self.starts[number + 1]
            found = checksum_of(
                {name: self.part(name, start, stop).contiguous() for name in self._header(record).places}
            )
            if found != record.checksum:
                raise FileFault(CHANGED.format(file=self.there.full(record.file), found=found, said=record.checksum))


CHANGED = """\
{file!r} is damaged: the checksum of its tensors is {found}, and was {said} when it was written.
  Remove it and the shards after it: harvest(…, resume=True) then goes on where it began."""
