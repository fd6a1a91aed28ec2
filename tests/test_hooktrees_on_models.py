"""Trees of hooks on real architectures: every place of every family, beside the same model written out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers_by_hand as by_hand
from torch import Tensor, nn
from torch.func import grad, vmap
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from nicehooks import NotCalledWarning, SiteNotReached, UnsupportedModule, capture, steer
from nicehooks.errors import HooksMisuse
from nicehooks.hookplaces import PLACES
from nicehooks.hooktrees import AtLayers, AutoencoderHooks, FwdBwdHooks, Hooks, TransformerHooks, grad_hook_wrapper

SMALL: dict[str, Any] = dict(
    num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, vocab_size=30
)
NO_TOKENS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
OPT: dict[str, Any] = dict(
    hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=4, vocab_size=30
)

MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=30, **NO_TOKENS)),
        by_hand.gpt2,
    ),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **NO_TOKENS)), by_hand.gpt_neox),
    "gpt_neox_sequential": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **NO_TOKENS, use_parallel_residual=False)),
        by_hand.gpt_neox,
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **NO_TOKENS, num_key_value_heads=2)), by_hand.llama),
    "gemma": (
        lambda: GemmaForCausalLM(GemmaConfig(**SMALL, **NO_TOKENS, num_key_value_heads=2, head_dim=4)),
        by_hand.gemma,
    ),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL)), by_hand.bert),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**OPT, **NO_TOKENS, max_position_embeddings=16)), by_hand.opt),
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@cache
def made(family: str, implementation: str) -> Any:
    """A model whose weights are large enough that every value matters."""
    torch.manual_seed(0)
    model = MODELS[family][0]().eval()
    model.set_attn_implementation(implementation)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


each_model = pytest.mark.parametrize(
    ("family", "implementation"), [(family, how) for family in MODELS for how in ("eager", "sdpa")]
)


class Recorder:
    """Records the values at all places of a model by hand."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int | None, Tensor]]] = {}

    def __call__(self, place: str, value: Tensor, layer: int | None = None) -> Tensor:
        self.values.setdefault(place, []).append((layer, value))
        return value


def tree_of(places: Any, hook: Callable[[str], Callable[..., Any]], kind: str = "fwd") -> TransformerHooks:
    tree = TransformerHooks()
    for place in places:
        tree.append_to_path(f"{place}.{kind}", hook(place))
    return tree


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def warped(value: Tensor) -> Tensor:
    """Another value, for a softmax and for a norm, too."""
    return value + value.tanh()


# --- every place of every family --------------------------------------------------------------------------------------


@each_model
def test_each_place_is_seen_once_in_each_layer_with_the_right_value(family: str, implementation: str) -> None:
    model, recorder = made(family, implementation), Recorder()
    logits = MODELS[family][1](model, IDS, recorder)
    assert close(model(IDS).logits, logits)
    seen: dict[str, list[tuple[int | None, Tensor]]] = {}

    def see(place: str) -> Callable[..., None]:
        return lambda value, layer=None: seen.setdefault(place, []).append((layer, value))

    with tree_of(recorder.values, see).on(model):
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    for place, expected in recorder.values.items():
        found = seen[place]
        assert [layer for layer, _ in found] == [layer for layer, _ in expected] * 2, place
        for (_, value), (_, right) in zip(found, expected, strict=False):
            if place == "attn.qk_logits":  # what is masked is some very small number, or minus infinity
                value, right = value.clamp_min(-1e4), right.clamp_min(-1e4)
            assert value.shape == right.shape, place
            assert close(value, right), place


@each_model
def test_what_a_model_does_not_have_is_refused_by_name(family: str, implementation: str) -> None:
    model, recorder = made(family, implementation), Recorder()
    MODELS[family][1](model, IDS, recorder)
    known = TransformerHooks.for_model(model)
    for place in PLACES:
        if place in recorder.values:
            known.append_to_path(f"{place}.fwd", lambda value, **_: None)
            continue
        with pytest.raises(UnsupportedModule, match=f"hooks cannot be at '{place}': {type(model).__name__} "):
            known.append_to_path(f"{place}.fwd", abs)
        with pytest.raises(UnsupportedModule, match=f"hooks cannot be at '{place}': {type(model).__name__} "):
            tree_of([place], lambda _: abs).on(model).__enter__()
    assert not known.is_empty()
    assert "forward" not in vars(model)


@each_model
def test_an_edit_of_any_place_has_the_effect_that_it_has_by_hand(family: str, implementation: str) -> None:
    model, recorder = made(family, implementation), Recorder()
    logits = MODELS[family][1](model, IDS, recorder)
    for place in recorder.values:

        def edited(at: str, value: Tensor, layer: int | None = None, place: str = place) -> Tensor:
            return warped(value) if at == place and layer in (None, 1) else value

        expected = MODELS[family][1](model, IDS, edited)
        hook = lambda value, layer=None: warped(value) if layer in (None, 1) else None  # noqa: E731
        with tree_of([place], lambda _, hook=hook: hook).on(model):
            found = model(IDS).logits
        assert close(found, expected), place
        assert not close(found, logits), place


@each_model
def test_the_gradient_at_any_place_is_that_of_autograd(family: str, implementation: str) -> None:
    model, recorder = made(family, implementation), Recorder()
    loss = MODELS[family][1](model, IDS, recorder).log_softmax(-1)[..., 0].sum()
    places = list(recorder.values)
    expected = torch.autograd.grad(loss, [value for place in places for _, value in recorder.values[place]])
    seen: dict[str, dict[int | None, Tensor]] = {place: {} for place in places}

    def see(place: str) -> Callable[..., None]:
        return lambda gradient, layer=None: seen[place].__setitem__(layer, gradient)

    with tree_of(places, see, "bwd").on(model):
        model(IDS).logits.log_softmax(-1)[..., 0].sum().backward()
    found = [seen[place][layer] for place in places for layer, _ in recorder.values[place]]
    for place, a, b in zip([p for p in places for _ in recorder.values[p]], found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), place


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_gradient_flows_on(place: str) -> None:
    model = made("gpt2", "eager")
    weight = model.transformer.wte.weight

    def gradient(hook: Callable[..., Any]) -> Tensor:
        with tree_of([place], lambda _: hook, "bwd").on(model):
            return torch.autograd.grad(model(IDS).logits.log_softmax(-1)[..., 0].sum(), weight)[0]

    left, changed = gradient(lambda gradient, **_: None), gradient(lambda gradient, **_: gradient * 3)
    assert torch.allclose(left, torch.autograd.grad(model(IDS).logits.log_softmax(-1)[..., 0].sum(), weight)[0], atol=1e-4)
    assert not torch.allclose(left, changed, atol=1e-4)
