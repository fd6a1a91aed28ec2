"""Which places `nicehooks patch` patches: layers and positions of parts and of paths; what it leaves behind."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nicehooks.cli import command
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import patched
from nicehooks.cli.places import NothingToPatch, sites_of
from nicehooks.cli.prompts import PromptPairs, encode_pair

CLEAN, CORRUPTED = "When Mary and John went , John gave to", "When Mary and John went , Mary gave to"
WORDS = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John"]
PATH = "transformer.h.*.mlp"


@pytest.fixture
def pair_of(tiny: str) -> tuple[torch.nn.Module, PromptPairs]:
    model, tokenizer = load(tiny)
    return model, encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")


@pytest.mark.parametrize("layers", [None, [1], [1, 0], [-1]])
@pytest.mark.parametrize("positions", [None, [2], [-1, 3]])
def test_a_path_has_the_layers_and_positions_of_a_part(layers, positions, pair_of) -> None:
    by_path, by_part = [patched(*pair_of, what, layers, positions) for what in (f"{PATH}[:, *]", "mlp_out")]
    torch.testing.assert_close(by_path.values, by_part.values, atol=1e-4, rtol=0.0)
    assert by_path.sites == by_part.sites
    assert [axis.name for axis in by_path.axes] == ["layer", "position"]
    numbers = [label.partition(" ")[0] for label in by_part.axes[1].labels]
    assert (by_path.axes[0], list(by_path.axes[1].labels)) == (by_part.axes[0], numbers)


def test_the_table_of_a_path_has_what_was_asked_for(tiny: str, here: Path) -> None:
    assert command.main(["patch", "--model", tiny, *WORDS, "--sites", PATH, "--layers", "1", "--out", "a.csv"]) == 0
    rows = list(csv.DictReader((here / "a.csv").read_text().splitlines()))
    assert [(row["layer"], row["site"]) for row in rows] == [("1", "transformer.h.1.mlp")]


@pytest.mark.parametrize(
    ("what", "layers", "positions", "message"),
    [
        (PATH, None, [0], f"--positions chooses along an axis that {PATH} does not have. It has: layer."),
        ("transformer.wte[:, *]", [0], None, "--layers chooses along an axis that transformer.wte[:, *] does not "),
        ("z", None, [0], "--positions chooses along an axis that z does not have. It has: layer, head."),
        (PATH, [2], None, "there is no layer 2: there are 0, 1."),
        (PATH, [-3], None, "there is no layer -3: there are 0, 1."),
    ],
)
def test_what_cannot_be_chosen_is_refused(what: str, layers, positions, message: str, pair_of) -> None:
    with pytest.raises(NothingToPatch) as raised:
        sites_of(*pair_of, what, layers, positions)
    assert str(raised.value).startswith(message)


def test_what_is_neither_part_nor_path_is_told_of_both(pair_of) -> None:
    with pytest.raises(NothingToPatch) as raised:
        sites_of(*pair_of, "foo", None, None)
    first, last = str(raised.value).splitlines()
    assert first == "no module matches 'foo' in GPT2LMHeadModel."
    assert last.startswith("  --sites takes a path, or a part: resid, attn_in, attn_out, embed, ")


@pytest.mark.parametrize("job", ["patch", "circuit"])
def test_prompts_are_given_once(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        command.main([job, "--prompts", "a.csv", "--clean", "When"])
    assert leaving.value.code == 2
    said = f"{job} takes its prompts from --prompts a.csv, or --clean: leave one of them out\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("job", ["patch", "circuit"])
def test_files_are_written_where_the_pipe_is_closed(job: str, tiny: str, here: Path) -> None:
    line = [sys.executable, "-m", "nicehooks.cli.command", job, "--model", tiny, *WORDS, "--out", "a.html"]
    read, write = os.pipe()
    os.close(read)
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=unbuffered)
    os.close(write)
    assert (done.returncode, "Traceback" in done.stderr, (here / "a.html").exists()) == (0, False, True)
