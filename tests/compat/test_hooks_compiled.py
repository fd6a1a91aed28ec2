"""`run` and registered hooks under transforms and in compiled code."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from worlds import inputs, state

from nicehooks import (
    edit,
    register_forward_hook,
    register_forward_pre_hook,
    register_full_backward_hook,
    register_full_backward_pre_hook,
    run,
)

PATHS = ["first", "two", "two.inner", "", "first[..., 1]", "two[..., :2]"]


def scaled(module, path, given, output_gradients=None):
    more = 0 if output_gradients is None else output_gradients[0].sum()
    return tuple(None if g is None else g * 3 + more for g in given)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("register", [register_full_backward_hook, register_full_backward_pre_hook])
def test_hooks_on_gradients_in_transforms_equal_one_example_at_a_time(net, register, path):
    if path == "two[..., :2]" and register is register_full_backward_pre_hook:
        path = "two[0][..., :2]"

    def f(row):
        return net(row).sin().sum()

    def plain(row):
        row = row.clone().requires_grad_()
        return torch.autograd.grad(f(row), row)[0]

    def around(rows):
        rows = rows.clone().requires_grad_()
        return torch.autograd.grad(torch.vmap(f)(rows).sum(), rows)[0]

    def of_parameters(rows):
        parameters = dict(net.named_parameters())
        loss = lambda p, row: torch.func.functional_call(net, p, (row,)).sin().sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, rows)["first.weight"]

    rows = inputs()
    clean = torch.stack([plain(row) for row in rows])
    with register(net, path, scaled):
        expected = torch.stack([plain(row) for row in rows])
        weights = torch.stack([torch.autograd.grad(f(row), net.first.weight)[0] for row in rows])
        results = [torch.vmap(torch.func.grad(f))(rows), torch.func.grad(lambda x: torch.vmap(f)(x).sum())(rows)]
        results += [around(rows), torch.stack([torch.func.grad(f)(row) for row in rows])]
        assert torch.allclose(of_parameters(rows), weights, atol=1e-5)
    assert not torch.allclose(expected, clean)
    for result in results:
        assert torch.allclose(result, expected, atol=1e-5)


@pytest.fixture
def compiled(net):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="eager")


@pytest.mark.parametrize("path", ["first", "two.inner", "first[:, 0]", "first[*]", ""])
def test_hooks_in_compiled_code(net, compiled, path):
    out = clean = compiled(inputs())

    def hook(module, path, args, output):
        return output * 2 + args[0].sum() + len(path.name)

    for _ in range(2):
        with (
            register_forward_hook(net, path, hook),
            register_forward_pre_hook(net, "relu", lambda module, path, args: args[0] - 1),
            register_forward_pre_hook(net, "two[:, 0]", lambda module, path, args: args[0] * 0),
        ):
            out = compiled(inputs())
            assert torch.allclose(out, net(inputs()), atol=1e-5)
    assert not torch.allclose(out, clean) and torch.equal(compiled(inputs()), clean)


# What torch does itself where it traces a node of the graph.
@pytest.mark.parametrize("path", ["first", "two", "two[0]", "first[..., 1]", ""])
def test_hooks_on_gradients_in_compiled_code(net, compiled, path):
    def gradient(model):
        x = inputs().requires_grad_()
        return torch.autograd.grad(model(x).sin().sum(), x)[0]

    clean = gradient(compiled)
    with (
        register_full_backward_pre_hook(net, path, scaled),
        register_full_backward_pre_hook(net, path, lambda module, path, given: tuple(g + 1 for g in given)),
    ):
        found = gradient(compiled)
        assert torch.allclose(found, gradient(net), atol=1e-5)
    assert not torch.allclose(found, clean) and torch.equal(gradient(compiled), clean)


def test_a_full_backward_hook_in_compiled_code_is_refused(net, compiled):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="register_full_backward_hook cannot act in compiled code"):
        with register_full_backward_hook(net, "first", scaled):
            compiled(inputs().requires_grad_())


def test_run_of_a_compiled_model(net, compiled):
    hook = {"first": lambda module, path, args, output: output + 1}
    out, acts = run(
        compiled, inputs(), forward_hooks=hook, with_activations={"first": 2.0}, return_activations=["first"]
    )
    assert acts["first"].unique().tolist() == [3.0]
    expected = run(net, inputs(), forward_hooks=hook, with_activations={"first": 2.0})
    assert torch.allclose(out, expected, atol=1e-6)


INSIDE = {
    "return_activations": lambda net, hook: lambda x: run(net, x, return_activations=["first", "two"]),
    "with_activations": lambda net, hook: lambda x: run(net, x, with_activations={"first[:, 0]": 1.0}),
    "forward_hooks": lambda net, hook: lambda x: run(net, x, forward_hooks={"first": [hook, hook]}),
    "forward_pre_hooks": lambda net, hook: (
        lambda x: run(net, x, forward_pre_hooks={"first": lambda module, path, args: args[0] * 2})
    ),
}


@pytest.mark.parametrize("option", INSIDE)
def test_run_inside_compiled_code(net, option):
    torch._dynamo.reset()
    f = INSIDE[option](net, lambda module, path, args, output: output * 2 + args[0].sum())
    before = state(net)
    found = torch.compile(f, fullgraph=True, backend="eager")(inputs())
    expected = f(inputs())
    for a, b in zip(*(torch.utils._pytree.tree_leaves(tree) for tree in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    if option != "return_activations":
        assert not torch.allclose(found, net(inputs()))
    assert state(net) == before


def test_a_hook_registered_inside_compiled_code(net):
    torch._dynamo.reset()

    def f(x):
        with register_forward_hook(net, "first", lambda module, path, args, output: output + 1):
            with register_forward_hook(net, "first", lambda module, path, args, output: output * 2, prepend=True):
                return net(x)

    assert torch.allclose(torch.compile(f, fullgraph=True, backend="eager")(inputs()), f(inputs()), atol=1e-6)
    found = f(inputs())
    with edit(net, "first", lambda value: value * 2 + 1):
        assert torch.allclose(found, net(inputs()), atol=1e-6)
