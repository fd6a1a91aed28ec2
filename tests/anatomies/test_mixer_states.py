"""The state of a mixer: it is what the cache has after a step, and the next step reads what is patched there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from torch import Tensor

from nicehooks import SiteNotReached, UnsupportedModule, anatomy, capture, patch

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

STATED = (
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "Qwen3NextForCausalLM",
    "JambaForCausalLM",
    "BambaForCausalLM",
    "FalconH1ForCausalLM",
)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
NEXT = torch.tensor([[8], [9]])

each_stated = pytest.mark.parametrize("name", STATED)


def in_cache(output: Any, layer: int) -> Tensor:
    return output.cache.layers[layer].recurrent_states[0]


def prefilled(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS, use_cache=True)


def stepped(model: Any, output: Any) -> Any:
    with torch.no_grad():
        return model(NEXT, cache=output.cache, use_cache=True)


@each_stated
def test_a_state_is_what_the_cache_has_after_each_step(name: str) -> None:
    model = tiny(name)
    states = anatomy(model).mixer_state
    with capture(model, states, clone=True) as acts:
        output = prefilled(model)
    in_prefill = {layer: in_cache(output, layer).clone() for layer in states.layers}
    assert all(torch.equal(acts[states[layer]], kept) for layer, kept in in_prefill.items())
    with capture(model, states, clone=True) as acts:
        output = stepped(model, output)
    for layer, before in in_prefill.items():
        assert torch.equal(acts[states[layer]], in_cache(output, layer))
        assert not torch.equal(acts[states[layer]], before)


@each_stated
def test_what_is_patched_there_is_what_the_next_step_reads(name: str) -> None:
    model = tiny(name)
    state = anatomy(model).mixer_state[anatomy(model).mixer_state.layers[0]]
    layer = anatomy(model).mixer_state.layers[0]
    clean = prefilled(model)
    logits = clean.logits.clone()
    in_cache(clean, layer).zero_()
    by_hand = stepped(model, clean).logits
    with patch(model, {state: 0.0}):
        patched = prefilled(model)
    assert torch.equal(patched.logits, logits)
    assert torch.equal(stepped(model, patched).logits, by_hand)
    assert not torch.allclose(stepped(model, prefilled(model)).logits, by_hand, atol=1e-4)


@each_stated
def test_every_mixer_of_a_layer_has_its_state_and_no_other_layer(name: str) -> None:
    parts = anatomy(tiny(name))
    with_mixer = [layer for layer, places in enumerate(parts.layout.layers) if places.has("mixer_out")]
    assert list(parts.mixer_state.layers) == with_mixer
    row = next(row for row in parts.report().rows if row.part.startswith("mixer_state"))
    assert row.check == "it is in the cache after each of two steps"


def test_a_forward_that_keeps_nothing_has_none() -> None:
    model = tiny("MambaForCausalLM")
    with pytest.raises(SiteNotReached, match="copy_"), capture(model, anatomy(model).mixer_state):
        model(IDS, use_cache=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("RwkvForCausalLM", "no call in it writes one value into the cache, at the same place in each step"),
        ("RecurrentGemmaForCausalLM", "the model does not run in steps on the input that its parts are looked for on"),
    ],
)
def test_where_it_is_no_value_it_is_refused(name: str, why: str) -> None:
    with pytest.raises(UnsupportedModule, match=f"{name} has no mixer_state: .*{why}"):
        _ = anatomy(tiny(name)).mixer_state
