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
from torch.utils.checkpoint import checkpoint
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
from nicehooks.compat.transformer_debugger.places import PLACES
from nicehooks.errors import HooksMisuse
from nicehooks.hooktrees import AtLayers, AutoencoderHooks, FwdBwdHooks, Hooks, TransformerHooks, grad_hook_wrapper

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 30,
}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OPT: dict[str, Any] = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 24,
    "num_attention_heads": 4,
    "vocab_size": 30,
}

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


# --- laws -------------------------------------------------------------------------------------------------------------

POST_MLP = "resid.torso.post_mlp.fwd"


def small() -> Any:
    return made("gpt2", "eager")


def logits_of(model: Any) -> Tensor:
    return model(IDS).logits


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


def test_hooks_that_return_what_they_get_leave_every_bit() -> None:
    model = small()
    with tree_of(PLACES, lambda _: lambda value, layer=None: value).on(model):
        assert torch.equal(logits_of(model), made("gpt2", "eager")(IDS).logits)
    with TransformerHooks().append_all(lambda value, layer=None: None).on(model):
        logits = logits_of(model)
        logits.sum().backward()
    model.zero_grad()
    assert close(logits, logits_of(model))


def test_an_empty_tree_binds_nothing() -> None:
    model = small()
    before = state_of(model)
    with TransformerHooks().on(model) as hooks:
        assert state_of(model) == before
        assert hooks.is_empty()
        logits_of(model)
    with TransformerHooks().on(nn.Linear(2, 2)):  # not even a look at what kind of model it is
        pass


def test_only_the_modules_at_places_with_hooks_are_touched() -> None:
    model = small()
    with tree_of(["mlp.post_act", "resid.torso.ln_mlp.scale"], lambda _: lambda value, layer: None).on(model):
        touched = {name for name, module in model.named_modules() if "forward" in vars(module)}
        logits_of(model)
    assert touched == {
        "",
        *(f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("mlp.c_proj", "ln_2")),
    }


def test_leaving_undoes_everything_also_after_an_exception() -> None:
    model = small()
    before = state_of(model)

    def fail(value: Tensor, layer: int) -> None:
        raise KeyError("in a hook")

    for place in PLACES[1:6]:
        with pytest.raises(KeyError, match="in a hook"), tree_of([place], lambda _: fail).on(model):
            logits_of(model)
        assert state_of(model) == before
    with pytest.raises(UnsupportedModule), tree_of(PLACES, lambda _: abs).on(made("llama", "eager")):
        pass
    assert all("forward" not in vars(module) for module in made("llama", "eager").modules())


def test_contexts_act_in_the_order_in_which_they_are_entered() -> None:
    model = small()
    for place in ("resid.torso.delta_mlp", "resid.torso.ln_mlp.scale", "attn.qk_softmax_denominator", "attn.q"):
        double = tree_of([place], lambda _: lambda value, layer: value * 2)
        shift = tree_of([place], lambda _: lambda value, layer: value.tanh() + 0.5)
        both = tree_of([place], lambda _: lambda value, layer: (value * 2).tanh() + 0.5)
        with both.on(model):
            expected = logits_of(model)
        with double.on(model), shift.on(model):
            assert close(logits_of(model), expected), place
        with shift.on(model), double.on(model):
            assert not close(logits_of(model), expected), place


def test_a_step_of_a_norm_comes_before_what_others_do_with_its_result() -> None:
    model, x = small(), IDS
    hooks = tree_of(["resid.ln_f.scale"], lambda _: lambda value: value * 2)
    with hooks.on(model), capture(model, "transformer.ln_f") as halved:
        model(x)
    direction = torch.arange(16.0)
    for first, second in [(steer, None), (None, steer)]:
        contexts = [c(model, "transformer.ln_f", direction) if c else hooks.on(model) for c in (first, second)]
        with contexts[0], contexts[1], capture(model, "transformer.ln_f") as acts:
            model(x)
        assert torch.allclose(acts["transformer.ln_f"], halved["transformer.ln_f"] + direction, atol=1e-5)


