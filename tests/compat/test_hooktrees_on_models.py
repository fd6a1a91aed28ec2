"""Every place of a tree of hooks in every family of models, beside forwards that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.families import IDS, MODELS, each_model, made, small
from torch import Tensor
from torch.func import vmap
from tree_hooks import Recorder, close, logits_of, tree_of, warped

from nicehooks import UnsupportedModule
from nicehooks.compat.transformer_debugger.places import PLACES
from nicehooks.hooktrees import TransformerHooks


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


COMPUTED = [place for place in PLACES if ".ln_" in place or place.endswith("denominator")]


def scaled(value: Tensor, layer: int | None = None) -> Tensor:
    factors = torch.ones_like(value)
    factors[..., 0] = 1.5
    return value * factors


def written(value: Tensor, layer: int | None = None) -> Tensor:
    value[..., 0] *= 1.5
    return value


def written_behind_autograd(value: Tensor, layer: int | None = None) -> None:
    value.data[..., 0] *= 1.5


def looped_or_mapped(model: Any, mapped: bool) -> Tensor:
    if not mapped:
        return model(IDS).logits
    return vmap(lambda bias: torch.func.functional_call(model, {"transformer.ln_f.bias": bias}, (IDS,)).logits)(
        torch.stack([model.transformer.ln_f.bias, model.transformer.ln_f.bias + 1])
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode, "vmap"])
def test_a_hook_that_writes_in_place_acts_as_one_that_returns(place: str, mode: Any) -> None:
    model = small()
    hooks = [scaled, written, lambda value, layer=None: (written(value), None)[1]]
    if place in COMPUTED and mode != "vmap":
        hooks.append(written_behind_autograd)
    found: list[Tensor] = []
    with torch.no_grad() if mode == "vmap" else mode():
        for hook in hooks:
            with TransformerHooks().append_to_path(f"{place}.fwd", hook).on(model):
                found.append(looped_or_mapped(model, mode == "vmap"))
        clean = looped_or_mapped(model, mode == "vmap")
    assert all(close(one, found[0]) for one in found[1:])
    assert not close(found[0], clean)


@pytest.mark.parametrize("place", COMPUTED)
def test_gradients_of_what_a_hook_writes_with_and_of_what_it_gets(place: str) -> None:
    model, got = small(), []
    size = 16 if ".post_" in place else 4 if place.startswith("attn.") else 1  # d_model, heads, or one number
    ones = [torch.ones(size, requires_grad=True) for _ in range(2)]

    def loss_with(hook: Callable[..., Any]) -> Tensor:
        with TransformerHooks().append_to_path(f"{place}.fwd", hook).on(model):
            logits = logits_of(model)
        assert torch.equal(logits, logits_of(model))  # a factor of 1 changes no value
        return logits.log_softmax(-1)[..., 0].sum()

    def keep(value: Tensor, layer: int | None = None) -> Tensor:
        value.retain_grad()
        got.append(value)
        return value

    expected = torch.autograd.grad(loss_with(lambda value, layer=None: value * ones[0]), ones[0])[0]
    found = torch.autograd.grad(loss_with(lambda value, layer=None: value.mul_(ones[1])), ones[1])[0]
    assert close(found, expected) and expected.abs().max() > 1e-3
    loss_with(keep).backward()
    model.zero_grad()
    assert close(sum((value * value.grad).flatten(0, -2).sum(0) for value in got), expected)  # type: ignore[arg-type]


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
    assert torch.allclose(
        left, torch.autograd.grad(model(IDS).logits.log_softmax(-1)[..., 0].sum(), weight)[0], atol=1e-4
    )
    assert not torch.allclose(left, changed, atol=1e-4)
