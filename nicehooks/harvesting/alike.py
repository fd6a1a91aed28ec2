"""That all rows of a stream are alike: the same places, each with values of one shape and one dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nicehooks.errors import TreeMismatch
from nicehooks.harvesting.shards import ShardColumn

if TYPE_CHECKING:
    from nicehooks.harvesting.rows import Block


class Alike:
    """What a row of a stream is: the same for every batch, or rows of another shape would be spread over its own."""

    def __init__(self) -> None:
        self.first: tuple[dict[str, ShardColumn], ...] | None = None

    def checked(self, number: int, block: Block) -> Block:
        """`block`, the rows of batch `number`.

        Raises:
            TreeMismatch: its rows are not what those before it are.
        """
        if not block.origin:
            return block
        groups = (block.columns, block.origin)
        now = tuple([{name: ShardColumn.of(rows) for name, rows in group.items()} for group in groups])
        self.first = self.first or now
        if now != self.first:
            before, here = ({**one[0], **one[1]} for one in (self.first, now))
            unlike = [name for name in {**before, **here} if before.get(name) != here.get(name)]
            raise TreeMismatch(
                UNLIKE.format(number=number, here=_columns_shown(here, unlike), before=_columns_shown(before, unlike))
            )
        return block


def _columns_shown(columns: dict[str, ShardColumn], names: list[str]) -> str:
    found = {name: columns[name] for name in names if name in columns}
    return ", ".join(f"{name} {list(c.shape)} {str(c.dtype)[6:]}" for name, c in found.items()) or "nothing"


UNLIKE = """\
the rows of batch {number} are not what those before it are.
  before:  {before}
  now:     {here}
  All rows are alike: of texts of different lengths take one row for each token, or reduce each text to one by map=.
    harvest(…, per="example", map=lambda value: value.mean(1))"""
