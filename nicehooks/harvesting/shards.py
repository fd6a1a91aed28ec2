"""A shard: tensors with as many rows each, in one safetensors file, written in one go and mapped when it is read.

The format is simple enough to be written here: so the checksum is taken of the very bytes that are written, a shard
goes to any file system, rows are found in it without reading the rest, and none of it needs a package.
"""

from __future__ import annotations

import ctypes
import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import FileFault

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that safetensors gives to dtypes."""

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes that every operation knows, by their bytes: rows are copied as these, whatever they are."""


class ShardColumn(NamedTuple):
    """What each row of one tensor of a shard is like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor) -> ShardColumn:
        """What each of `rows` is like."""
        return cls(rows.dtype, tuple(rows.shape[1:]))

    @property
    def nbytes(self) -> int:
        """The bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Span(NamedTuple):
    """Where one tensor stands in a file, counted from its first byte."""

    column: ShardColumn
    rows: int
    start: int

    def of_rows(self, first: int, stop: int) -> tuple[int, int]:
        """The first byte of some rows, and the one behind them."""
        return self.start + first * self.column.nbytes, self.start + stop * self.column.nbytes


class Header(NamedTuple):
    """What the head of a shard says: where its tensors are, its metadata, and how long the file is."""

    places: dict[str, Span]
    metadata: dict[str, str]
    size: int


# --- writing ----------------------------------------------------------------------------------------------------------


class Body:
    """The bytes of some tensors in the order of a file, in pieces; and the CRC-32 of those given so far."""

    AT_ONCE = 1 << 18
    """How many bytes a piece has: it is still in a cache of the processor when it is written."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._found = 0

    @property
    def checksum(self) -> str:
        """Of the pieces that were given."""
        return f"{self._found:08x}"

    def __iter__(self) -> Iterator[memoryview]:
        self._found, crc32 = 0, _quickest_crc32()
        for name in in_file_order(self.tensors):
            whole = bytes_of_tensor(self.tensors[name])
            for at in range(0, len(whole), self.AT_ONCE):
                piece = whole[at : at + self.AT_ONCE]
                self._found = crc32(piece, self._found)
                yield piece


@cache
def _quickest_crc32() -> Callable[..., int]:
    """That of ISA-L, where it is installed: several times as fast as that of zlib, which takes half of the writing."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32
    return isal_zlib.crc32


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """The CRC-32 of the bytes of `tensors`."""
    body = Body(tensors)
    deque(body, maxlen=0)
    return body.checksum


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide items first, so that each tensor begins at a multiple of the size of its items."""
    return sorted(tensors, key=lambda name: -tensors[name].element_size())


def head_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What stands in a safetensors file before the bytes of its tensors."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in in_file_order(tensors):
        tensor = tensors[name]
        offsets = [at, at := at + tensor.numel() * tensor.element_size()]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of_tensor(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not copied; it has to outlive the view."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_head(start: bytes, size: int, file: str) -> Header | int:
    """What `start`, the first bytes of `file`, says of it; or how many bytes it takes to say it.

    Raises:
        FileFault: it is no safetensors file, or is shorter than it says.
    """
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length + 8 > size:
        raise FileFault(NO_SHARD.format(file=file, why=f"its head of {length + 8:,} bytes is longer than it"))
    if len(start) < length + 8:
        return length + 8
    try:
        entries = json.loads(start[8 : length + 8])
        metadata = entries.pop("__metadata__", {})
        places = {name: _place_said(entry, length + 8) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFault(NO_SHARD.format(file=file, why=f"its head cannot be read ({type(error).__name__})")) from None
    end = max((place.of_rows(0, place.rows)[1] for place in places.values()), default=length + 8)
    if end != size:
        raise FileFault(TRUNCATED.format(file=file, size=size, end=end))
    return Header(places, metadata, size)


def _place_said(entry: dict[str, object], after: int) -> Span:
    rows, *shape = entry["shape"]  # pyright: ignore
    start, _ = entry["data_offsets"]  # pyright: ignore
    return Span(ShardColumn(BY_NAME[entry["dtype"]], tuple(shape)), int(rows), int(start) + after)  # pyright: ignore


def mapped(file: str, header: Header) -> dict[str, Tensor]:
    """The tensors of a local file, mapped into memory: read when they are looked at, and never written back."""
    storage: Any = torch.UntypedStorage.from_file(file, shared=False, nbytes=header.size)
    everything = torch.empty(0, dtype=torch.uint8).set_(storage)
    return {name: _in_memory(everything, place) for name, place in header.places.items()}


def _in_memory(everything: Tensor, place: Span) -> Tensor:
    start, stop = place.of_rows(0, place.rows)
    return as_rows(everything[start:stop], place.column, place.rows)


def as_rows(content: Tensor, column: ShardColumn, rows: int) -> Tensor:
    """Bytes as the rows that they are."""
    if content.numel() == 0:
        return torch.empty((rows, *column.shape), dtype=column.dtype)
    if content.storage_offset() % column.dtype.itemsize:
        content = content.clone()  # another writer's file, whose tensors stand anywhere
    return content.view(column.dtype).reshape(rows, *column.shape)


def picked(tensor: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a tensor of any dtype, also of one that torch cannot index."""
    return tensor.view(SAME_SIZE[tensor.element_size()]).index_select(0, rows).view(tensor.dtype)


NO_SHARD = "{file!r} is no shard of a store, or is damaged: {why}."

TRUNCATED = """\
{file!r} is damaged: it has {size:,} bytes, and should have {end:,}.
  Remove it and the shards after it: harvest(…, resume=True) then goes on where it began."""