def test_the_gradient_is_that_of_the_value_after_fwd_and_before_fwd2() -> None:
    model, seen, events = small(), [], []
    tree = TransformerHooks()
    place = tree.resid.post_ln_f
    place.append_fwd2(lambda value: events.append("fwd2") or value * 5)
    place.append_bwd(lambda gradient: events.append("bwd") or seen.append(gradient))
    place.append_fwd(lambda value: events.append("fwd") or value * 3)
    with tree.on(model):
        logits_of(model).sum().backward()
    model.zero_grad()
    assert events == ["fwd", "fwd2", "bwd"]
    assert torch.allclose(seen[0], 5 * model.lm_head.weight.sum(0).expand(2, 5, 16), atol=1e-4)


def test_hooks_act_in_the_thread_that_entered() -> None:
    model, seen = small(), []
    clean = logits_of(model)

    def elsewhere() -> None:
        seen.append(logits_of(model))

    with tree_of(["resid.torso.post_mlp", "resid.ln_f.scale"], lambda _: lambda value, **_: value.tanh()).on(model):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        here = logits_of(model)
    assert torch.equal(seen[0], clean)
    assert not close(here, clean)


def test_two_threads_have_a_tree_of_their_own() -> None:
    model, found, together = small(), {}, threading.Barrier(2)

    def scaled(factor: float) -> TransformerHooks:
        return tree_of(["resid.post_ln_f"], lambda _: lambda value: value * factor)

    def run(factor: float) -> None:
        with scaled(factor).on(model):
            together.wait()
            found[factor] = logits_of(model)
            together.wait()

    clean = logits_of(model)
    threads = [threading.Thread(target=run, args=(factor,)) for factor in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {factor: close(logits, clean * factor) for factor, logits in found.items()} == {2.0: True, 3.0: True}


def test_one_tree_is_bound_to_two_models_at_once() -> None:
    gpt2, llama = small(), made("llama", "sdpa")
    tree, layers = TransformerHooks(), []
    tree.resid.torso.post_mlp.append_fwd(lambda value, layer: layers.append(layer))
    tree.logits.append_fwd(lambda value: value * 0)
    with tree.on(gpt2), tree.on(llama):
        assert not logits_of(gpt2).any() and not logits_of(llama).any()
    assert layers == [0, 1, 0, 1]


def test_one_object_can_be_entered_again_and_finds_new_hooks() -> None:
    model, seen = small(), []
    tree = TransformerHooks()
    context = tree.on(model)
    with context:
        pass
    tree.append_to_path(POST_MLP, lambda value, layer: seen.append(layer))
    with context:
        logits_of(model)
    assert seen == [0, 1]


def test_attached_hooks_act_until_they_are_removed() -> None:
    model, clean = small(), logits_of(small())
    handle = tree_of(["logits"], lambda _: lambda value: value * 0).on(model)
    handle.attach()
    assert not logits_of(model).any()
    handle.remove()
    assert torch.equal(logits_of(model), clean)


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_act_under_transforms_as_example_by_example(place: str, outside: bool) -> None:
    """Each place: its value is scaled by what is mapped, and its gradient tripled."""
    model = small()
    factors, current, shapes = torch.tensor([0.5, 1.0, 2.0]), [], []
    tree = TransformerHooks()
    tree.append_to_path(f"{place}.fwd", lambda value, layer=None: value * current[-1] if layer in (None, 1) else None)
    tree.append_to_path(f"{place}.bwd", lambda gradient, layer=None: shapes.append(gradient.shape) or gradient * 3)

    def loss(factor: Tensor) -> Tensor:
        current.append(factor)
        return logits_of(model).log_softmax(-1)[..., 0].sum()

    def loss_in_context(factor: Tensor) -> Tensor:
        with tree.on(model):
            return grad(loss)(factor)

    expected = torch.stack([loss_in_context(factor) for factor in factors])
    shapes.clear()
    if outside:
        with tree.on(model):
            found = vmap(grad(loss))(factors)
    else:
        found = vmap(loss_in_context)(factors)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert shapes[0][0] != 3  # a gradient hook, too, sees one example
    current.clear()


def test_a_gradient_hook_acts_where_vmap_is_inside_of_the_differentiation() -> None:
    model, shapes, current = small(), [], []
    factors = torch.tensor([0.5, 2.0], requires_grad=True)
    tree = tree_of(["resid.post_emb"], lambda _: lambda value: value + current[-1] * torch.arange(16.0).sin())
    hook = lambda gradient, layer: shapes.append(gradient.shape) or gradient * 2  # noqa: E731
    tree.resid.torso.post_attn.append_bwd(hook)

    def loss(factor: Tensor) -> Tensor:
        current.append(factor)
        return logits_of(model).log_softmax(-1)[..., 0].sum()

    with tree.on(model):
        mapped = torch.autograd.grad(vmap(loss)(factors).sum(), factors)[0]
        looped = torch.autograd.grad(sum(loss(factor) for factor in factors), factors)[0]
    assert torch.allclose(mapped, looped, rtol=1e-3, atol=1e-3)
    assert shapes == [torch.Size([2, 5, 16])] * 6  # two layers, once for both examples, then for each


def test_a_norm_in_two_roles_is_hooked_in_each_by_itself() -> None:
    torch.manual_seed(0)
    model = MODELS["gpt2"][0]().eval()
    block = model.transformer.h[1]
    block.ln_2 = model.transformer.ln_f = block.ln_1
    recorder, seen = Recorder(), []
    by_hand.gpt2(model, IDS, recorder)
    for place in ("resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale", "resid.ln_f.scale"):
        seen.clear()
        with tree_of([place], lambda _: lambda value, layer=None: seen.append((layer, value))).on(model):
            logits_of(model)
        assert [number for number, _ in seen] == [number for number, _ in recorder.values[place]]
        assert all(close(a, b) for (_, a), (_, b) in zip(seen, recorder.values[place], strict=True))


def test_frozen_models_have_gradients_at_the_places_that_ask() -> None:
    model, seen = MODELS["gpt2"][0]().eval().requires_grad_(False), []
    with tree_of(["mlp.post_act"], lambda _: lambda gradient, layer: seen.append(layer), "bwd").on(model):
        logits_of(model).sum().backward()
    assert seen == [1, 0]


def test_norms_in_half_precision_are_computed_as_the_modules_do() -> None:
    for family in ("gpt2", "llama", "gemma"):
        torch.manual_seed(0)
        model = MODELS[family][0]().eval().to(torch.bfloat16)
        with torch.no_grad():
            plain = logits_of(model)
            with tree_of(["resid.ln_f.scale"], lambda _: lambda value: value.clone()).on(model):
                assert torch.allclose(logits_of(model), plain, rtol=0.05, atol=0.02)


def test_hooks_act_in_activation_checkpointed_regions() -> None:
    model, seen = small(), []
    tree = tree_of(["mlp.post_act", "resid.torso.ln_attn.scale"], lambda _: lambda value, layer: value * 2)
    tree.mlp.post_act.append_bwd(lambda gradient, layer: seen.append(layer) or gradient * 3)

    def gradient(logits: Callable[[], Tensor]) -> Tensor:
        with tree.on(model):
            return torch.autograd.grad(logits().sin().sum(), model.transformer.wpe.weight)[0]

    plain = gradient(lambda: logits_of(model))
    assert torch.allclose(gradient(lambda: checkpoint(logits_of, model, use_reentrant=False)), plain, atol=1e-4)
    assert seen == [1, 0, 1, 0]


def test_an_autoencoder_is_a_hook_at_a_place() -> None:
    torch.manual_seed(0)
    model, encoder, decoder = small(), nn.Linear(16, 32), nn.Linear(32, 16)
    clean, layers, latents = logits_of(model), [], []
    autoencoder = AutoencoderHooks(encoder, decoder, add_error=True)
    autoencoder.latents.append_fwd(lambda value, layer: layers.append(layer))
    autoencoder.latents.append_bwd(lambda gradient, layer: latents.append(gradient.shape))
    tree = TransformerHooks()
    tree.resid.torso.post_mlp.append_fwd(AtLayers(1).append(autoencoder))
    with tree.on(model):
        logits = logits_of(model)
        logits.sum().backward()
    model.zero_grad()
    assert close(logits, clean)
    assert layers == [1] and latents == [(2, 5, 32)]


def test_an_autoencoder_may_hang_in_the_place_itself() -> None:
    torch.manual_seed(0)
    model = small()
    clean = logits_of(model)
    tree = TransformerHooks()
    tree.resid.add_subhooks("post_ln_f", AutoencoderHooks(nn.Linear(16, 32), nn.Linear(32, 16)))
    assert tree.is_empty()  # of hooks; the autoencoder acts all the same
    with tree.on(model):
        assert not close(logits_of(model), clean)
    tree.resid.post_ln_f.add_error = True
    with tree.on(model):
        assert close(logits_of(model), clean)


def test_append_all_passes_over_what_a_model_does_not_have() -> None:
    model, seen = made("llama", "eager"), set()
    tree = TransformerHooks.for_model(model).append_all(lambda value, layer=None: seen.add(layer))
    with tree.on(model):
        logits_of(model).sum().backward()
    model.zero_grad()
    assert seen == {None, 0, 1}
    assert tree.resid.ln_f.post_mean_subtraction.is_empty()


def test_a_tree_acts_in_compiled_code_too_and_compiles_nothing_twice() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    graphs: list[int] = []
    for factor in (0.5, 2.0, 3.0):
        hook = AtLayers(1).append(_Scale(torch.tensor(factor)))
        tree = TransformerHooks().append_to_path(POST_MLP, hook)
        tree.resid.ln_f.scale.append_fwd(_Scale(torch.tensor(factor)))
        with torch.no_grad(), tree.on(model):
            assert close(compiled(IDS).logits, logits_of(model))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


class _Scale:
    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, value: Tensor, layer: int | None = None) -> Tensor:
        return value * self.factor


