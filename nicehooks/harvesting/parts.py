"""The parts of a store: several processes write their own shards, and whoever is done last says what there is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from nicehooks.caches.arguments import BadArgument
from nicehooks.errors import FileFault
from nicehooks.harvesting.addresses import Address, put
from nicehooks.harvesting.manifest import Manifest, ShardRecord
from nicehooks.harvesting.rows import Reached


def this_part() -> tuple[int, int]:
    """Which part of the batches this process takes, and of how many: its rank, under `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def part_of(part: Any) -> tuple[int, int]:
    """The part that was asked for.

    Raises:
        BadArgument: there is no such part.
    """
    match part:
        case (int(number), int(parts)) if 0 <= number < parts:
            return number, parts
        case _:
            raise BadArgument(f"part={part!r}: it is (0, 4) to (3, 4) for four parts")


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
    parts = [what_was_done(there, part) for part in range(manifest.parts)]
    every = [shard for shards, _ in parts for shard in shards]
    ends = [end or Reached(0, 0, "") for _, end in parts]
    manifest.finished(every, sum(end.batches for end in ends), [end.digest for end in ends]).save(there, by)


def what_was_done(there: Address, part: int) -> tuple[list[ShardRecord], Reached | None]:
    """What a part that is done has written, and how far the stream was read for it.

    Raises:
        FileFault: the file that says so is damaged.
    """
    try:
        said: Any = json.loads(there.read(done_name(part)))
        end = said["progress"]
        return [ShardRecord(**shard) for shard in said["shards"]], Reached(**end) if end else None
    except (ValueError, KeyError, TypeError) as error:
        raise FileFault(DONE_DAMAGED.format(file=there.full(done_name(part)), error=error)) from None


DONE_DAMAGED = """\
{file!r} is damaged ({error!r}).
  Remove it: harvest(…, resume=True) then writes it again."""
