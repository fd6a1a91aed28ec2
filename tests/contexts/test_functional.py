"""`functional` and `splice`: differentiable in everything, the model untouched."""

from __future__ import annotations

import pytest
import torch
from gallery.shared import TiedToEmbedding
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from worlds import inputs, make, state, total

from nicehooks import SiteNotFound, TreeMismatch, capture, functional, patch, splice


def params_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_functional_is_the_model_on_other_parameters():
    model, other = make("Mlp"), make("Mlp")
    params = {name: p * 2 for name, p in params_of(model).items()}
    other.load_state_dict(params)
    before = state(model)
    output, acts = functional(model, "blocks.*")(params, inputs())
    with capture(other, "blocks.*") as expected:
        assert torch.equal(output, other(inputs()))
    assert all(torch.equal(acts[key], expected[key]) for key in expected)
    assert state(model) == before


def test_functional_is_differentiable_in_each_argument():
    model = make("Mlp")
    f = functional(model, "head")
    params, value = params_of(model), torch.randn(5, 6)

    def loss(params, value, x):
        return total(f(params, x, patches={"blocks.1": value})[0]) + total(f(params, x)[1]["head"])

    found = grad(loss, argnums=(0, 1, 2))(params, value, inputs())
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    v, x = value.clone().requires_grad_(), inputs().requires_grad_()
    loss(leaves, v, x).backward()
    assert all(torch.allclose(found[0][name], leaf.grad, atol=1e-6) for name, leaf in leaves.items())
    assert torch.allclose(found[1], v.grad) and torch.allclose(found[2], x.grad, atol=1e-6)
    assert v.grad.any() and x.grad.any()


def test_functional_over_an_ensemble_and_over_examples():
    model = make("Mlp")
    stacked = {name: torch.stack([p, p * 2, p * 3]) for name, p in params_of(model).items()}
    outs, acts = vmap(functional(model, "embed"), in_dims=(0, None))(stacked, inputs())
    for i in range(3):
        out, act = functional(model, "embed")({name: p[i] for name, p in stacked.items()}, inputs())
        assert torch.allclose(outs[i], out, atol=1e-5) and torch.allclose(acts["embed"][i], act["embed"], atol=1e-6)
    per_example = vmap(grad(lambda params, x: total(functional(model)(params, x)[0])), in_dims=(None, 0))
    assert per_example(params_of(model), inputs())["head.bias"].shape == (5, 2)
    assert jacrev(lambda p: functional(model)(p, inputs())[0])(params_of(model))["head.bias"].shape == (5, 2, 2)


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["again.weight"], ["embed.weight", "again.weight"], ["head.weight"]]
)
def test_functional_is_safe_for_shared_and_tied_parameters(names):
    model = TiedToEmbedding()
    before, clean = state(model), model(inputs())
    new = torch.randn(4, 4)
    for _ in range(2):
        output, _ = functional(model)(dict.fromkeys(names, new), inputs())
        assert torch.allclose(output, inputs() @ new.T @ new.T @ new.T, atol=1e-5)
        assert state(model) == before
        assert torch.equal(model(inputs()), clean)


@pytest.mark.parametrize("name", ["embed.weight", "again.weight", "head.weight"])
@pytest.mark.parametrize("world", ["grad", "vmap(grad)", "grad(vmap)", "jacrev"])
def test_the_gradient_of_a_tied_parameter_is_that_of_all_its_uses(name, world):
    model, weight = TiedToEmbedding().double(), torch.randn(4, 4, dtype=torch.double)
    before, x = state(model), inputs().double()

    def loss(weight, x):
        return functional(model)({name: weight}, x)[0].sin().sum()

    def by_hand(weight, x):
        return (x @ weight.T @ weight.T @ weight.T).sin().sum()

    found, expected = (
        {
            "grad": lambda f: grad(f)(weight, x),
            "vmap(grad)": lambda f: vmap(grad(f), in_dims=(None, 0))(weight, x),
            "grad(vmap)": lambda f: grad(lambda w: vmap(f, in_dims=(None, 0))(w, x).sum())(weight),
            "jacrev": lambda f: jacrev(f)(weight, x),
        }[world](f)
        for f in (loss, by_hand)
    )
    assert torch.allclose(found, expected) and found.any()
    assert state(model) == before


def test_functional_says_what_is_wrong():
    with pytest.raises(SiteNotFound, match="Mlp has no parameter or buffer 'nope'"):
        functional(make("Mlp"))({"nope": torch.ones(1)}, inputs())
    with pytest.raises(TreeMismatch, match=r"'embed\.weight' and 'again\.weight' are one parameter"):
        functional(TiedToEmbedding())({"embed.weight": torch.ones(4, 4), "again.weight": torch.zeros(4, 4)}, inputs())


# --- splice -----------------------------------------------------------------------------------------------------------


def test_splice_sends_values_through_a_module():
    model, autoencoder = make("Mlp"), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
    with capture(model, "blocks.1") as acts:
        clean = model(inputs())
    with splice(model, "blocks.1", autoencoder), capture(autoencoder, "1") as latents:
        out = model(inputs())
    with patch(model, "blocks.1", autoencoder(acts["blocks.1"])):
        assert torch.equal(out, model(inputs()))
    assert latents["1"].shape == (5, 9)
    with splice(model, "blocks.1", autoencoder, error=True):
        assert torch.allclose(model(inputs()), clean, atol=1e-5)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("world", ["autograd", "grad", "vmap(grad)"])
def test_gradients_go_through_the_module_and_not_through_the_error(world, error):
    """To the value, and to the parameters of the module; the error term is a constant."""
    model, autoencoder = make("Mlp"), nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    weights, x = dict(autoencoder.named_parameters()), inputs()

    def through(weights, x):
        with splice(model, "embed", lambda value: functional_call(autoencoder, weights, value), error=error):
            return total(model(x))

    leaf = x.clone().requires_grad_()
    embed = model.embed(leaf)
    new = autoencoder(embed)
    constant = embed.detach() - new.detach() if error else 0.0
    with patch(model, "embed", new + constant):
        loss = total(model(leaf))
    *by_weights, by_input = torch.autograd.grad(loss, [*weights.values(), leaf])
    assert all(gradient.any() for gradient in (*by_weights, by_input))
    if world == "autograd":
        given = x.clone().requires_grad_()
        *found, of_input = torch.autograd.grad(through(weights, given), [*weights.values(), given])
    else:
        run = grad(through, argnums=(0, 1))
        of_weights, of_input = vmap(run, in_dims=(None, 0))(weights, x) if world == "vmap(grad)" else run(weights, x)
        found = [g.sum(0) if world == "vmap(grad)" else g for g in of_weights.values()]
    assert torch.allclose(of_input, by_input, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, by_weights, strict=True))


def test_a_module_that_has_buffers_alone_gets_the_value_in_their_dtype():
    model, norm = make("Mlp").bfloat16(), nn.BatchNorm1d(6, affine=False).eval()
    x = inputs().bfloat16()
    with splice(model, "embed", norm), capture(model, "embed") as acts:
        model(x)
    assert torch.equal(acts["embed"], norm(model.embed(x).float()).bfloat16())


def test_splice_says_what_does_not_fit():
    model = make("Mlp")
    with (
        pytest.raises(TreeMismatch, match=r"splice at 'head': Tensor\[5, 3\] float32 came out of the module"),
        splice(model, "head", nn.Linear(2, 3)),
    ):
        model(inputs())
    with pytest.raises(TypeError, match="takes a module or a function"):
        splice(model, "head", 3)
