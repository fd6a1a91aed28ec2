"""A mixture of experts: what each expert adds is right under every implementation that runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from torch.nn.functional import linear

from nicehooks import NotCaptured, UnsupportedModule, ablate, anatomy, capture, expert_results, patch
from nicehooks.anatomies.expert_parts import TOLD

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def run(model: Any, layer: int, *more: Any) -> Any:
    parts = anatomy(model)
    with torch.no_grad(), capture(model, *(parts[part, layer] for part in TOLD), *more) as cache:
        model(IDS)
    return cache


def by_hand(experts: Any, x: Any, which: Any, weights: Any) -> Any:
    """Token by token, choice by choice, from the weights of a Mixtral's experts."""
    rows = []
    for token, chosen, weight in zip(x.flatten(0, 1), which, weights, strict=True):
        each = []
        for expert, factor in zip(chosen.tolist(), weight, strict=True):
            gate, up = linear(token, experts.gate_up_proj[expert]).chunk(2)
            each.append(linear(experts.act_fn(gate) * up, experts.down_proj[expert]) * factor)
        rows.append(torch.stack(each))
    return torch.stack(rows).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_each_expert_adds_is_what_its_weights_make_of_the_token(implementation: str) -> None:
    model = tiny("MixtralForCausalLM")
    model.set_experts_implementation(implementation)
    parts = anatomy(model)
    cache = run(model, 1, parts.experts[1])
    results = expert_results(model, cache, 1)
    told = [cache[parts[part, 1]] for part in TOLD]
    assert torch.allclose(results, by_hand(parts.module("experts", 1), *told), atol=1e-5)
    assert torch.allclose(results.sum(2), cache[parts.experts[1]], atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"])
def test_the_weight_of_an_expert_at_zero_takes_away_what_it_adds(name: str, implementation: str) -> None:
    model = tiny(name)
    model.set_experts_implementation(implementation)
    parts = anatomy(model)
    layer = parts.experts.layers[-1]
    cache = run(model, layer, parts.experts[layer], parts.mlp_out[layer])
    results = expert_results(model, cache, layer)
    with ablate(model, parts.router_weights[layer][..., 0]):
        without = run(model, layer, parts.experts[layer], parts.mlp_out[layer])
    for part in (parts.experts[layer], parts.mlp_out[layer]):
        assert torch.allclose(cache[part] - without[part], results[:, :, 0], atol=1e-4)


def test_groups_that_are_chosen_first_are_no_experts() -> None:
    model = tiny("DeepseekV3ForCausalLM", n_routed_experts=8, n_group=4, topk_group=2)
    parts = anatomy(model)
    cache = run(model, 2)
    assert cache[parts.router_experts[2]].shape == (10, 2) and cache[parts.router_experts[2]].max() > 3
    assert parts.layout.layers[2].passed["router_experts"] == "each expert alone, added up = experts"


def test_experts_are_chosen_by_patching_which() -> None:
    model = tiny("MixtralForCausalLM")
    parts = anatomy(model)
    with patch(model, {parts.router_experts[0]: 3}):
        cache = run(model, 0)
    assert (cache[parts.router_experts[0]] == 3).all()
    each = expert_results(model, cache, 0)
    weights = cache[parts.router_weights[0]].unflatten(0, IDS.shape)
    assert torch.allclose(each[:, :, 0] * weights[:, :, 1:], each[:, :, 1] * weights[:, :, :1], atol=1e-5)


def test_what_the_experts_were_told_has_to_be_in_the_cache() -> None:
    model = tiny("MixtralForCausalLM")
    with torch.no_grad(), capture(model, anatomy(model).experts_in[0]) as cache:
        model(IDS)
    with pytest.raises(NotCaptured, match=r"reads what is not in this cache: router_experts\[0\], router_weights\[0\]"):
        expert_results(model, cache, 0)


def test_a_module_that_cannot_be_told_of_one_choice_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="when it is told of one choice alone"):
        expert_results(tiny("LongcatFlashForCausalLM"), {}, 0)