# --- never silent -----------------------------------------------------------------------------------------------------


def test_a_gradient_that_does_not_come_is_an_error_on_leaving() -> None:
    model, calls, losses = small(), [], []
    tree = tree_of(["mlp.post_act"], lambda _: lambda gradient, layer: calls.append(layer), "bwd")
    says = r"gradient hooks at 'mlp.post_act' were never called: no gradient came by"
    with pytest.raises(SiteNotReached, match=says):
        with tree.on(model):
            losses.append(logits_of(model).sum())
    losses[0].backward()  # outside: the hooks do nothing any more
    model.zero_grad()
    assert calls == []


def test_a_gradient_in_some_layers_is_enough() -> None:
    model, calls = small(), []
    tree = tree_of(["resid.torso.post_mlp"], lambda _: lambda gradient, layer: calls.append(layer), "bwd")
    with tree.on(model), capture(model, "transformer.h.0") as acts:
        logits_of(model)
        acts["transformer.h.0"].sum().backward()
    model.zero_grad()
    assert calls == [0]


def test_a_model_that_is_not_called_warns() -> None:
    with pytest.warns(NotCalledWarning, match=r"hooks.on\(model\) was left, but the model was not called in it"):
        with tree_of(["logits"], lambda _: abs).on(small()):
            pass


