"""Names of parts on the command line: each one is looked at, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery.language import WORDS as VOCABULARY
from gallery.language import save_tiny
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from nicehooks import capture, patch
from nicehooks.anatomies.tables import FURTHER_PARTS, PARTS
from nicehooks.cli import command
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import differences, patched
from nicehooks.cli.places import NothingToPatch, sites_of
from nicehooks.cli.prompts import encode_pair

CLEAN, CORRUPTED = "When Mary and John went, John gave to", "When Mary and John went, Mary gave to"
WORDS = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John"]
SINGLE = ("embed", "final_norm", "logits")
COUNT = {"q": 4, "k": 2, "v": 2, "z": 4, "scores": 4, "pattern": 4}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("llama")
    return saved(
        directory,
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(VOCABULARY),
            )
        ),
    )


@pytest.fixture(scope="session")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=len(VOCABULARY))
    return saved(tmp_path_factory.mktemp("mamba"), MambaForCausalLM(config))


def saved(directory: Path, model: LlamaForCausalLM | MambaForCausalLM) -> str:
    words = AutoTokenizer.from_pretrained(save_tiny(directory))
    for file in directory.iterdir():
        file.unlink()
    words.save_pretrained(directory)
    model.save_pretrained(directory)
    return str(directory)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(list(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("part", [*PARTS, *SINGLE])
def test_each_part_gives_a_grid_of_layers_and_positions_or_heads(part: str, llama: str) -> None:
    model, tokenizer = load(llama)
    pair = encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")
    grid = patched(model, pair, part)
    columns = COUNT.get(part, len(pair.tokens))
    assert [axis.name for axis in grid.axes] == [
        "part" if part in SINGLE else "layer",
        "head" if part in COUNT else "position",
    ]
    assert list(grid.values.shape) == [1 if part in SINGLE else 2, columns]


@pytest.mark.parametrize("part", SINGLE)
def test_a_single_part_is_patched_position_by_position(part: str, llama: str) -> None:
    model, tokenizer = load(llama)
    pair = encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")
    (clean, corrupted), site = differences(model, pair), {"embed": "model.embed_tokens", "final_norm": "model.norm"}
    path = site.get(part, "lm_head")
    with torch.no_grad(), capture(model, path) as values:
        model(**pair.clean)
    by_hand = []
    for position in range(len(pair.tokens)):
        with torch.no_grad(), patch(model, f"{path}[:, {position}]", values[path][:, position]):
            by_hand.append((pair.logit_difference(model(**pair.corrupted)).mean() - corrupted) / (clean - corrupted))
    assert torch.allclose(patched(model, pair, part).values[0].cpu(), torch.stack(by_hand).cpu(), atol=1e-4)


@pytest.mark.parametrize("part", FURTHER_PARTS)
@pytest.mark.parametrize("job", ["patch", "sites"])
def test_a_part_that_the_model_lacks_is_refused_in_one_line(
    job: str, part: str, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [part] if job == "sites" else [*WORDS, "--sites", part]
    said = refused(capsys, job, "--model", llama, *asked)
    assert said == f"nicehooks: LlamaForCausalLM has no {part}: its layers have none."


def test_the_reason_is_that_of_the_anatomy(mamba: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "patch", "--model", mamba, *WORDS, "--sites", "attn_out") == (
        "nicehooks: MambaForCausalLM has no attn_out: the layer has no attention."
    )


@pytest.mark.parametrize("name", ["n_layers", "report", "nonsense"])
def test_what_is_no_part_is_a_path(name: str, llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["patch", "--model", llama, *WORDS, "--sites", name]) == 2
    said = capsys.readouterr().err
    assert f"nicehooks: no module matches '{name}' in LlamaForCausalLM.\n  --sites takes a path, or a part: " in said


def test_a_module_of_the_name_of_a_part_that_is_lacking_is_that_module(llama: str) -> None:
    model, tokenizer = load(llama)
    model.router = torch.nn.Identity()
    pair = encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")
    assert sites_of(model, pair, "router", None, None) == (["router"], [])
    del model.router


def test_what_has_no_positions_is_not_taken_by_positions(mamba: str) -> None:
    model, tokenizer = load(mamba)
    pair = encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")
    with pytest.raises(NothingToPatch) as raised:
        patched(model, pair, "mixer_state")
    assert str(raised.value) == (
        "mixer_state has no dimension of positions, it is [1, 32, 4]. To patch some of it, write its path and a "
        "subscript, such as --sites 'backbone.layers.0.mixer@copy_#1().input[1][:, 0]'."
    )
    assert patched(model, pair, "mixer_out").values.shape == (2, len(pair.tokens))


def test_sites_finds_single_parts_and_mixers(mamba: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["sites", "mixer_state", "embed", "--model", mamba]) == 0
    out = capsys.readouterr().out
    assert "mixer_state[1] = @copy_#1().input[1]" in out and "= embed" in out and "mixer_out[0]" in out
