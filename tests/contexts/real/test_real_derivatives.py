"""Real models under autograd and the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from by_hooks import (
    changed_by_hook,
    on_residual,
    put,
)
from gallery.architectures import ARCHITECTURES, Architecture, answer, tokens
from torch import Tensor, nn

from nicehooks import (
    CheckpointWarning,
    ablate,
    capture,
    captured,
    edit,
    patch,
    select,
    steer,
)

# --- autograd ---------------------------------------------------------------------------------------------------------


def test_gradients_reach_captured_values(arch, model):
    inputs = arch.inputs(1)
    kept: list[Tensor] = []
    for block in arch.blocks:
        name, hook = on_residual(block, lambda value: kept.append(value) or value.retain_grad() or value)
        with changed_by_hook(model, name, hook):
            answer(model(**inputs)).square().mean().backward()
    with capture(model, arch.blocks) as acts:
        output = model(**inputs)
    gradients = torch.autograd.grad(answer(output).square().mean(), acts.values())
    for gradient, by_hand in zip(gradients, kept, strict=True):
        assert torch.equal(gradient, by_hand.grad)
        assert gradient.any()


def test_gradients_reach_patched_values_and_no_further(arch, model):
    inputs, block = arch.inputs(1), arch.blocks[0]
    value, by_hand = torch.ones(32, requires_grad=True), torch.ones(32, requires_grad=True)
    with changed_by_hook(model, *on_residual(block, lambda x: put(x, (slice(None), slice(None)), by_hand))):
        answer(model(**inputs)).square().mean().backward()
    model.zero_grad()
    with patch(model, block, value):
        answer(model(**inputs)).square().mean().backward()
    assert torch.equal(value.grad, by_hand.grad)
    first = on_residual(block, abs)[0]
    upstream = {n: p.grad for n, p in model.get_submodule(first).named_parameters() if p.grad is not None}
    # the first block of a T5 also makes the position bias of all others
    assert {name for name, gradient in upstream.items() if gradient.any()} <= {
        "layer.0.SelfAttention.relative_attention_bias.weight"
    }


def test_training_inside_a_context(arch):
    """A step of an optimizer inside a context, with one block ablated, is a step of a model with hooks."""
    losses: dict[str, list[float]] = {}
    for way in ("hooks", "contexts"):
        model, inputs = arch.build(), arch.inputs(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ablation = (
            ablate(model, f"{arch.blocks[0]}[:, 0]")
            if way == "contexts"
            else changed_by_hook(model, *on_residual(arch.blocks[0], lambda x: put(x, (slice(None), 0), 0.0)))
        )
        losses[way] = []
        with ablation:
            for _ in range(3):
                optimizer.zero_grad()
                loss = answer(model(**inputs)).square().mean()
                loss.backward()
                optimizer.step()
                losses[way].append(loss.item())
    assert losses["contexts"] == losses["hooks"]
    assert losses["hooks"][0] != losses["hooks"][-1]


def change_inside_a_block(kind: str, arch: Architecture, model: Any) -> Any:
    """A change that is made within a block, so within an activation-checkpointed region."""
    owner = arch.heads.partition("@")[0]
    if kind == "a head":
        return ablate(model, f"{arch.heads}[:, :, 1]")
    if kind == "an input":
        return edit(model, f"{owner}@input[0][:, 1]", torch.neg)
    if kind == "an output":
        return edit(model, f"{owner}[:, 1]", torch.neg)
    if kind == "a first call":
        return edit(model, f"{owner}[:, 1]", torch.neg, calls=0)
    if kind == "a weight":
        return edit(model, f"{owner}@weight", torch.neg)
    # "the last output": after it a block only adds, and backward need not run it to its end again
    block = on_residual(arch.blocks[1], abs)[0]
    with capture(model, "**") as acts:
        model(**arch.inputs(1))
    return edit(model, [name for name in acts if name.startswith(f"{block}.")][-1], torch.neg)


INSIDE_BLOCKS = ["a head", "an input", "an output", "the last output", "a first call", "a weight"]


def without_dropout(model: Any) -> Any:
    """`model` in training mode, where checkpointing acts, but with nothing left to chance."""
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    return model.train()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", INSIDE_BLOCKS)
def test_backward_of_a_checkpointed_model_inside_a_context(arch, use_reentrant, kind):
    """The backward pass runs each block again, under the same context: its edits are made again."""
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model, inputs = without_dropout(arch.build()), {**arch.inputs(1), "use_cache": False}
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        around = edit(model, f"{arch.blocks[0]}[:, 1]", lambda value: value * 2)
        inside = change_inside_a_block(kind, arch, model)
        with around, inside, capture(model, arch.blocks):
            answer(model(**inputs)).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, msg=lambda text, p=parameter: f"{p}: {text}")


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", INSIDE_BLOCKS)
def test_backward_of_a_checkpointed_model_outside_of_the_context_is_warned_of(arch, use_reentrant, kind):
    model, inputs = without_dropout(arch.build()), {**arch.inputs(1), "use_cache": False}
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    change = change_inside_a_block(kind, arch, model)
    with pytest.warns(CheckpointWarning, match="run backward in"), change:
        model(**inputs)
    with capture(model, "**"), edit(model, arch.blocks[0], lambda value: value * 2):  # neither is run again
        loss = answer(model(**inputs)).square().mean()
    loss.backward()


# --- torch.func -------------------------------------------------------------------------------------------------------


def on_example(arch: Architecture, model: Any) -> tuple[Callable[..., Any], Tensor]:
    """`run(f, x)` calls `f` (the model, or what stands for it) on one example, and a batch of such examples."""
    if arch.embeds is None:
        return lambda f, x: f(pixel_values=x[None]), arch.inputs(1)["pixel_values"].double()
    length = 5 if arch.embeds == "decoder_inputs_embeds" else 7
    xs = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    more = {"use_cache": False} if arch is not ARCHITECTURES["bert"] else {}
    more |= {"input_ids": tokens(1, batch=1)} if arch is ARCHITECTURES["t5"] else {}
    return lambda f, x: f(**{arch.embeds: x[None]}, **more), xs


def seen_by_library(arch: Architecture, model: Any) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    run, xs = on_example(arch, model)

    def seen(x: Tensor) -> dict[str, Tensor]:
        output, acts = run(captured(model, *arch.blocks, arch.heads), x)
        return {**acts, "answer": answer(output)}

    return seen, xs


def seen_by_hand(arch: Architecture, model: Any) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    run, xs = on_example(arch, model)

    def seen(x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles: list[Any] = []

        def hook(module: Any, args: Any, output: Any, path: str) -> None:
            found[path] = output[0] if path.endswith("[0]") else output

        for path in arch.blocks:
            module = model.get_submodule(path.removesuffix("[0]"))
            handles.append(module.register_forward_hook(partial(hook, path=path)))
        owner = model.get_submodule(arch.heads.partition("@")[0])
        handles.append(
            owner.register_forward_pre_hook(
                lambda module, args: found.update({arch.heads: args[0].unflatten(-1, (4, 8))})
            )
        )
        output = run(model, x)
        for handle in handles:
            handle.remove()
        return {**found, "answer": answer(output)}

    return seen, xs


def total(values: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sin().sum() for value in values.values()]).sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": lambda f, xs: torch.vmap(f)(xs),
    "grad": lambda f, xs: torch.func.grad(lambda x: total(f(x)))(xs[0]),
    "grad with activations": lambda f, xs: torch.func.grad(lambda x: (total(v := f(x)), v), has_aux=True)(xs[0]),
    "vjp": lambda f, xs: (pair := torch.func.vjp(f, xs[0])) and pair[1](pair[0])[0],
    "jvp": lambda f, xs: torch.func.jvp(f, (xs[0],), (xs[1],)),
    "jacrev": lambda f, xs: torch.func.jacrev(lambda x: {k: v.sum(-1) for k, v in f(x).items()})(xs[0]),
    "jacfwd": lambda f, xs: torch.func.jacfwd(lambda t: f(xs[0] + t * xs[1]))(torch.zeros((), dtype=torch.float64)),
    "vmap of grad": lambda f, xs: torch.vmap(torch.func.grad(lambda x: total(f(x))))(xs),
    "grad of vmap": lambda f, xs: torch.func.grad(lambda rows: total(torch.vmap(f)(rows)))(xs),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_captured_are_those_of_hooks(arch, model, transform):
    model.double()
    results = []
    for make in (seen_by_library, seen_by_hand):
        f, xs = make(arch, model)
        results.append(TRANSFORMS[transform](f, xs))
    mine, by_hand = (torch.utils._pytree.tree_leaves(dict_by_key(result)) for result in results)
    assert len(mine) == len(by_hand) > 0
    assert all(torch.equal(a, b) for a, b in zip(mine, by_hand, strict=True))
    assert any(value.any() for value in mine)


def dict_by_key(tree: Any) -> Any:
    """`tree` with the keys of every dict sorted: caches are in execution order, and here orders differ."""
    if isinstance(tree, dict):
        return {key: dict_by_key(tree[key]) for key in sorted(tree)}
    return tuple(map(dict_by_key, tree)) if isinstance(tree, tuple) else tree


def test_vmap_over_examples_is_a_loop_over_them(arch, model):
    seen, xs = seen_by_library(arch, model.double())
    stacked = torch.vmap(seen)(xs)
    for i, x in enumerate(xs):
        alone = seen(x)
        assert stacked.keys() == alone.keys()
        for path, value in alone.items():
            torch.testing.assert_close(stacked[path][i], value, rtol=1e-10, atol=1e-10)


def test_a_context_around_vmap_holds_the_whole_batch(arch, model):
    """Law 5: a cache that was entered outside receives the full batch, with the mapped dimension in front."""
    run, xs = on_example(arch, model.double())
    seen, _ = seen_by_library(arch, model)
    expected = torch.vmap(seen)(xs)
    with capture(model, *arch.blocks, arch.heads) as acts:
        torch.vmap(lambda x: answer(run(model, x)))(xs)
    assert {path: value.shape for path, value in acts.items()} == {p: expected[p].shape for p in acts}
    assert all(torch.equal(value, expected[path]) for path, value in acts.items())


@pytest.mark.parametrize("mapped", ["inputs", "patches", "both"])
def test_patches_under_vmap_are_a_loop(arch, model, mapped):
    run, xs = on_example(arch, model.double())
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def patched(x: Tensor, value: Tensor) -> Tensor:
        with patch(model, f"{arch.blocks[0]}[:, 2]", value):
            return answer(run(model, x))

    dims = {"inputs": (0, None), "patches": (None, 0), "both": (0, 0)}[mapped]
    rows = [(xs[i] if dims[0] == 0 else xs[0], values[i] if dims[1] == 0 else values[0]) for i in range(3)]
    result = torch.vmap(patched, in_dims=dims)(xs if dims[0] == 0 else xs[0], values if dims[1] == 0 else values[0])
    torch.testing.assert_close(result, torch.stack([patched(*row) for row in rows]), rtol=1e-10, atol=1e-10)
    assert not torch.equal(result[0], result[1])


def test_the_gradient_with_respect_to_a_steering_vector(arch, model):
    """Through `torch.func.grad`, against autograd through a hand-written hook."""
    run, xs = on_example(arch, model.double())
    block, vector = arch.blocks[0], torch.full((32,), 0.1, dtype=torch.float64)

    def loss(vector: Tensor) -> Tensor:
        with steer(model, block, vector, scale=2.0):
            return answer(run(model, xs[0])).square().sum()

    by_hand = vector.clone().requires_grad_()
    with changed_by_hook(model, *on_residual(block, lambda value: value + 2.0 * by_hand)):
        answer(run(model, xs[0])).square().sum().backward()
    gradient = torch.func.grad(loss)(vector)
    assert torch.equal(gradient, by_hand.grad)
    assert gradient.any()


def test_a_parameter_patch_under_vmap_is_an_ensemble(arch, model):
    run, xs = on_example(arch, model.double())
    path = f"{arch.heads.partition('@')[0]}@weight"
    (site,) = select(model, path)
    weights = torch.stack([site.module.weight.detach() * scale for scale in (0.5, 1.0, 2.0)])

    def member(weight: Tensor) -> Tensor:
        with patch(model, path, weight):
            return answer(run(model, xs[0]))

    expected = torch.stack([member(weight) for weight in weights])
    torch.testing.assert_close(torch.vmap(member)(weights), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(expected[1], answer(run(model, xs[0])))
    assert not torch.equal(expected[0], expected[1])