def test_a_place_that_no_layer_reaches_is_an_error_on_leaving() -> None:
    model = small()
    with pytest.raises(SiteNotReached, match=r"hooks at 'logits': 'lm_head' was never reached"):
        with tree_of(["logits", "mlp.post_act"], lambda _: lambda value, **_: None).on(model):
            model.transformer(IDS)


def test_hooks_that_come_too_late_are_an_error_on_leaving() -> None:
    tree = tree_of(["logits"], lambda _: lambda value: None)
    with pytest.raises(HooksMisuse, match=r"hooks were appended at 'mlp.post_act' inside hooks.on\(model\)"):
        with tree.on(small()):
            tree.mlp.post_act.append_fwd(abs)
            logits_of(small())
    seen: list[Tensor] = []
    early = tree_of(["logits"], lambda _: lambda value: None)
    with early.on(small()):
        early.logits.append_fwd(seen.append)  # where there are hooks already, one more acts at once
        logits_of(small())
    assert len(seen) == 1


def test_hooks_in_no_place_of_a_transformer_are_an_error_on_entry() -> None:
    tree = TransformerHooks()
    tree.resid.torso.add_subhooks("post_everything", FwdBwdHooks().append_fwd(abs))
    with pytest.raises(HooksMisuse, match=r"'resid.torso.post_everything' has hooks, but is no place in a transformer"):
        tree.on(small()).__enter__()


