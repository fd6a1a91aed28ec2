"""What can be wrong with a store, and what is said of it: a full disk, a truncated shard, foreign files."""

from __future__ import annotations

import errno
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gallery.prefix import PrefixModel
from harvest_streams import all_places, places_of, stream, texts
from safetensors.torch import save_file

from nicehooks import ActivationStore, harvest
from nicehooks.errors import FileFault, FileMissing
from nicehooks.harvesting.addresses import UNFINISHED
from nicehooks.harvesting.manifest import NAME

SAMPLES = texts(30)
SECOND = "00000-00000001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path / "store", shard_rows=16)
    return tmp_path / "store"


def read_all(folder: Path) -> None:
    ActivationStore(folder).rows(slice(None))


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileMissing) as error:
        ActivationStore(tmp_path / "none")
    assert "there is no store at" in str(error.value) and "writes one" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": "other"}', '{"format": "nicehooks activations 1", "rows": 3}']
)
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / NAME).write_text(text)
    with pytest.raises(FileFault, match="is no manifest of a store, or is damaged"):
        ActivationStore(folder)


def test_a_truncated_shard(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(whole[:-10])
    with pytest.raises(FileFault) as error:
        read_all(folder)
    lines = str(error.value).splitlines()
    assert (
        lines[0]
        == f"{str(folder / SECOND)!r} is damaged: it has {len(whole) - 10:,} bytes, and should have {len(whole):,}."
    )
    assert "harvest(…, resume=True)" in lines[1]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"x" * 100])
def test_a_shard_that_is_something_else(folder: Path, content: bytes) -> None:
    (folder / SECOND).write_bytes(content)
    with pytest.raises(FileFault, match="is no shard of a store, or is damaged"):
        read_all(folder)


def test_a_shard_of_another_store(folder: Path) -> None:
    save_file({"a": torch.ones(16, 2)}, folder / SECOND)
    with pytest.raises(FileFault, match="is not the shard that the manifest of the store means"):
        read_all(folder)


def test_a_shard_that_is_gone(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(FileMissing, match="a shard of the store, is not there any more"):
        read_all(folder)


def test_a_bit_that_has_changed(folder: Path) -> None:
    content = bytearray((folder / SECOND).read_bytes())
    content[-1] ^= 1
    (folder / SECOND).write_bytes(content)
    with pytest.raises(FileFault, match="is damaged: the checksum of its tensors is"):
        ActivationStore(folder).check()


@pytest.mark.parametrize("manifest", [True, False])
def test_a_damaged_shard_can_be_harvested_again(manifest: bool, folder: Path) -> None:
    """As the message says: without it and those after it; the word that all is there may go, too."""
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    if not manifest:
        (folder / NAME).unlink()
    for path in folder.iterdir():
        if path.name >= SECOND and path.name[0] == "0":
            path.unlink()
    harvest(PrefixModel(), "layers.1", stream(SAMPLES), folder, shard_rows=16, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets the system refuse files of more than so many bytes, as it refuses everything on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    small_files(1500)
    with pytest.raises(FileFault) as error:
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, shard_rows=64)
    small_files(1 << 30)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("00000-00000000.safetensors' (3,072 bytes) cannot be written: the disk is full.")
    assert (
        lines[1]
        == "  The 0 shards before it are there. Once there is room, harvest(…, resume=True) goes on behind them."
    )
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(UNFINISHED)]
    store = harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, shard_rows=64, resume=True)
    assert places_of(store.rows(slice(None))) == all_places(SAMPLES)


def test_a_disk_that_fills_up_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before stays, in order, and nothing after it: one hole would lose rows."""
    from nicehooks.harvesting import addresses

    write_all, count = addresses._write_all, [0]

    def full(file: object, piece: bytes) -> None:
        count[0] += ".safetensors" in str(getattr(file, "name", "")) and piece[8:10] == b'{"'
        if count[0] >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, piece)

    monkeypatch.setattr(addresses, "_write_all", full)
    with pytest.raises(FileFault, match="the disk is full"):
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, shard_rows=16)
    monkeypatch.undo()
    there = ActivationStore(tmp_path)
    assert 0 < len(there) <= 48 and len(there) % 16 == 0
    assert places_of(there.rows(slice(None))) == all_places(SAMPLES)[: len(there)]
    store = harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, shard_rows=16, resume=True)
    assert places_of(store.rows(slice(None))) == all_places(SAMPLES)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFault, match="cannot be written"):
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path / "file" / "store")
