"""`on_the_fly`: shuffled rows of activations without a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.arguments import whole_number
from nicehooks.core.selection import Where
from nicehooks.harvesting.inputs import check_stream
from nicehooks.harvesting.parts import part_of
from nicehooks.harvesting.rows import Block, Per, Recipe
from nicehooks.harvesting.shards import picked
from nicehooks.harvesting.stored_rows import StoredRows


def on_the_fly(
    model: nn.Module,
    where: Where,
    batches: Iterable[Any],
    buffer: int = 1 << 16,
    *,
    size: int = 4096,
    seed: int = 0,
    per: Per = "token",
    map: Callable[..., Any] | None = None,
    dtype: torch.dtype | None = None,
    skip_tokens: Sequence[int] = (),
    part: tuple[int, int] = (0, 1),
) -> Iterator[StoredRows]:
    """The batches that a store of `harvest(model, where, batches, …)` would give, shuffled in a buffer in memory.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> rows = on_the_fly(model, "0", [torch.randn(10, 2), torch.randn(10, 2)], buffer=12, size=8, per="example")
    >>> [batch["0"].shape[0] for batch in rows]
    [8, 8, 4]

    The buffer is filled, half of it is given out in a random order, and it is filled again: a row meets those that came
    about as many rows earlier or later as the buffer has. A store can be shuffled as a whole, and read again.

    Args:
        model, where, batches, per, map, dtype, skip_tokens, part: as for `harvest`; it takes one part where it is told.
        buffer: how many rows are in memory.
        size: how many rows a batch has; the last one may have fewer.
        seed: of the order.

    Raises:
        BadArgument, BatchFault, SiteNotFound, TreeMismatch: as `harvest`; what can be said at once is.
    """
    size, room = whole_number(size, "size", 1), whole_number(buffer, "buffer", 1)
    pool = _Pool(max(room, size), torch.Generator().manual_seed(whole_number(seed, "seed", -(1 << 63))))
    recipe = Recipe(model, where, per, map, dtype, skip_tokens)
    recipe.places()  # raises at once, and not with the first batch
    check_stream(batches)
    return _drawn(recipe.blocks(batches, part_of(part)), pool, size)


def _drawn(blocks: Iterable[Block], pool: _Pool, size: int) -> Iterator[StoredRows]:
    for block in blocks:
        for piece in pool.pieces(block):
            if pool.add(piece):
                yield from pool.drained(size, keep=pool.room // 2)
    yield from pool.drained(size, keep=0)


class _Pool:
    """Rows in memory."""

    def __init__(self, room: int, random: torch.Generator) -> None:
        self.room = room
        self.random = random
        self.columns: dict[str, Tensor] = {}
        self.origin: dict[str, Tensor] = {}
        self.filled = 0

    def pieces(self, block: Block) -> Iterator[Block]:
        """The rows of a block, never more at once than there is room for."""
        count = len(block.origin["sample"]) if block.origin else 0
        at = 0
        while at < count:
            more = slice(at, min(count, at + self.room - self.filled))
            yield Block(_cut_to(block.columns, more), _cut_to(block.origin, more), block.progress)
            at = more.stop

    def add(self, block: Block) -> bool:
        """Takes rows; says whether the pool is full."""
        count = len(block.origin["sample"])
        for mine, theirs in ((self.columns, block.columns), (self.origin, block.origin)):
            for name, value in theirs.items():
                if name not in mine:
                    mine[name] = torch.empty((self.room, *value.shape[1:]), dtype=value.dtype)
                mine[name][self.filled : self.filled + count].copy_(value)
        self.filled += count
        return self.filled == self.room

    def drained(self, size: int, keep: int) -> Iterator[StoredRows]:
        """Batches of random rows, until at most `keep` are left, in full batches as long as any are to stay."""
        order = torch.randperm(self.filled, generator=self.random)
        out = self.filled - keep if keep == 0 else max(size, (self.filled - keep) // size * size)
        for first in range(0, out, size):
            index = order[first : min(first + size, out)]
            yield StoredRows.of(_rows_at(self.columns, index), _rows_at(self.origin, index))
        left = order[out:]
        for group in (self.columns, self.origin):
            for value in group.values():
                value[: len(left)] = picked(value, left)
        self.filled = len(left)


def _cut_to(tensors: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: value[part] for name, value in tensors.items()}


def _rows_at(tensors: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: picked(value, index) for name, value in tensors.items()}
