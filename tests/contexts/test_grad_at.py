"""`grad_at`: the gradients of a metric at any site, with one forward and one backward, the model untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery.architectures import gpt2, llama, tokens
from gallery.checkpointed import CheckpointedFunction
from gallery.returning import UsesOne
from gallery.shared import TiedToEmbedding
from gallery.values import Box, Pair
from torch import nn
from torch.func import grad, jacrev, vmap
from worlds import inputs, make, state, total

from nicehooks import (
    SiteNotFound,
    SiteNotReached,
    TreeMismatch,
    UnsupportedModule,
    ablate,
    capture,
    captured,
    grad_at,
    patch,
)


def by_patching(model, path, metric):
    """The gradient of the metric with respect to a value that is patched in: what `grad_at` has to be equal to."""
    with capture(model, path) as acts, torch.no_grad():
        model(inputs())
    return grad(lambda value: metric(_with(model, path, value)))(acts[path])


def _with(model, path, value):
    with patch(model, path, value):
        return model(inputs())


PATHS = {
    "Mlp": [
        *("embed", "blocks.1", "blocks.0.1[:, -1]", "head", "", "embed/2[..., 0, 1:]", "embed[None, ..., 2]"),
        *("blocks.2@input[0]", "head@input[0][:, ::2]", "@input['x'][0]"),
        *("embed@weight", "head@bias", "blocks.1.0@weight[:, 2]"),
    ],
    "Nested": ["nest[1]['a'][0]", "nest[0]['left'][:, 1:]", "inner@bias"],
    "Thrice": ["block#0", "block#1@input[0]", "block#2[0]"],
    "Normed": ["gate@input['by']", "gate@input['value'][..., 0]", "norm@weight", "gate@sigmoid()"],
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in PATHS.items() for path in paths])
def test_gradients_at_a_site(name, path, frozen):
    model = make(name).requires_grad_(not frozen)
    before = state(model)
    value, grads = grad_at(model, path, total)(inputs())
    assert state(model) == before
    assert torch.allclose(value, total(model(inputs())))
    assert list(grads) == [path]
    assert torch.allclose(grads[path], by_patching(model, path, total), atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_parts_of_one_value_and_the_order_of_the_forward():
    """Sites that overlap do not disturb each other, and stand in the order in which the model came by."""
    model = make("Mlp")
    paths = ["head", "embed[0]", "embed", "embed[0]/2[1]", "embed@weight", "blocks.1"]
    _, grads = grad_at(model, paths, total)(inputs())
    assert list(grads) == ["embed@weight", "embed[0]", "embed", "embed[0]/2[1]", "blocks.1", "head"]
    assert all(torch.allclose(grads[path], by_patching(model, path, total), atol=1e-5) for path in paths)


def test_one_site_per_index_and_per_call():
    _, whole = grad_at(make("Mlp"), "embed", total)(inputs())
    _, rows = grad_at(make("Mlp"), "embed[*]", total)(inputs())
    assert list(rows) == [f"embed[{i}]" for i in range(5)]
    assert all(torch.equal(rows[f"embed[{i}]"], whole["embed"][i]) for i in range(5))
    _, calls = grad_at(make("Thrice"), "block#*", total)(inputs())
    assert list(calls) == ["block#0", "block#1", "block#2"]
    _, last = grad_at(make("Thrice"), "block", total)(inputs())
    assert torch.equal(last["block"], calls["block#2"])


def test_the_gradient_of_a_tree_is_a_tree():
    model = make("Nested")
    _, grads = grad_at(model, "nest", total)(inputs())
    pair, ordered, boxed = grads["nest"]
    assert type(pair) is Pair and type(boxed["box"]) is Box and pair.right[1] is None
    parts = {"nest[0]['left']": pair.left, "nest[0]['right'][0]": pair.right[0], "nest[1]['b']": ordered["b"]}
    for path, gradient in parts.items():
        assert torch.allclose(gradient, by_patching(model, path, total), atol=1e-6)


def test_what_the_metric_does_not_depend_on():
    model = UsesOne()
    _, grads = grad_at(model, "several", total)(inputs())
    used, unused, integers, text = grads["several"]
    assert used.any() and not unused.any() and unused.shape == (5, 4) and integers is None and text == "text"
    _, grads = grad_at(model, "*", total)(inputs())
    assert list(grads) == ["several"]  # of a wildcard's sites one was reached
    with pytest.raises(SiteNotReached, match=r"^'aside' has no gradient in UsesOne: the metric does not depend on it"):
        grad_at(model, ["aside", "several"], total)(inputs())
    with pytest.raises(SiteNotReached, match="has no gradient"):
        grad_at(model, "*", lambda output: output.detach().sum())(inputs())
    assert all("forward" not in vars(module) for module in model.modules())


def test_one_forward_and_one_backward_serve_all_sites():
    model = make("Mlp")
    forwards, backwards = [], []
    model.embed.register_forward_hook(lambda *args: forwards.append(args))
    model.head.register_forward_hook(
        lambda module, args, out: out.register_hook(lambda g: backwards.append(g)) and None
    )
    where = ["**", "**@weight", "blocks.*@input[0]", "embed[*]"]
    _, grads = grad_at(model, where, total)(inputs())
    assert (len(forwards), len(backwards)) == (1, 1)
    assert len(grads) == 12 + 5 + 3 + 5
    vmap(grad_at(model, where[:3], total))(inputs())
    assert (len(forwards), len(backwards)) == (2, 2)


def test_tied_parameters_and_one_submodule_under_two_names():
    model, new = TiedToEmbedding(), torch.randn(4, 4)
    for path in ("embed@weight", "again@weight", "head@weight"):
        _, grads = grad_at(model, path, total)(inputs())
        assert torch.allclose(
            next(iter(grads.values())),
            grad(lambda w: total(inputs() @ w.T @ w.T @ w.T))(model.embed.weight.detach()),
            atol=1e-4,
        )
    with patch(model, "embed@weight", new):
        _, grads = grad_at(model, "head@weight", total)(inputs())
    assert torch.allclose(
        grads["head@weight"], grad(lambda w: total(inputs() @ w.T @ w.T @ w.T))(new), rtol=1e-3, atol=1e-3
    )


def test_values_and_gradients_of_each_example():
    model, where = make("Mlp"), ["blocks.*", "head@input[0]", "embed@weight", "embed[..., :2]"]
    values, grads = vmap(grad_at(model, where, total))(inputs())
    for i, x in enumerate(inputs()):
        value, expected = grad_at(model, where, total)(x)
        assert torch.allclose(values[i], value)
        assert all(torch.allclose(grads[key][i], expected[key], atol=1e-6) for key in expected)


def test_it_composes_with_what_is_around_it():
    """With contexts around, with plain autograd, and with a transform of the gradients."""
    model = make("Mlp").double()
    x = inputs().double().requires_grad_()
    with ablate(model, "blocks.1[..., 0]"):
        _, grads = grad_at(model, "blocks.1", total)(x)
    assert not grads["blocks.1"].equal(grad_at(model, "blocks.1", total)(x)[1]["blocks.1"])

    def at_embed(x):
        return grad_at(model, "embed", total)(x)[1]["embed"]

    (through,) = torch.autograd.grad(at_embed(x).sin().sum(), x)
    assert torch.allclose(through, grad(lambda x: at_embed(x).sin().sum())(x.detach()))
    _, (along,) = torch.autograd.functional.vhp(
        lambda e: total(_with_double(model, e)), (model.embed(x.detach()),), (torch.ones(5, 6).double(),)
    )
    assert torch.allclose(jacrev(lambda x: at_embed(x).sum())(x.detach()), along @ model.embed.weight)
    with torch.no_grad():
        assert torch.allclose(at_embed(x), at_embed(x.detach()))


def _with_double(model, embed):
    with patch(model, "embed", embed):
        return model(inputs().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_model_stays(dtype):
    model, x = make("Mlp").to(dtype), inputs().to(dtype)
    value, grads = grad_at(model, "**", lambda output: output.sum())(x)
    assert value.dtype == dtype and torch.equal(value, model(x).sum())
    assert {gradient.dtype for gradient in grads.values()} == {dtype}


def test_behind_in_place_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Hardtanh(inplace=True))
    plain = nn.Sequential(model[0], nn.ReLU(), model[2], nn.Hardtanh())
    where = ["0", "1", "2", "3", "2@input[0]"]
    _, grads = grad_at(model, where, total)(inputs())
    _, expected = grad_at(plain, where, total)(inputs())
    assert all(torch.allclose(grads[key], expected[key]) for key in expected)


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])
def test_attribution_patching_in_a_language_model(build):
    """Effects at block outputs, head outputs and attention weights, of one forward and one backward."""
    model = build().eval()
    blocks = "transformer.h" if build is gpt2 else "model.layers"
    heads = f"{blocks}.1.attn.c_proj" if build is gpt2 else f"{blocks}.1.self_attn.o_proj"
    where = [f"{blocks}.*", f"{heads}@input[0]/4", f"{heads}@weight"]

    def metric(output):
        return output.logits[:, -1, 3].sum()

    value, grads = grad_at(model, where, metric)(tokens(0))
    output, acts = captured(model, f"{blocks}.*", f"{heads}@input[0]", f"{heads}@weight")(tokens(0))
    assert torch.allclose(value, metric(output), atol=1e-5)
    for path, expected in zip(acts, torch.autograd.grad(metric(output), list(acts.values())), strict=True):
        found = grads[path] if path in grads else grads[f"{path}/4"].flatten(-2)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert len(grads) == 5 and grads[f"{heads}@input[0]/4"].shape == (3, 7, 4, 8)


def test_grad_at_says_what_is_wrong():
    model = make("Mlp")
    with pytest.raises(UnsupportedModule, match="'embed@grad': grad_at takes the paths of values"):
        grad_at(model, "embed@grad", total)
    with pytest.raises(SiteNotFound, match="no module matches 'nope'"):
        grad_at(model, "nope", total)
    with pytest.raises(TreeMismatch, match=r"the metric of grad_at returned Tensor\[5, 2\] float32, and not a scalar"):
        grad_at(model, "embed", lambda output: output)(inputs())
    with pytest.raises(TreeMismatch, match="the metric of grad_at returned float, and not a scalar tensor"):
        grad_at(model, "embed", lambda output: output.sum().item())(inputs())
    assert all("forward" not in vars(module) for module in model.modules())


def test_places_may_be_the_keys_of_a_mapping():
    model = make("Mlp")
    with capture(model, ["embed", "head"]) as acts:
        model(inputs())
    assert list(grad_at(model, acts, total)(inputs())[1]) == ["embed", "head"]


def second_order(gradients, model, x):
    """The gradient of a function of gradients, with respect to the parameters and what is around."""
    return torch.autograd.grad(sum(g.sin().sum() for g in gradients), [x, *model.parameters()], allow_unused=True)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_can_be_differentiated_again(leaf, times):
    """By plain autograd, as if the graph of the backward had been made: for leaves, and for what has a graph itself."""
    model, base = make("Mlp").double(), inputs().double().requires_grad_()
    paths = ["embed", "blocks.1", "head"]
    x = base if leaf else base * 1.5
    with capture(model, paths) as acts:
        value = total(model(x)).sin()
    expected = torch.autograd.grad(value, list(acts.values()), create_graph=True)
    _, grads = grad_at(model, paths, lambda output: total(output).sin())(x)
    found: Any = ()
    for _ in range(times):
        found = torch.autograd.grad(
            sum(g.sin().sum() for g in grads.values()),
            [x, *model.parameters()],
            allow_unused=True,
            retain_graph=True,
        )
    for a, b in zip(found, second_order(expected, model, x), strict=True):
        assert (a is None and (b is None or not b.any())) or torch.allclose(a, b)
    assert not leaf or found[0].any()


def test_the_value_can_be_differentiated_and_what_is_frozen_keeps_no_graph():
    model = make("Mlp")
    value, _ = grad_at(model, "embed", total)(inputs())
    value.backward()
    expected = torch.autograd.grad(total(model(inputs())), list(model.parameters()))
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    for value, grads in (
        grad_at(model.requires_grad_(False), "embed", total)(inputs()),
        torch.no_grad()(grad_at(model.requires_grad_(True), "embed", total))(inputs()),
    ):
        assert not value.requires_grad and not grads["embed"].requires_grad
    with torch.inference_mode():
        _, grads = grad_at(model, "embed", total)(inputs())
    assert torch.allclose(grads["embed"], grad_at(model, "embed", total)(inputs())[1]["embed"])


def test_a_region_that_backward_runs_again():
    model, x = CheckpointedFunction(), inputs().requires_grad_()
    _, grads = grad_at(model, ["a", "b"], total)(x)
    first = model.a(x)
    second = model.b(first.sin())
    expected = torch.autograd.grad(total(second.sin()), [first, second])
    assert list(grads) == ["a", "b"]
    assert all(torch.allclose(g, e) for g, e in zip(grads.values(), expected, strict=True))


def test_gradients_can_be_differentiated_again_where_only_a_part_of_the_model_enters_them():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), torch.randn(2, 4)
    _, grads = grad_at(model, "0", lambda output: output.sum())(x)
    grads["0"].pow(2).sum().backward()
    assert torch.allclose(model[1].weight.grad, 4 * model[1].weight)  # two rows, each 2 w
    assert model[0].weight.grad is None or not model[0].weight.grad.any()


def test_one_gradient_of_several_can_be_differentiated_alone():
    model, base = make("Mlp").double(), inputs().double()
    paths = ["embed", "blocks.1"]
    with capture(model, paths) as acts:
        value = total(model(base)).sin()
    expected = torch.autograd.grad(value, list(acts.values()), create_graph=True)
    _, grads = grad_at(model, paths, lambda output: total(output).sin())(base)
    for path, one in zip(paths, expected, strict=True):
        asked = [torch.autograd.grad(g.sin().sum(), model.head.weight, retain_graph=True) for g in (grads[path], one)]
        assert torch.allclose(*map(torch.stack, asked)) and asked[0][0].any()


def test_the_gradient_of_a_weight_may_be_sparse():
    model, ids = nn.Sequential(nn.Embedding(5, 3, sparse=True)), torch.tensor([1, 2])
    _, grads = grad_at(model, "0@weight", total)(ids)
    (expected,) = torch.autograd.grad(total(model(ids)), model[0].weight)
    assert grads["0@weight"].is_sparse and torch.equal(grads["0@weight"].to_dense(), expected.to_dense())
