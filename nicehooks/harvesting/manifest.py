"""The manifest of a store: what is in it, whose activations they are, and how the files make up the rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nicehooks.errors import FileFault, FileMissing, NiceHooksError
from nicehooks.harvesting.addresses import Address, put
from nicehooks.harvesting.shards import BY_NAME, DTYPES, ShardColumn

NAME = "manifest.json"
FORMAT = "nicehooks activations 1"


class StoreMismatch(NiceHooksError, ValueError):
    """A store was begun with another model, other sites or other settings."""


@dataclass(frozen=True)
class ShardRecord:
    """One file of a store.

    Attributes:
        file: its name.
        rows: how many rows it has.
        checksum: the CRC-32 of its tensors.
    """

    file: str
    rows: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a store says of itself.

    Attributes:
        model: the class of the model.
        fingerprint: of the model's weights.
        data: the fingerprint of the batches, of each part; empty until the store is complete.
        per: what has a row, `"token"` or `"example"`.
        map: the name of the function that reduced the values.
        under: the interventions that were active.
        columns: what each row has, by the path of its place.
        origin: what each row says of where it came from.
        shard_rows: how many rows a full shard has.
        parts: how many writers there are.
        batches: how many batches were read.
        shards: the files, in the order of the rows; all of them once the store is complete.
        complete: whether all batches were read.
        skip_tokens: the tokens that gave no rows.
    """

    model: str
    fingerprint: str
    per: str
    map: str
    under: list[str]
    columns: dict[str, ShardColumn]
    origin: dict[str, ShardColumn]
    shard_rows: int
    parts: int = 1
    batches: int = 0
    data: list[str] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    complete: bool = False
    skip_tokens: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return sum(column.nbytes for column in (*self.columns.values(), *self.origin.values()))

    def finished(self, shards: list[ShardRecord], batches: int, data: list[str]) -> Manifest:
        """The manifest of the store once everything is written."""
        return replace(self, shards=shards, batches=batches, data=data, complete=True)

    def reopened(self) -> Manifest:
        """The manifest as it was while the store was being written."""
        return replace(self, shards=[], batches=0, data=[], complete=False)

    # files

    def to_json(self) -> dict[str, Any]:
        """It, as what JSON can say."""
        shown = asdict(self)
        for group in ("columns", "origin"):
            shown[group] = {name: [DTYPES[c.dtype], list(c.shape)] for name, c in getattr(self, group).items()}
        return {"format": FORMAT, "rows": self.rows, **shown}

    @staticmethod
    def from_json(said: dict[str, Any]) -> Manifest:
        """What `to_json` gave."""
        found = dict(said)
        if found.pop("format") != FORMAT:
            raise ValueError("another format")
        rows = found.pop("rows")
        for group in ("columns", "origin"):
            found[group] = {
                name: ShardColumn(BY_NAME[dtype], tuple(shape)) for name, (dtype, shape) in found[group].items()
            }
        found["shards"] = [ShardRecord(**shard) for shard in found["shards"]]
        manifest = Manifest(**found)
        manifest.check_types(rows)
        return manifest

    def check_types(self, rows: Any) -> None:
        """Raises a `ValueError` where somebody has written something else than `to_json` does."""
        sizes = [size for c in (*self.columns.values(), *self.origin.values()) for size in c.shape]
        counts = [*sizes, *[shard.rows for shard in self.shards], self.shard_rows, self.parts, self.batches]
        if not all(type(count) is int and count >= 0 for count in counts) or not self.shard_rows or not self.parts:
            raise ValueError("a count is none")
        if not all(type(shard.file) is str and "/" not in shard.file for shard in self.shards):
            raise ValueError("a file has no name")
        if type(self.complete) is not bool or not self.columns or rows != self.rows:
            raise ValueError("what it says of its rows cannot be")

    def save(self, there: Address, part: int = 0) -> None:
        """Writes it, for `part`; whoever reads meanwhile sees the old one or the new one."""
        put(there, NAME, [json.dumps(self.to_json(), indent=1).encode()], by=f"{part:05}.")

    @staticmethod
    def load(there: Address) -> Manifest:
        """The manifest at `there`.

        Raises:
            FileMissing: there is no store.
            FileFault: there is something else, or it is damaged.
        """
        if NAME not in there.names():
            raise FileMissing(NO_STORE.format(file=there.full(NAME), where=there.full("")))
        try:
            return Manifest.from_json(json.loads(there.read(NAME)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFault(f"{there.full(NAME)!r} is no manifest of a store, or is damaged: {error!r}.") from None

    def check_same(self, other: Manifest, where: str) -> None:
        """Raises a `StoreMismatch` where a harvest that would write `other` cannot go on with the store of this one."""
        for name, what in COMPARED.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise StoreMismatch(MISMATCH.format(where=where, what=what, mine=_show(mine), theirs=_show(theirs)))


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {DTYPES[c.dtype]}{list(c.shape)}" for name, c in value.items())
    return repr(value)


COMPARED = {
    "model": "the model",
    "fingerprint": "the modules or the weights of the model",
    "under": "the interventions that are active",
    "per": "per=",
    "skip_tokens": "skip_tokens=",
    "map": "map=",
    "columns": "what each row has",
    "shard_rows": "shard_rows=",
    "parts": "the number of writers",
}
"""What has to be the same when a store is resumed, and how it is called."""

MISMATCH = """\
the store {where!r} was begun otherwise, and cannot be resumed with this: {what} differs.
  in the store: {mine}
  now:          {theirs}
  Harvest into another store, or as it was begun."""

NO_STORE = """\
there is no store at {where!r}: it has no file {file!r}.
    harvest(model, where, batches, {where!r})  # writes one"""
