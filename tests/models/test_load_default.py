"""The shipped model: converted once, then read from the cache, the same to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from gallery.language import save_tiny, shipped

from nicehooks import NiceHooksWarning, load_default
from nicehooks.models import shipped as loading
from nicehooks.models.shipped import LoadError


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A tiny model stands in for the shipped one; the list gets each folder that a model was read from."""
    source = tmp_path / "wheel"
    save_tiny(source)
    (source / "tiny.gguf").touch()
    monkeypatch.setattr(loading, "default_model_file", lambda: source / "tiny.gguf")
    read, seen = loading._pretrained, []

    def counted(directory: Path, file: str | None, device: str):
        seen.append(directory)
        return read(directory, None, device)

    monkeypatch.setattr(loading, "_pretrained", counted)
    return seen


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return list(ours) == list(others) and all(torch.equal(ours[name], others[name]) for name in ours)


def test_it_is_converted_once(conversions: list[Path], tmp_path: Path):
    first, _ = load_default(cache=tmp_path / "kept")
    second, tokenizer = load_default(cache=str(tmp_path / "kept"))
    (place,) = (tmp_path / "kept").iterdir()
    assert conversions == [tmp_path / "wheel", place, place]
    assert same(first, second) and not first.training and not second.training
    assert tokenizer.encode("When Mary went") == [1, 2, 5]


def test_a_damaged_copy_is_made_anew(conversions: list[Path], tmp_path: Path):
    first, _ = load_default(cache=tmp_path / "kept")
    first = copy.deepcopy(first)  # whose weights may be the very file
    (weights,) = (tmp_path / "kept").glob("*/model.safetensors")
    found = bytearray(weights.read_bytes())
    found[-1] ^= 1  # one bit of a weight, which safetensors itself does not see
    weights.write_bytes(found)
    second, _ = load_default(cache=tmp_path / "kept")
    load_default(cache=tmp_path / "kept")
    assert conversions == [tmp_path / "wheel", weights.parent] * 2 + [weights.parent]
    assert same(first, second)


def test_another_file_or_version_is_another_copy(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load_default(cache=tmp_path / "kept")
    (tmp_path / "wheel" / "tiny.gguf").write_text("longer")
    load_default(cache=tmp_path / "kept")
    monkeypatch.setattr(loading, "version", lambda package: "99")
    load_default(cache=tmp_path / "kept")
    assert conversions[::2] == [tmp_path / "wheel"] * 3
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_the_cache_is_the_users_own_or_none(conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, appauthor: tmp_path / "home" / name)
    load_default(cache=False)
    assert not (tmp_path / "home").exists()
    load_default()
    assert len(list((tmp_path / "home" / "nicehooks").iterdir())) == 1


def test_where_nothing_can_be_kept_it_warns_and_loads(conversions: list[Path], tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.warns(NiceHooksWarning) as warned:
        model, _ = load_default(cache=tmp_path / "file" / "inside")
    assert str(warned[0].message).splitlines()[0] == (
        f"load_default: the converted model cannot be kept in {tmp_path / 'file' / 'inside'}, "
        "so that it is converted again each time."
    )
    assert warned[0].filename == __file__
    assert not model.training


def test_a_device_that_is_not_there_is_said_before_anything_is_read(conversions: list[Path]):
    with pytest.raises(LoadError, match="no device 'nowhere' here"):
        load_default("nowhere")
    assert conversions == []


@pytest.mark.slow
def test_the_kept_model_is_the_converted_one(tmp_path: Path):
    model, tokenizer = load_default(cache=False)
    kept, kept_tokenizer = shipped()
    assert same(model, kept)
    ids = tokenizer("When Mary and John went to the store", return_tensors="pt")
    assert kept_tokenizer("When Mary and John went to the store") == {k: v[0].tolist() for k, v in ids.items()}
    assert kept_tokenizer.chat_template == tokenizer.chat_template
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, kept(**ids).logits)
    assert model.generation_config.to_dict() == kept.generation_config.to_dict()
