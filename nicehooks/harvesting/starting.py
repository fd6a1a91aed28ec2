"""What is known when a harvest begins: what a row is, and what the store will say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from nicehooks.contexts.listing import describe
from nicehooks.harvesting.fingerprints import fingerprint, name_of
from nicehooks.harvesting.inputs import batches_of
from nicehooks.harvesting.manifest import Manifest
from nicehooks.harvesting.rows import PROVENANCE, Chosen, Recipe
from nicehooks.harvesting.shards import ShardColumn

SHARD_BYTES = 1 << 27
"""About how large a shard is where nothing is said."""


class Format(NamedTuple):
    """What a row of a harvest is."""

    columns: dict[str, ShardColumn]
    origin: dict[str, ShardColumn]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return sum(column.nbytes for column in (*self.columns.values(), *self.origin.values()))


def format_of_first(recipe: Recipe, first: Any) -> Format | None:
    """Runs the model once, on the batch `first`, to see what a row is; None where it has no rows."""
    chosen = Chosen(next(iter(batches_of([first]))), recipe)
    if not chosen.count:
        return None
    columns = {name: ShardColumn.of(rows) for name, rows in recipe.columns(chosen, recipe.places()).items()}
    return Format(columns, {name: ShardColumn(PROVENANCE[name], ()) for name in chosen.origin()})


def format_of(columns: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> Format:
    """What a row is, of rows that are there already."""
    return Format(*[{name: ShardColumn.of(rows) for name, rows in group.items()} for group in (columns, origin)])


def manifest_for(recipe: Recipe, found: Format, shard_rows: int | None, parts: int) -> Manifest:
    """The manifest of a store that is begun."""
    rows = max(1, min(1 << 20, SHARD_BYTES // found.row_bytes)) if shard_rows is None else shard_rows
    acting = dict.fromkeys([record.intervention for record in describe(recipe.model) if record.acting])
    under = [text for text in acting if not text.startswith("capture(")]
    kind = type(recipe.model).__name__
    manifest = Manifest(kind, fingerprint(recipe.model), recipe.per, name_of(recipe.map), under, *found, rows, parts)
    return replace(manifest, skip_tokens=list(recipe.skip_tokens))


THERE = """\
there is a store at {where!r} already, which {state}.
    harvest(…, resume=True)  # goes on with it
  or harvest into another place, or remove it."""