def test_a_layer_that_is_bound_by_hand_is_an_error_on_entry() -> None:
    tree = tree_of(["mlp.post_act"], lambda _: lambda value, layer: None).bind(layer=3)
    with pytest.raises(HooksMisuse, match=r"keyword 'layer' is bound to Hooks already, as 3"):
        tree.on(small()).__enter__()
    with tree.unbind(["layer"]).on(small()):
        logits_of(small())


@pytest.mark.parametrize(
    "tree",
    [
        TransformerHooks().append_to_path("mlp.pre_act.fwd", AtLayers([0, 7]).append(torch.relu)),
        TransformerHooks().append_to_path("mlp.pre_act.bwd", AtLayers([0, 7]).append(torch.relu)),
        TransformerHooks().append_to_path("mlp.pre_act.fwd", Hooks().append(AtLayers([0, 7]).append(torch.relu))),
        TransformerHooks().append_to_path("mlp.pre_act.fwd", FwdBwdHooks().append_fwd2(AtLayers([0, 7]))),
    ],
)
def test_layers_that_the_model_does_not_have_are_an_error_on_entry(tree: TransformerHooks) -> None:
    with pytest.raises(HooksMisuse) as raised:
        with tree.on(small()):
            pass
    assert str(raised.value).startswith(
        "AtLayers([0, 7]) at 'mlp.pre_act': the model has 2 layers, 0 … 1, and no layer 7: the hooks would never act"
    )
    with pytest.raises(HooksMisuse, match=r"no layer -1: .*\n  .* the last is AtLayers\(1\)\."):
        with TransformerHooks().append_to_path("attn.q.fwd", AtLayers(-1).append(torch.relu)).on(small()):
            pass


def test_at_layers_at_a_place_without_layers_says_so() -> None:
    with pytest.raises(HooksMisuse, match=r"AtLayers\(\[1\]\) was called without layer="):
        with tree_of(["resid.ln_f.scale"], lambda _: AtLayers(1).append(abs)).on(small()):
            logits_of(small())


def test_a_model_without_a_head_has_no_logits() -> None:
    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30)).eval()
    with pytest.raises(UnsupportedModule, match="hooks cannot be at 'logits': GPT2Model has no unembedding"):
        TransformerHooks.for_model(model).logits.append_fwd(abs)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"hooks.on\(model, …\) takes a torch.nn.Module as model, not str"):
        TransformerHooks().on("gpt2")


def test_a_model_of_no_known_family_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="no anatomy of Linear is known"):
        tree_of(["logits"], lambda _: abs).on(nn.Linear(2, 2)).__enter__()


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)


def test_a_norm_of_an_unknown_kind_is_refused() -> None:
    model = MODELS["gpt2"][0]().eval()
    model.transformer.ln_f = Odd()
    with pytest.raises(UnsupportedModule, match=r"'resid.ln_f.scale': Odd is no normalization whose steps are known"):
        tree_of(["resid.ln_f.scale"], lambda _: abs).on(model).__enter__()
    with tree_of(["resid.post_ln_f"], lambda _: lambda value: None).on(model):
        logits_of(model)


def test_a_value_that_does_not_fit_is_named_with_its_place() -> None:
    for place in ("attn.qk_softmax_denominator", "resid.torso.ln_mlp.scale", "mlp.pre_act"):
        with pytest.raises(TypeError, match=r"hooks.on at 'transformer.h.0.*does not broadcast"):
            with tree_of([place], lambda _: lambda value, layer: torch.ones(7, 3)).on(small()):
                logits_of(small())


def test_one_gradient_can_be_asked_for_in_the_middle_of_fwd() -> None:
    model, seen = small(), []
    tree = TransformerHooks()
    place = tree.resid.post_ln_f
    place.append_fwd(grad_hook_wrapper(lambda gradient: seen.append(gradient))).append_fwd(lambda value: value * 3)
    assert isinstance(place.fwd, Hooks)
    with tree.on(model):
        logits_of(model).sum().backward()
    model.zero_grad()
    assert torch.allclose(seen[0], 3 * model.lm_head.weight.sum(0).expand(2, 5, 16), atol=1e-4)
