"""`nicehooks harvest`: a text of one's own becomes rows, and what cannot be is said before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nicehooks import ActivationStore, capture
from nicehooks.cli import command
from nicehooks.cli.loading import load

TEXT = "When Mary and John went, John gave to Mary" + " and John gave to Mary" * 7


@pytest.fixture
def here(here: Path) -> Path:
    (here / "my.txt").write_text(TEXT)
    return here


def run(tiny: str, *words: str) -> int:
    return command.main(["harvest", "my.txt", "--model", tiny, "--length", "8", "--batch", "2", *words])


def test_every_token_of_the_text_has_a_row(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny) == 0
    model, tokenizer = load(tiny)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    store = ActivationStore(here / "activations")
    assert store.sites == ["transformer.h.1"] and store.token[:].tolist() == ids.tolist()
    with torch.no_grad(), capture(model, "transformer.h.1") as acts:
        model(ids[8:16][None])
    torch.testing.assert_close(store["transformer.h.1"][8:16], acts["transformer.h.1"][0], atol=1e-5, rtol=1e-5)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"{len(ids)} tokens × 80 bytes = about {len(ids) * 80 / 1000:.3g} kB in 'activations'"
    assert said[2].startswith(f"{len(ids)} rows in ") and "tokens a second" in said[2]


def test_places_dtype_number_of_tokens_and_resuming(tiny: str, here: Path) -> None:
    words = ["--where", "transformer.h.*", "--dtype", "bfloat16", "--tokens", "20", "--out", "few"]
    assert run(tiny, *words) == 0
    store = ActivationStore("few")
    assert (len(store), len(store.sites), store["transformer.h.0"].dtype) == (20, 2, torch.bfloat16)
    assert run(tiny, *words) == 2
    assert run(tiny, *words, "--resume") == 0
    (here / "my.txt").write_text(TEXT[::-1])
    assert run(tiny, *words, "--resume") == 2  # of another text


def test_a_text_with_a_mark_that_is_shorter_than_a_piece(tiny: str, here: Path) -> None:
    """The mark that some editors put first is no token, and nothing is padded."""
    tokenizer = load(tiny)[1]
    (here / "my.txt").write_bytes(b"\xef\xbb\xbfWhen Mary and John")
    assert run(tiny, "--length", "100000") == 0
    assert ActivationStore("activations").token[:].tolist() == tokenizer("When Mary and John")["input_ids"]


def test_what_is_refused(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "empty.txt").write_text("")
    assert command.main(["harvest", "none.txt", "--model", tiny]) == 2
    assert command.main(["harvest", "empty.txt", "--model", tiny]) == 2
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    assert run(tiny) == 2
    said = capsys.readouterr().err
    assert "'none.txt' cannot be read" in said and "'empty.txt' has no tokens" in said
    assert "there is no room for that: 100 bytes are free" in said
    assert not (here / "activations").exists()
    with pytest.raises(SystemExit):
        run(tiny, "--length", "0")
    assert "'0' is no number from 1 on" in capsys.readouterr().err
