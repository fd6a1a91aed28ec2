"""What `resume=True` finds: a store that is done, one of another harvest, one with a file missing or exchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gallery.prefix import PrefixModel
from harvest_streams import stream, texts
from torch import nn

from nicehooks import ActivationStore, NiceHooksError, harvest
from nicehooks.errors import FileFault
from nicehooks.harvesting.manifest import NAME, StoreMismatch
from nicehooks.harvesting.rows import OtherData

SAMPLES = texts(40, seed=3)
WHERE = ["layers.1", "layers.3"]
BATCHES = stream(SAMPLES, side="both")


def files_in(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    harvest(PrefixModel(), WHERE, BATCHES, folder, shard_rows=16)
    return folder


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "done"))


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """As it was after six shards: what a kill leaves."""
    folder = Path(shutil.copytree(whole, tmp_path / "begun"))
    said = json.loads((folder / NAME).read_text())
    said.update(complete=False, shards=[], rows=0, data=[], batches=0)
    (folder / NAME).write_text(json.dumps(said, indent=1))
    for path in [folder / "00000.done.json", *sorted(folder.glob("*.safetensors"))[6:]]:
        path.unlink()
    return folder


def with_another_layer() -> nn.Module:
    model = PrefixModel()
    model.add_module("more", nn.ReLU())  # neither a parameter nor a buffer tells it
    return model


OTHERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "weights": lambda: (PrefixModel(seed=1), WHERE, BATCHES, {}),
    "modules": lambda: (with_another_layer(), WHERE, BATCHES, {}),
    "places": lambda: (PrefixModel(), "layers.1", BATCHES, {}),
    "dtype": lambda: (PrefixModel(), WHERE, BATCHES, {"dtype": torch.float16}),
    "map": lambda: (PrefixModel(), WHERE, BATCHES, {"map": lambda value: value * 2}),
    "per": lambda: (PrefixModel(), WHERE, BATCHES, {"per": "example"}),
    "tokens": lambda: (PrefixModel(), WHERE, BATCHES, {"skip_tokens": SAMPLES[0][:1]}),
    "shards": lambda: (PrefixModel(), WHERE, BATCHES, {"shard_rows": 8}),
    "parts": lambda: (PrefixModel(), WHERE, BATCHES, {"part": (0, 2)}),
    "data": lambda: (PrefixModel(), WHERE, [*BATCHES[1:], BATCHES[0]], {}),
    "less data": lambda: (PrefixModel(), WHERE, BATCHES[:2], {}),
    "no data": lambda: (PrefixModel(), WHERE, [], {}),
}


@pytest.mark.parametrize("store", ["begun", "done"])
@pytest.mark.parametrize("what", OTHERS)
def test_another_harvest_is_refused_and_changes_nothing(what: str, store: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(store)
    before = files_in(folder)
    model, where, batches, more = OTHERS[what]()
    with pytest.raises((StoreMismatch, OtherData)):
        harvest(model, where, batches, folder, resume=True, **more)
    assert files_in(folder) == before


def test_a_complete_store_has_all_of_its_data(done: Path) -> None:
    for other in (BATCHES[:-1], [*BATCHES, BATCHES[0]], [*BATCHES[:-1], BATCHES[0]]):
        with pytest.raises(OtherData):
            harvest(PrefixModel(), WHERE, other, done, resume=True)


LOST: dict[str, Callable[[list[Path]], object]] = {
    "the first": lambda shards: shards[0].unlink(),
    "one": lambda shards: shards[3].unlink(),
    "the last": lambda shards: shards[-1].unlink(),
    "all": lambda shards: [shard.unlink() for shard in shards],
    "two exchanged": lambda shards: (
        [
            os.rename(shards[1], shards[0].parent / "x"),
            os.rename(shards[2], shards[1]),
            os.rename(shards[0].parent / "x", shards[2]),
        ]
    ),
    "one twice": lambda shards: shutil.copy(shards[2], shards[1]),
}


@pytest.mark.parametrize("what", LOST)
def test_what_was_lost_is_harvested_again(what: str, done: Path, whole: Path) -> None:
    LOST[what](sorted(done.glob("*.safetensors")))
    with pytest.raises(FileFault):
        ActivationStore(done).rows(slice(None))
    harvest(PrefixModel(), WHERE, BATCHES, done, resume=True)
    assert files_in(done) == files_in(whole)


def test_lost_again_while_it_is_harvested_again(done: Path, whole: Path) -> None:
    """Until all is there again, the store does not say that it is."""
    sorted(done.glob("*.safetensors"))[3].unlink()

    def stops() -> Any:
        yield from BATCHES[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(PrefixModel(), WHERE, stops(), done, resume=True)
    assert not ActivationStore(done).manifest.complete
    ActivationStore(done).rows(slice(None))
    harvest(PrefixModel(), WHERE, BATCHES, done, resume=True)
    assert files_in(done) == files_in(whole)


def test_exchanged_shards_of_a_store_that_was_begun(begun: Path) -> None:
    shards = sorted(begun.glob("*.safetensors"))
    shutil.copy(shards[3], shards[1])
    with pytest.raises(FileFault, match="is not the shard that comes after the one before it"):
        harvest(PrefixModel(), WHERE, BATCHES, begun, resume=True)


def test_without_its_manifest(done: Path, whole: Path) -> None:
    (done / NAME).unlink()
    before = files_in(done)
    with pytest.raises(FileFault, match=r"which has no manifest\.json any more"):
        harvest(PrefixModel(), WHERE, BATCHES, done, shard_rows=16)
    with pytest.raises(StoreMismatch, match="has the activations of another model"):
        harvest(PrefixModel(seed=1), WHERE, BATCHES, done, shard_rows=16, resume=True)
    assert files_in(done) == before
    harvest(PrefixModel(), WHERE, BATCHES, done, shard_rows=16, resume=True)
    assert files_in(done) == files_in(whole)


def test_files_of_the_user_stay(done: Path) -> None:
    copy = done / "00000-00000001.safetensors.bak"
    copy.write_bytes(b"mine")
    sorted(done.glob("*.safetensors"))[0].unlink()
    harvest(PrefixModel(), WHERE, BATCHES, done, resume=True)
    assert copy.read_bytes() == b"mine"


def test_a_done_file_that_is_none(done: Path, whole: Path) -> None:
    (done / "00000.done.json").write_text("{")
    with pytest.raises(FileFault, match="is damaged"):
        harvest(PrefixModel(), WHERE, BATCHES, done, resume=True)
    (done / "00000.done.json").unlink()
    harvest(PrefixModel(), WHERE, BATCHES, done, resume=True)
    assert (done / NAME).read_bytes() == (whole / NAME).read_bytes()


def test_another_harvest_that_begins_meanwhile(tmp_path: Path) -> None:
    def first() -> Any:
        harvest(PrefixModel(), WHERE, BATCHES, tmp_path / "store", shard_rows=16)
        yield from BATCHES

    with pytest.raises(FileFault, match="was begun meanwhile"):
        harvest(PrefixModel(seed=1), WHERE, first(), tmp_path / "store", shard_rows=16)
    ActivationStore(tmp_path / "store").check()


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows below zero": lambda said: said["shards"][0].update(rows=-7),
    "rows as text": lambda said: said["shards"][0].update(rows="7"),
    "more rows": lambda said: said["shards"][0].update(rows=17),
    "another sum": lambda said: said.update(rows=3),
    "a shard left out": lambda said: said["shards"].pop(2),
    "a file elsewhere": lambda said: said["shards"][0].update(file="../done/" + said["shards"][0]["file"]),
    "a number as file": lambda said: said["shards"][0].update(file=3),
    "another file": lambda said: said["shards"][0].update(file=said["shards"][1]["file"]),
    "another checksum": lambda said: said["shards"][0].update(checksum="00000000"),
    "a shape as text": lambda said: said["columns"].update({"layers.1": ["F32", "8"]}),
    "another dtype": lambda said: said["columns"].update({"layers.1": ["F16", [16]]}),
    "no places": lambda said: said.update(columns={}),
    "complete as text": lambda said: said.update(complete="no"),
    "parts as text": lambda said: said.update(parts="2", complete=False),
    "no shard_rows": lambda said: said.update(shard_rows=0),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_that_was_edited(what: str, done: Path) -> None:
    said = json.loads((done / NAME).read_text())
    EDITS[what](said)
    (done / NAME).write_text(json.dumps(said))
    with pytest.raises(NiceHooksError):
        ActivationStore(done).rows(slice(None))


def test_a_directory_that_may_not_be_read(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refused)
    for use in (lambda: ActivationStore(done), lambda: harvest(PrefixModel(), WHERE, BATCHES, done, resume=True)):
        with pytest.raises(FileFault, match="cannot be read"):
            use()
