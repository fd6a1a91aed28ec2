"""Several processes write one store: ranks of a process group, each with its own shards, under one manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import harvest_streams
import pytest
import torch
from gallery.prefix import PrefixModel
from harvest_streams import all_places, alone, check_rows, places_of, stream, texts

import nicehooks
from nicehooks import ActivationStore, harvest
from nicehooks.errors import FileFault
from nicehooks.harvesting.addresses import address, put
from nicehooks.harvesting.inputs import BatchFault

SAMPLES = texts(50, seed=3)

PROGRAM = """
import sys, torch
import torch.distributed as dist
from gallery.prefix import PrefixModel
from harvest_streams import places_of, stream, texts
from nicehooks import harvest
dist.init_process_group("gloo")
samples = texts(50, seed=3)
store = harvest(PrefixModel(), "layers.1", stream(samples, side="both"), sys.argv[1], shard_rows=16)
dist.barrier()
mine = [p for b in store.__class__(store.there).dataset(5, shuffle=True) for p in places_of(b)]
everybody = [None] * dist.get_world_size()
dist.all_gather_object(everybody, mine)
assert sorted(sum(everybody, [])) == sorted((s, p) for s, t in enumerate(samples) for p in range(len(t)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_ranks_of_torchrun_write_one_store(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(nicehooks.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(harvest_streams.__file__).parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run([*command, str(program), str(tmp_path / "store")], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    store = ActivationStore(tmp_path / "store")
    assert store.manifest.complete and store.manifest.parts == 3 and store.manifest.batches == 13
    assert len(store.manifest.data) == 3
    check_store(store)


def check_store(store: ActivationStore) -> None:
    rows = store.rows(slice(None))
    assert sorted(places_of(rows)) == all_places(SAMPLES)
    check_rows(rows, "layers.1", SAMPLES, alone(PrefixModel(), SAMPLES, "layers.1"))


def test_parts_may_come_one_after_the_other_and_in_any_order(tmp_path: Path) -> None:
    batches = stream(SAMPLES, side="both")
    for part in (2, 0):
        store = harvest(PrefixModel(), "layers.1", batches, tmp_path, shard_rows=16, part=(part, 3))
        assert not store.manifest.complete
    assert sorted(places_of(store.rows(slice(None)))) == sorted(
        (s, p) for s, p in all_places(SAMPLES) if s // 4 % 3 != 1 and (s, p) in places_of(store.rows(slice(None)))
    )
    with pytest.raises(FileFault, match="which was begun"):
        harvest(PrefixModel(), "layers.1", batches, tmp_path, shard_rows=16, part=(0, 3))
    check_store(harvest(PrefixModel(), "layers.1", batches, tmp_path, shard_rows=16, part=(1, 3)))


def test_a_part_is_resumed_for_itself(tmp_path: Path) -> None:
    def ends_early():
        yield from stream(SAMPLES)[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(PrefixModel(), "layers.1", ends_early(), tmp_path, shard_rows=8, part=(1, 2))
    harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, shard_rows=8, part=(0, 2))
    check_store(harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, shard_rows=8, part=(1, 2), resume=True))


def test_files_that_others_rename_meanwhile_are_no_fault(tmp_path: Path) -> None:
    """A file may get its own name between the listing of the directory and the look at its size."""
    there, over = address(tmp_path), Event()

    def publishes() -> None:
        while not over.is_set():
            put(there, "manifest.json", [b"1"])

    with ThreadPoolExecutor() as pool:
        writing = [pool.submit(publishes) for _ in range(3)]
        try:
            for _ in range(3000):
                assert set(there.names().values()) <= {0, 1}
        finally:
            over.set()
        for each in writing:
            each.result()


def test_a_part_without_batches(tmp_path: Path) -> None:
    few = stream(SAMPLES[:8])
    with pytest.raises(BatchFault, match="part 2 of 3: there are no batches"):
        harvest(PrefixModel(), "layers.1", few, tmp_path, part=(2, 3))
    for part in (0, 1):
        harvest(PrefixModel(), "layers.1", few, tmp_path, part=(part, 3))
    store = harvest(PrefixModel(), "layers.1", few, tmp_path, part=(2, 3))
    assert store.manifest.complete and places_of(store.rows(slice(None))) == all_places(SAMPLES[:8])


def test_batches_that_are_all_padding_give_nothing_and_lose_nothing(tmp_path: Path) -> None:
    nothing = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    store = harvest(PrefixModel(), "layers.1", [nothing, *stream(SAMPLES[:4]), nothing], tmp_path)
    assert set(store.sample[:].tolist()) == {2, 3, 4, 5}
    with pytest.raises(BatchFault, match="there is not one row to write"):
        harvest(PrefixModel(), "layers.1", [nothing], tmp_path / "none")
