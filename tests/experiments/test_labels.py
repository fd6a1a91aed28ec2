"""The labels of grids: distinct, of what differs between the sites, and whatever order these are given in."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nicehooks import anatomy, attribute, capture, sweep
from nicehooks.errors import TreeMismatch

IDS = torch.randint(30, (3, 5), generator=torch.Generator().manual_seed(0))


@cache
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=30)).eval()


@cache
def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30)).eval()


def metric(output: Any) -> Tensor:
    return output.logits[:, -1, 8]


def axes_of(model: nn.Module, where: Any, values: Any = 0.0, run: Any = sweep) -> list[tuple[str, tuple[str, ...]]]:
    return [tuple(axis) for axis in run(model, where, values, metric, IDS).axes]


@pytest.mark.parametrize("run", [sweep, attribute])
def test_alternatives_have_labels_of_their_own(run: Any) -> None:
    with torch.no_grad(), capture(gpt2(), "transformer.h.*") as cache_of_values:
        gpt2()(IDS)
    for values, labels in (
        ([cache_of_values, 0], ("#0", "#1")),
        ([0, 0], ("#0", "#1")),
        ([2, cache_of_values, lambda value: value], ("#0", "#1", "#2")),
        ([cache_of_values, 1.5], ("0", "1.5")),
        ([0.5, 2], ("0.5", "2")),
        (torch.tensor([1.0, 1.0 + 1e-6]).reshape(2, 1, 1, 1), ("#0", "#1")),
    ):
        assert axes_of(gpt2(), "transformer.h.*", values, run)[0] == ("alternative", labels)


@pytest.mark.parametrize("model", [gpt2, llama])
def test_sites_that_differ_in_their_part_have_an_axis_of_parts(model: Any) -> None:
    parts = anatomy(model())
    layers = ("layer", ("0", "1"))
    assert axes_of(model(), [*parts.q, *parts.k, *parts.v]) == [("part", ("q", "k", "v")), layers]
    assert axes_of(model(), [parts.q, parts.v]) == [("part", ("q", "v")), layers]
    heads = [part.head(head) for part in (*parts.q, *parts.k) for head in range(2)]
    assert axes_of(model(), heads) == [("part", ("q", "k")), layers, ("head", ("0", "1"))]
    assert axes_of(model(), parts.q) == [layers]


def test_layers_beside_a_site_without_a_layer_are_paths() -> None:
    paths = ("transformer.h.0", "transformer.h.1", "transformer.wte")
    assert axes_of(gpt2(), ["transformer.h.*", "transformer.wte"]) == [("site", paths)]


def test_tokens_have_positions() -> None:
    assert axes_of(gpt2(), "transformer.wte@input[0][:, *]", 5) == [("position", ("0", "1", "2", "3", "4"))]
    assert axes_of(gpt2(), "transformer.wte@input[0][*]", 5) == [("example", ("0", "1", "2"))]


@pytest.mark.parametrize("run", [sweep, attribute])
def test_alternatives_are_told_from_all_sites(run: Any) -> None:
    values, sites = torch.randn(3, 5, 8), ["transformer.h.1[0]", "transformer.h.0"]
    messages = set[str]()
    for where in (sites, sites[::-1]):
        with pytest.raises(TreeMismatch) as raised:
            run(gpt2(), where, values, metric, IDS)
        messages.add(str(raised.value))
    (message,) = messages
    assert message.endswith(
        "Tensor[3, 5, 8] float32 is neither a value for Tensor[5, 8] float32, nor several along a new first dimension."
    )
