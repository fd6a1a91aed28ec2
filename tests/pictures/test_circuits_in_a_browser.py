"""A circuit as a page in a real browser: every edge is drawn between its nodes, and listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from browser import Browser
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nicehooks import circuit, edges
from nicehooks.errors import FileMissing
from nicehooks.experiments.circuits import Circuit


def found(kind: str, top: int = 12) -> Circuit:
    torch.manual_seed(0)
    if kind == "one key for each head":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=20, initializer_range=0.2))
    else:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 16}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=20, initializer_range=0.2, **sizes))
    effects = edges(model.eval(), 0.0, lambda output: output.logits[:, -1, 8], torch.tensor([[3, 1, 4]]))
    return circuit(effects, top=top)


@pytest.mark.parametrize("kind", ["one key for each head", "keys that heads share"])
def test_the_page_of_a_circuit_has_its_nodes_and_edges(kind: str, browser: Browser, tmp_path: Path) -> None:
    chosen = found(kind)
    browser.open(chosen.to_html(tmp_path / "circuit.html", "a circuit"))
    assert browser.texts("h1") == ["a circuit"]
    assert sorted(browser.texts(".node")) == sorted(chosen.nodes)
    drawn = [(line.get_attribute("data-from"), line.get_attribute("data-to")) for line in browser.all(".edge")]
    assert sorted(drawn) == sorted([(sender, receiver) for sender, receiver, *_ in chosen.drawn()])
    assert len(browser.texts("tbody tr")) == len(chosen.drawn()) >= 12
    heights = browser.ask("[...document.querySelectorAll('.node rect')].map((each) => [each.y.baseVal.value])")
    by_depth = dict(zip(browser.texts(".node"), [height for (height,) in heights], strict=True))
    assert by_depth["logits"] == min(by_depth.values())  # the last is at the top
    browser.hover(browser.find("[data-node=logits]"))
    lit = [line for line in browser.texts("#tip")[0].splitlines() if "→ logits: " in line]
    assert len(lit) == len([edge for edge in chosen.edges if edge.receiver == "logits"])


def test_the_page_of_a_circuit_fits_in_both_schemes(browser: Browser, tmp_path: Path) -> None:
    browser.check_in_both_schemes(found("one key for each head", top=40).to_html(tmp_path / "circuit.html"))


def test_a_notebook_shows_a_circuit(browser: Browser, tmp_path: Path) -> None:
    chosen = found("one key for each head")
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><body data-jp-theme-light=false>{chosen._repr_html_()}", encoding="utf-8")
    browser.open(notebook)
    inside = "document.querySelector('iframe').contentDocument"
    assert browser.ask(f"{inside}.querySelectorAll('.edge').length") == len(chosen.drawn())


def test_a_circuit_of_nothing_is_a_page_and_one_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    assert 'data-node="logits"' in found("one key for each head", top=0).to_html(tmp_path / "empty.html").read_text()
    with pytest.raises(
        FileMissing, match=r"^cannot write '.*missing/circuit.html': there is no directory '.*missing'\.$"
    ):
        found("one key for each head").to_html(tmp_path / "missing" / "circuit.html")
