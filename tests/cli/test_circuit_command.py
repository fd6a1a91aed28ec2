"""`nicehooks circuit`, and the methods of `nicehooks patch`, beside the same by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from gallery.language import shipped
from test_cli import CLEAN, CORRUPTED, PAIRS_FILE, WORDS, refusal
from transformers import OPTConfig, OPTForCausalLM

from nicehooks import anatomy, attribute, capture, circuit, edges, faithfulness
from nicehooks.cli import circuit_job, command, jobs
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import EXACT, differences, patched
from nicehooks.cli.prompts import PromptPairs, encode_pair, encode_pairs
from nicehooks.experiments.attributing import ESTIMATES
from nicehooks.experiments.circuits import Circuit
from nicehooks.experiments.edge_effects import METHODS_OF_EDGES
from nicehooks.experiments.faithful import Faithfulness

Printed = pytest.CaptureFixture[str]


def pair_of(tiny: str) -> tuple[torch.nn.Module, PromptPairs]:
    model, tokenizer = load(tiny)
    return model, encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")


def numbers_in(file: Path) -> list[float]:
    return [float(row["effect"]) for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())]


# --- patch --method ---------------------------------------------------------------------------------------------------


def test_the_command_has_the_methods_of_the_library():
    assert [EXACT, *ESTIMATES] == command.METHODS_OF_PATCHES
    assert list(METHODS_OF_EDGES) == command.METHODS_OF_CIRCUITS


@pytest.mark.parametrize("method", list(ESTIMATES))
def test_patch_estimates_by_each_method_and_says_which(method: str, tiny: str, here: Path, capsys: Printed):
    out = ["--out", "a.csv", "a.html", "a.png"]
    assert command.main(["patch", "--model", tiny, *WORDS, "--sites", "z", "--method", method, *out]) == 0
    printed, err = capsys.readouterr()
    assert "percent, that one patch of z would restore:\n" in printed
    assert f"\nMethod {method}: estimated " in printed and "was made" not in printed
    assert "patching" not in err  # nothing is patched, so no bar
    model, pair = pair_of(tiny)
    clean, corrupted = differences(model, pair)
    parts = anatomy(model)
    with torch.no_grad(), capture(model, parts.z) as acts:
        model(**pair.clean)
    heads = [parts.z[layer].head(head) for layer in (0, 1) for head in (0, 1)]
    by_hand = attribute(model, heads, acts, pair.logit_difference, method=method, **pair.corrupted)
    assert numbers_in(here / "a.csv") == pytest.approx((by_hand.values.flatten() / (clean - corrupted)).tolist())
    assert f"estimated: {method}</title>" in (here / "a.html").read_text(encoding="utf-8")
    assert (here / "a.png").read_bytes().startswith(b"\x89PNG")


def test_patch_says_that_it_is_exact(tiny: str, here: Path, capsys: Printed):
    assert command.main(["patch", "--model", tiny, *WORDS, "--sites", "attn_out", "--out", "a.csv"]) == 0
    printed = capsys.readouterr().out
    assert "one patch of attn_out restores:\n" in printed
    assert "\nMethod exact: each of these patches was made.\n" in printed
    assert numbers_in(here / "a.csv") == pytest.approx(patched(*pair_of(tiny), "attn_out").values.flatten().tolist())


def test_estimates_are_of_the_positions_and_layers_that_are_asked_for(tiny: str):
    model, pair = pair_of(tiny)
    whole = patched(model, pair, method="gradient")
    some = patched(model, pair, layers=[1, 0], positions=[6, -1], method="gradient")
    assert [axis.name for axis in whole.axes] == ["layer", "position"]
    assert torch.allclose(some.values, whole.values[[1, 0]][:, [6, 8]])
    assert patched(model, pair, "q", method="atp*").axes[1] == ("head", ("0", "1"))


def test_a_method_that_is_none(capsys: Printed):
    for job, known in (("patch", "atp*"), ("circuit", "eap-ig")):
        with pytest.raises(SystemExit) as leaving:
            command.main([job, *WORDS, "--method", "guess"])
        said = capsys.readouterr().err.splitlines()[-1]
        assert leaving.value.code == 2 and "--method: invalid choice: 'guess'" in said and known in said


# --- circuit ----------------------------------------------------------------------------------------------------------


def by_hand(model: torch.nn.Module, pairs: PromptPairs, top: int, method: str) -> tuple[Circuit, Faithfulness]:
    parts = anatomy(model)
    with torch.no_grad(), capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
        model(**pairs.corrupted)
    run = (model, values, pairs.logit_difference)
    found = circuit(edges(*run, method=method, **pairs.clean), top=top)
    return found, faithfulness(model, found, *run[1:], random=3, **pairs.clean)


@pytest.mark.parametrize("method", list(METHODS_OF_EDGES))
def test_circuit_prints_the_strongest_edges_and_writes_the_graph(method: str, tiny: str, here: Path, capsys: Printed):
    assert command.main(["circuit", "--model", tiny, *WORDS, "--top", "18", "--method", method]) == 0
    printed, err = capsys.readouterr()
    found, alone = by_hand(*pair_of(tiny), 18, method)
    assert f"The circuit has 18 of 46 edges, between {len(found.nodes)} parts.\n" in printed
    assert f"\nMethod {method}: the effects of edges are {found.scores.notes[0]}.\n" in printed
    lines = [line.split(maxsplit=1) for line in printed.splitlines() if " → " in line]
    assert [name for _, name in lines] == [f"{edge.sender} → {edge.receiver}" for edge in found.edges[:15]]
    assert [float(effect) for effect, _ in lines] == pytest.approx([e.effect for e in found.edges[:15]], rel=6e-3)
    assert "\n  and 3 more, in the page\n" in printed
    share, *random = alone.shares[0].tolist()
    assert (
        f"\nFaithfulness {share:.2f}: with all other edges corrupted, {round(100 * share)}% of the difference"
        in printed
    )
    assert f"\nwith random circuits of 18 edges, {', '.join([f'{round(100 * one)}%' for one in random])}.\n" in printed
    assert printed.endswith("\nThe page is in circuit.html\n")
    assert (here / "circuit.html").read_text(encoding="utf-8").count('class="edge ') == len(found.drawn())
    assert ("takes a run of the model for each of 46 edges" in err) is (method == "exact")


def test_circuit_takes_pairs_from_a_file(tiny: str, here: Path, capsys: Printed):
    (here / "pairs.csv").write_text(PAIRS_FILE)
    out = ["--out", "graph.html", "--top", "5"]
    assert command.main(["circuit", "--model", tiny, "--prompts", "pairs.csv", *out]) == 0
    printed = capsys.readouterr().out
    model, tokenizer = load(tiny)
    found, alone = by_hand(model, encode_pairs(tokenizer, list(csv.DictReader(PAIRS_FILE.splitlines()))), 5, "eap-ig")
    assert "mean logit difference of 2 pairs of prompts: " in printed and "more, in the page" not in printed
    assert f"Faithfulness {alone.shares[0, 0]:.2f}: " in printed
    assert f"{found.edges[0].sender} → {found.edges[0].receiver}\n" in printed
    assert (here / "graph.html").exists()


def test_what_circuit_refuses(tiny: str, here: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch):
    def refused(*more: str) -> str:
        return refusal(capsys, "circuit", "--model", tiny, *WORDS, *more)

    page = "this is a page, whose name should end in .html."
    assert refused("--out", "graph.png") == f"nicehooks: cannot write 'graph.png': {page}\n"
    gone = "nicehooks: cannot write 'missing/graph.html': there is no directory 'missing'.\n"
    assert refused("--out", "missing/graph.html") == gone
    model, tokenizer = load(tiny)
    torch.nn.init.zeros_(model.lm_head.weight)
    monkeypatch.setattr(circuit_job, "load", lambda name, device: (model, tokenizer))
    same = "nicehooks: both prompts have the logit difference 0.00: there is no effect to look for.\n"
    assert refused() == same
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "vocab_size": 20}
    on_the_stream = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, do_layer_norm_before=False)).eval()
    monkeypatch.setattr(circuit_job, "load", lambda name, device: (on_the_stream, tokenizer))
    message = refused()
    assert (
        message.startswith("nicehooks: OPTForCausalLM has its norms on the residual stream")
        and message[:-1].count("\n") == 0
    )
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("job", ["patch", "circuit"])
def test_prompts_that_are_left_out(job: str, capsys: Printed):
    with pytest.raises(SystemExit):
        command.main([job, "--clean", "When"])
    assert f"{job} needs --corrupted, --answer, --wrong; or --prompts FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_the_circuit_of_indirect_objects(here: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch):
    """Thirty edges in 70,651 bring back a part of what the model does; head 23.3 is the strongest at the logits."""
    for job in (circuit_job, jobs):
        monkeypatch.setattr(job, "load", lambda name, device: shipped())
    words = ["--clean", command.CLEAN, "--corrupted", command.CORRUPTED, "--answer", " Mary", "--wrong", " John"]
    assert command.main(["circuit", *words, "--method", "eap", "--top", "30"]) == 0
    printed = capsys.readouterr().out
    assert "The circuit has 30 of 70,651 edges" in printed
    into_logits = [line.split()[1] for line in printed.splitlines() if line.endswith(" → logits")]
    assert into_logits[0] == "z[23].head(3)"
    assert "with random circuits of 30 edges, 0%, 0%, 0%." in printed
    assert command.main(["patch", *words, "--method", "gradient", "--sites", "z", "--out", "z.csv"]) == 0
    assert "Method gradient: " in capsys.readouterr().out
    effects = torch.tensor(numbers_in(here / "z.csv"))
    assert len(effects) == 30 * 9 and effects.argmax() == 23 * 9 + 3
