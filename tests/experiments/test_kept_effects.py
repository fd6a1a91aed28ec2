"""Effects of a kind of their own: what they know goes through files, and into other units, with the numbers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nicehooks import Effects, attribute, circuit, edges, faithfulness, sweep
from nicehooks.errors import FileFault, NiceHooksError
from nicehooks.experiments.edge_effects import Edges
from nicehooks.experiments.verifying import Verified

CLEAN = torch.randint(30, (3, 5), generator=torch.Generator().manual_seed(0))
WHERE = "transformer.h.*[:, *]"


@cache
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=30, initializer_range=0.5)).eval()


def metric(output: Any) -> torch.Tensor:
    return output.logits[:, -1, 8] - output.logits[:, -1, 9]


def estimated() -> Any:
    return attribute(gpt2(), WHERE, 0.0, metric, CLEAN)


@pytest.mark.parametrize("load", [Edges.load, Effects.load])
def test_a_circuit_of_edges_from_a_file(load: Any, tmp_path: Path) -> None:
    found = edges(gpt2(), 0.0, metric, CLEAN, method="eap")
    found.save(tmp_path / "edges")
    again = load(tmp_path / "edges")
    assert repr(again) == repr(found)
    one, other = circuit(found, top=7), circuit(again, top=7)
    assert (one.edges, one.nodes) == (other.edges, other.nodes)
    alone = faithfulness(gpt2(), other, 0.0, metric, CLEAN, sizes=[3, 7])
    alone.save(tmp_path / "alone")
    torch.testing.assert_close(type(alone).load(tmp_path / "alone").shares, alone.shares)
    torch.testing.assert_close(alone.normalized(3.0, 1.0).shares, alone.shares)


def test_edges_in_other_units_have_the_same_circuit() -> None:
    found = edges(gpt2(), 0.0, metric, CLEAN, method="eap")
    names = [[edge[:2] for edge in circuit(one, top=7).edges] for one in (found, found.normalized(3.0, 1.0))]
    assert names[0] == names[1]


@pytest.mark.parametrize("samples", [0, 2, 8])
def test_what_was_verified_is_known_in_files_and_other_units(samples: int, tmp_path: Path) -> None:
    exact = estimated().verify(4, samples=samples)
    exact.save(tmp_path / "exact")
    for again, span in ((Effects.load(tmp_path / "exact"), 1.0), (exact.normalized(-1.0, 3.0), -4.0)):
        assert isinstance(again, Verified)
        assert (again.exact.equal(exact.exact), again.spent, again.notes) == (True, exact.spent, exact.notes)
        if exact.missed is None:
            assert again.missed is None
            continue
        assert again.missed is not None
        assert again.missed.bound == pytest.approx(exact.missed.bound / abs(span))
        assert again.missed[3:] == exact.missed[3:]
        torch.testing.assert_close(again.missed.effects, exact.missed.effects / span, equal_nan=True)
        torch.testing.assert_close(again.missed.errors, exact.missed.errors / abs(span), equal_nan=True)


def test_what_was_verified_is_verified_further() -> None:
    whole, first = sweep(gpt2(), WHERE, 0.0, metric, CLEAN), estimated().verify(2, samples=4)
    more = first.verify(3, samples=0)
    assert more.exact.sum() == 5 and bool(more.exact[first.exact].all())
    torch.testing.assert_close(more.values[more.exact], whole.values[more.exact])
    assert more.values[~more.exact].equal(first.values[~more.exact])
    assert (more.spent, more.notes[0], len(more.notes)) == (9 / 10, first.notes[0], 2)
    every = more.verify(100)
    torch.testing.assert_close(every.values, whole.values)
    assert every.spent == 14 / 10 and every.missed is None


def test_too_few_halves_say_nothing() -> None:
    assert estimated().verify(2, samples=2).notes[-1].startswith("nothing is known of the other cells: 2 random halves")


def test_there_is_no_model_to_verify_on_in_a_file_or_other_units(tmp_path: Path) -> None:
    estimated().save(tmp_path / "effects")
    for without in (Effects.load(tmp_path / "effects"), estimated().normalized(3.0, 1.0)):
        with pytest.raises(NiceHooksError, match=r"^verify runs the model, which effects from a file, or in other"):
            without.verify(1)  # type: ignore[attr-defined]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    sweep(gpt2(), WHERE, 0.0, metric, CLEAN).save(tmp_path / "effects")
    with pytest.raises(FileFault, match=r"'.*effects' holds Effects, and not Edges: Effects.load reads it"):
        Edges.load(tmp_path / "effects")
