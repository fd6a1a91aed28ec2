"""Law 5. Inside a transform the cache holds live values; one entered outside gets values lifted to its own level."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from worlds import inputs, make, total

from nicehooks import ModulePath, ablate, capture, captured, edit, patch, steer
from nicehooks.values import trees

PATHS = {
    "Mlp": ["blocks.*", "head@input[0]", "embed[..., 1:]"],
    "Nested": ["inner", "nest[1]['a'][0]", "nest[2]['box']['content'][0]"],
    "Thrice": ["block#*"],
    "Normed": ["gate@input['by']", "norm/2[..., 0, :]"],
}


@pytest.fixture(params=PATHS)
def model(request):
    return make(request.param)


@pytest.fixture
def where(model):
    return PATHS[type(model).__name__]


def close(a, b):
    return torch.allclose(a, b, atol=1e-6)


def by_example(function, xs):
    """The results of `function`, example by example, stacked."""
    found = [function(x) for x in xs]
    return torch.stack([out for out, _ in found]), {k: torch.stack([a[k] for _, a in found]) for k in found[0][1]}


def test_captured_under_vmap_equals_examples(model, where):
    out, acts = vmap(captured(model, where))(inputs())
    expected_out, expected = by_example(captured(model, where), inputs())
    assert close(out, expected_out)
    assert list(acts) == list(expected)
    assert all(close(acts[key], expected[key]) for key in expected)


AROUND = {
    "over the first": (vmap, lambda value: value),
    "over the second": (lambda f: vmap(f, in_dims=1), lambda value: value.transpose(0, 1)),
    "nested": (lambda f: vmap(vmap(f)), lambda value: value),
    "nested, the second first": (lambda f: vmap(vmap(f), in_dims=1), lambda value: value.transpose(0, 1)),
}


@pytest.mark.parametrize("around", AROUND)
def test_captured_outside_vmap_gets_the_full_batch_in_front(model, where, around):
    mapped, as_one_batch = AROUND[around]
    x = torch.stack([inputs(), inputs() + 1, inputs() - 1])
    with capture(model, where) as acts:
        mapped(model)(x)
    with capture(model, where) as expected:
        model(x)  # all of these models act on the last dimension alone
    for key in expected:
        if "norm" not in key:  # its heads put a dimension behind the batch
            assert close(as_one_batch(acts[key]), expected[key])
        assert not torch._C._functorch.is_functorch_wrapped_tensor(acts[key])


def test_a_value_that_is_the_same_for_every_example_still_has_the_full_batch(model):
    with capture(model, "**@weight") as acts:
        vmap(model)(inputs())
    for key, value in acts.items():
        parameter = model.get_parameter(key.replace("@", "."))
        assert value.shape == (5, *parameter.shape)


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_captured_outside_of_derivatives_is_plain(model, where, transform):
    with capture(model, where) as acts:
        transform(lambda x: total(model(x)))(inputs())
    with capture(model, where) as expected:
        model(inputs())
    for key in expected:
        value = acts[key]
        assert not torch._C._functorch.is_functorch_wrapped_tensor(value)
        extra = value.dim() - expected[key].dim()
        assert close(value[(0,) * extra], expected[key])


def test_gradients_flow_through_captured_values(model, where):
    def norm(x):
        _, acts = captured(model, where)(x)
        return sum((value**2).sum() for value in acts.values())

    x = inputs().requires_grad_()
    (expected,) = torch.autograd.grad(norm(x), x)
    assert close(grad(norm)(inputs()), expected)
    per_example = vmap(grad(norm))(inputs())
    assert torch.allclose(per_example, torch.stack([grad(norm)(row) for row in inputs()]), atol=1e-5)


def test_tangents_flow_through_captured_values(model, where):
    tangent = torch.randn(5, 4)
    _, moved = jvp(lambda x: dict(captured(model, where)(x)[1]), (inputs(),), (tangent,))
    for key, value in moved.items():
        step = 1e-3
        high, low = (captured(model, where)(inputs() + sign * step * tangent)[1][key] for sign in (1, -1))
        assert torch.allclose(value, (high - low) / (2 * step), atol=1e-2)


def test_jacobians_of_captured_values(model, where):
    rows = inputs()[0]
    jacobian = jacrev(lambda x: dict(captured(model, where)(x)[1]))(rows)
    forward = jacfwd(lambda x: dict(captured(model, where)(x)[1]))(rows)
    for key in jacobian:
        assert close(jacobian[key], forward[key])


# --- writing ----------------------------------------------------------------------------------------------------------


def values_at(model, path):
    with capture(model, path) as acts:
        model(inputs())
    return acts[path]


SINGLE = {"Mlp": "blocks.1", "Nested": "nest[1]['a'][0]", "Thrice": "block#1", "Normed": "gate@input['by']"}


@pytest.fixture
def path(model):
    return SINGLE[type(model).__name__]


def patched(model, path):
    def run(x, value):
        with patch(model, path, value):
            return model(x)

    return run


@pytest.mark.parametrize("region", ["", "[..., 1]", "[..., 1:3]", "[..., ::2]", "[..., None, 0]"])
def test_a_mapped_value_and_an_unmapped_input(model, path, region):
    region_path = path + region
    value = values_at(model, path)[0]
    values = torch.randn(7, *trees.get(value, ModulePath.parse(f"x{region}").chain).shape)
    x = inputs()[0]
    out = vmap(patched(model, region_path), in_dims=(None, 0))(x, values)
    expected = torch.stack([patched(model, region_path)(x, one) for one in values])
    assert close(out, expected)


@pytest.mark.parametrize("region", ["", "[..., 1]", "[..., 1:3]"])
def test_an_unmapped_value_and_a_mapped_input(model, path, region):
    value = torch.tensor(0.5)
    out = vmap(patched(model, path + region), in_dims=(0, None))(inputs(), value)
    assert close(out, torch.stack([patched(model, path + region)(x, value) for x in inputs()]))


def test_both_mapped_over_different_dimensions(model, path):
    values = torch.randn(3)
    f = patched(model, path + "[..., 0]")
    out = vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(inputs(), values)
    assert close(out, torch.stack([torch.stack([f(x, value) for x in inputs()]) for value in values]))


def test_a_patch_entered_outside(model, path):
    with patch(model, path + "[..., 0]", 0.5):
        mapped, derived = vmap(model)(inputs()), grad(lambda x: total(model(x)))(inputs())
        x = inputs().requires_grad_()
        (expected,) = torch.autograd.grad(total(model(x)), x)
        assert close(mapped, torch.stack([model(x) for x in inputs()]))
        assert close(derived, expected)


def test_gradients_flow_into_patched_values(model, path):
    value = values_at(model, path)
    derived = grad(lambda v: total(patched(model, path)(inputs(), v)))(value)
    leaf = value.detach().requires_grad_()
    (expected,) = torch.autograd.grad(total(patched(model, path)(inputs(), leaf)), leaf)
    assert close(derived, expected)
    assert derived.any()


@pytest.mark.parametrize("way", ["edit", "steer", "ablate"])
def test_edits_under_transforms_equal_examples(model, path, way):
    def run(x):
        context = {
            "edit": lambda: edit(model, path, lambda value: value.sin() * 2),
            "steer": lambda: steer(model, path, torch.ones(1), scale=0.3),
            "ablate": lambda: ablate(model, path),
        }[way]()
        with context:
            return model(x)

    assert close(vmap(run)(inputs()), torch.stack([run(x) for x in inputs()]))
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(total(run(x)), x, allow_unused=True)[0]
    derived = grad(lambda x: total(run(x)))(inputs())
    assert close(derived, torch.zeros_like(derived) if expected is None else expected)


def test_functional_call_inside_and_outside(model):
    """Parameters that `torch.func.functional_call` brings are what the model runs on, and are put back."""
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, weights, (inputs(),))
    name = next(iter(weights))
    owner, _, own = name.rpartition(".")
    with capture(model, "", f"{owner}@{own}") as acts:
        out = torch.func.functional_call(model, weights, (inputs(),))
    assert torch.equal(out, expected)
    assert acts[f"{owner}@{own}"] is weights[name]
    with patch(model, f"{owner}@{own}", 0.25):
        patched_out = torch.func.functional_call(model, weights, (inputs(),))
    assert torch.equal(
        patched_out,
        torch.func.functional_call(model, {**weights, name: torch.full_like(weights[name], 0.25)}, (inputs(),)),
    )
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_per_example_gradients_of_a_parameter_port():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

    def loss(weight, x):
        with patch(model, "0@weight", weight):
            return model(x).sum()

    weight = torch.randn(3, 4)
    found = vmap(grad(loss), in_dims=(None, 0))(weight, inputs())
    for row, x in zip(found, inputs(), strict=True):
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(torch.tanh(x @ leaf.T + model[0].bias).sum(), leaf)
        assert close(row, expected)


def test_randomness_of_vmap_passes_through():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    with capture(model, "1") as acts:
        vmap(model, randomness="different")(torch.ones(8, 100))
    assert acts["1"].shape == (8, 100)
    assert len({tuple(row.tolist()) for row in acts["1"]}) == 8
