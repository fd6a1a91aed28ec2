"""The laws of contexts, for trees of hooks that are bound to a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers_by_hand as by_hand
from gallery.families import IDS, MODELS, made, small
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from tree_hooks import POST_MLP, Recorder, close, logits_of, state_of, tree_of

from nicehooks import UnsupportedModule, capture, steer
from nicehooks.compat.transformer_debugger.places import PLACES
from nicehooks.hooktrees import AtLayers, AutoencoderHooks, TransformerHooks, grad_hook_wrapper


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradient_hooks_act_in_compiled_code_without_a_break_in_the_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = small()
    weight = model.transformer.wte.weight

    def gradient(run: Any) -> Tensor:
        tree = TransformerHooks().append_to_path(
            "resid.torso.post_mlp.bwd", AtLayers(0).append(_Scale(torch.tensor(3.0)))
        )
        tree.append_to_path("mlp.post_act.fwd", AtLayers(1).append(grad_hook_wrapper(_Scale(torch.tensor(0.5)))))
        with tree.on(model):
            return torch.autograd.grad(run(IDS).logits.log_softmax(-1)[..., 0].sum(), weight)[0]

    def clean(run: Any) -> Tensor:
        return torch.autograd.grad(run(IDS).logits.log_softmax(-1)[..., 0].sum(), weight)[0]

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = gradient(compiled)
    assert close(found, gradient(model)) and not close(found, clean(model))
    assert close(clean(compiled), clean(model))


class _Scale:
    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, value: Tensor, layer: int | None = None) -> Tensor:
        return value * self.factor
