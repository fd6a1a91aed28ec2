"""Resuming: whatever the moment of a kill, no row is lost and none is there twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import harvest_streams
import pytest
import torch
from gallery.prefix import PrefixModel
from harvest_streams import all_places, alone, check_rows, places_of, stream, texts

import nicehooks
from nicehooks import ActivationStore, harvest
from nicehooks.harvesting.manifest import NAME, StoreMismatch
from nicehooks.harvesting.rows import OtherData

SAMPLES = texts(40, seed=3)
WHERE = ["layers.1", "layers.3"]


def files_in(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def killed(store: Path, kills: int, seed: int) -> list[int]:
    root = Path(nicehooks.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, harvest_streams.__file__, str(store), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return [int(word) for word in done.stdout.split()]


def check_killed(folder: Path, whole: Path) -> None:
    """Each store in `folder` is, byte by byte, the one that was never interrupted, which has all rows."""
    samples = texts(120, seed=3)
    store = harvest(PrefixModel(), WHERE, stream(samples, side="both"), whole, shard_rows=16)
    rows = store.rows(slice(None))
    assert places_of(rows) == all_places(samples)
    for key in WHERE:
        check_rows(rows, key, samples, alone(PrefixModel(), samples, key))
    expected = files_in(whole)
    for interrupted in folder.iterdir():
        assert files_in(interrupted) == expected


def test_killed_a_few_times(tmp_path: Path) -> None:
    kills, _ = killed(tmp_path / "stores", 5, seed=1)
    assert kills == 5
    check_killed(tmp_path / "stores", tmp_path / "whole")


@pytest.mark.slow
def test_killed_fifty_times_at_random_moments(tmp_path: Path) -> None:
    kills, _ = killed(tmp_path / "stores", 50, seed=2)
    assert kills == 50
    check_killed(tmp_path / "stores", tmp_path / "whole")


class Stopped(Exception):
    pass


def stops_at(batches: list[object], count: int):
    yield from batches[:count]
    raise Stopped


@pytest.mark.parametrize("count", range(0, 10, 3))
def test_an_error_in_the_stream_leaves_what_was_there(count: int, tmp_path: Path) -> None:
    batches = stream(SAMPLES, side="both")
    harvest(PrefixModel(), WHERE, batches, tmp_path / "whole", shard_rows=8)
    if count:
        with pytest.raises(Stopped):
            harvest(PrefixModel(), WHERE, stops_at(batches, count), tmp_path / "store", shard_rows=8)
        store = ActivationStore(tmp_path / "store")
        before = sum(map(len, SAMPLES[: 4 * count]))
        assert not store.manifest.complete
        assert len(store) == before // 8 * 8
        assert places_of(store.rows(slice(None))) == all_places(SAMPLES)[: len(store)]
    harvest(PrefixModel(), WHERE, batches, tmp_path / "store", shard_rows=8, resume=True)
    assert files_in(tmp_path / "store") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("resume", [False, True])
def test_what_was_killed_before_its_first_file_leaves_nothing(resume: bool, tmp_path: Path) -> None:
    store, whole = tmp_path / "store", tmp_path / "whole"
    store.mkdir()
    for name in ("00000-00000000.safetensors", "00000.manifest.json", "00000.done.json"):
        (store / f"{name}.0123abcd.unfinished").touch()
    harvest(PrefixModel(), WHERE, stream(SAMPLES), store, shard_rows=8, resume=resume)
    harvest(PrefixModel(), WHERE, stream(SAMPLES), whole, shard_rows=8)
    assert files_in(store) == files_in(whole)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    batches = stream(SAMPLES)
    with pytest.raises(Stopped):
        harvest(PrefixModel(), WHERE, stops_at(batches, 8), tmp_path, shard_rows=4)
    runs: list[int] = []
    model = PrefixModel()
    model.embed.register_forward_hook(lambda *_: runs.append(1))
    harvest(model, WHERE, batches, tmp_path, shard_rows=4, resume=True)
    assert len(runs) <= 1 + 1 + 2  # one to see what a row is, the batch that was cut, and the two that are new


def test_a_complete_store_is_left_alone(tmp_path: Path) -> None:
    batches = stream(SAMPLES)
    harvest(PrefixModel(), WHERE, batches, tmp_path, shard_rows=8)
    before = files_in(tmp_path)
    runs: list[int] = []
    model = PrefixModel()
    model.embed.register_forward_hook(lambda *_: runs.append(1))
    again = harvest(model, WHERE, iter(batches), tmp_path, resume=True)
    assert files_in(tmp_path) == before and again.manifest.complete
    assert len(runs) == 1  # to see what a row is


def begun(store: Path) -> None:
    with pytest.raises(Stopped):
        harvest(PrefixModel(), WHERE, stops_at(stream(SAMPLES), 6), store, shard_rows=8)


def test_another_model_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(StoreMismatch, match=r"the modules or the weights of the model differs.\n  in the store: '"):
        harvest(PrefixModel(seed=1), WHERE, stream(SAMPLES), tmp_path, resume=True)


def test_other_interventions_are_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    model = PrefixModel()
    with pytest.raises(StoreMismatch, match="the interventions that are active"), nicehooks.ablate(model, "layers.0"):
        harvest(model, WHERE, stream(SAMPLES), tmp_path, resume=True)


def test_other_places_are_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(StoreMismatch) as error:
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, resume=True)
    assert str(error.value).splitlines()[1:3] == [
        "  in the store: layers.1 F32[8], layers.3 F32[8]",
        "  now:          layers.1 F32[8]",
    ]


@pytest.mark.parametrize("other", [stream(texts(40, seed=4)), stream(SAMPLES)[:3], stream(SAMPLES)[::-1]])
def test_other_data_is_refused(other: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(OtherData, match="was given other data than the store was begun with"):
        harvest(PrefixModel(), WHERE, other, tmp_path, resume=True)


def test_a_store_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    begun(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(nicehooks.errors.FileFault, match="which was begun"):
        harvest(PrefixModel(), WHERE, stream(SAMPLES), tmp_path)
    assert files_in(tmp_path) == before
    assert NAME in before
