"""The parts of a store: several processes write their own shards, and whoever is done last says what there is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from nicehooks.harvesting.addresses import Address, put
from nicehooks.harvesting.manifest import Manifest, ShardRecord
from nicehooks.harvesting.rows import Reached


def this_part() -> tuple[int, int]:
    """Which part of the batches this process takes, and of how many: its rank, under `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def done_name(part: int) -> str:
    """The file that says that a part is done."""
    return f"{part:05}.done.json"


def finish_part(
    there: Address, manifest: Manifest, part: int, shards: list[ShardRecord], progress: Reached | None
) -> None:
    """Says that a part is done; where it is the last one, the store is complete."""
    said = {"shards": [asdict(shard) for shard in shards], "progress": asdict(progress) if progress else None}
    put(there, done_name(part), [json.dumps(said).encode()])
    put_together(there, manifest, part)


def put_together(there: Address, manifest: Manifest, by: int) -> None:
    """Writes the manifest of all parts, for the part `by`, if they are done; two who are so at once write the same."""
    names = there.names()
    if not all(done_name(part) in names for part in range(manifest.parts)):
        return
    parts: list[Any] = [json.loads(there.read(done_name(part))) for part in range(manifest.parts)]
    every = [ShardRecord(**shard) for each in parts for shard in each["shards"]]
    ends: list[Any] = [each["progress"] or {"batches": 0, "digest": ""} for each in parts]
    data = [end["digest"] for end in ends]
    manifest.finished(every, sum(end["batches"] for end in ends), data).save(there, by)
