"""The ports `@grad` and `@input.grad`: in plain autograd, under `torch.func`, and with checkpoints."""

from __future__ import annotations

import pytest
import torch
from gallery.checkpointed import Checkpointed
from gallery.returning import Gives, UsesJoined
from gallery.trees import Nested
from gallery.values import Pair
from torch import nn
from torch.func import grad, jvp, vmap
from transformers.modeling_outputs import BaseModelOutput
from worlds import inputs, make, state, total

from nicehooks import SiteNotReached, ablate, capture, edit, patch


def gradient_by_hand(model, name):
    """The gradient at the output of the module called `name`, with a hook of torch's own."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, out: out.register_hook(seen.append) and None)
    total(model(inputs())).backward()
    handle.remove()
    model.zero_grad()
    return seen[0]


@pytest.mark.parametrize("name", ["embed", "blocks.1", "blocks.2.0", "head", ""])
def test_equals_a_hook_of_torch(name):
    model = make("Mlp")
    expected = gradient_by_hand(model, name)
    before = state(model)
    with capture(model, f"{name}@grad", f"{name}@grad[:, -1]") as acts:
        assert not acts
        total(model(inputs())).backward()
    assert torch.equal(acts[f"{name}@grad"], expected)
    assert torch.equal(acts[f"{name}@grad[:, -1]"], expected[:, -1])
    model.zero_grad()
    assert [entry[:2] for entry in state(model)] == [entry[:2] for entry in before]


def test_the_gradient_of_an_input():
    model = make("Normed")
    x = inputs().requires_grad_()
    with capture(model, "gate@input.grad[0]", "gate@input.grad['by']", "@input.grad['x']", "norm@grad") as acts:
        total(model(x)).backward()
    assert torch.equal(acts["gate@input.grad[0]"], acts["norm@grad"])
    assert torch.equal(acts["@input.grad['x']"], x.grad)
    assert acts["gate@input.grad['by']"].shape == x.shape


def test_trees_have_a_gradient_for_each_tensor():
    model = make("Nested")
    with capture(model, "nest@grad", "nest@grad[0]['left']", "nest@input.grad[0]", "inner@grad") as acts:
        total(model(inputs())).backward()
    assert {key for key in acts if key.startswith("nest@grad")} == {
        "nest@grad[0][0]",
        "nest@grad[0]['left']",
        "nest@grad[0][1][0]",
        "nest@grad[1]['b']",
        "nest@grad[1]['a'][0]",
        "nest@grad[2]['box']['content'][0]",
    }
    assert torch.equal(acts["nest@grad[0]['left']"], acts["nest@grad[1]['b']"])
    with edit(model, "nest", lambda value: (Pair(value[0].left * 2, value[0].right), *value[1:])):
        assert type(model) is Nested
        model(inputs())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_star_is_each_element_of_a_tree_or_each_index_of_a_gradient(compiled):
    model = nn.Sequential(Gives(lambda x: (x * 2, {"a": x * 3})), Gives(lambda pair: pair[0] * pair[1]["a"]))
    run = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(2, 3, requires_grad=True)
    for path in ("0@grad[*]", "0@grad[1][*]", "0@grad[0][*]"):
        with capture(model, path) as acts:
            run(x).sum().backward()
        expected = {"0@grad[0]": x * 3, "0@grad[1]['a']": x * 2, "0@grad[0][0]": x[0] * 3, "0@grad[0][1]": x[1] * 3}
        assert len(acts) == 1 + (path != "0@grad[1][*]")
        assert all(torch.allclose(value, expected[key]) for key, value in acts.items())
    x.grad = None
    with ablate(model, "0@grad[*]"):
        run(x).sum().backward()
    assert not x.grad.any()


def test_frozen_parameters_and_plain_inputs():
    model = make("Mlp").requires_grad_(False)
    with capture(model, "blocks.1@grad") as acts:
        total(model(inputs())).backward()
    assert torch.allclose(acts["blocks.1@grad"], gradient_by_hand(make("Mlp"), "blocks.1"))


def test_behind_in_place_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Hardtanh(inplace=True))
    plain = nn.Sequential(model[0], nn.ReLU(), model[2], nn.Hardtanh())
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with capture(model, "0@grad", "2@grad", "2@input.grad[0]") as acts:
            total(model(inputs())).backward()
        with capture(plain, "0@grad", "2@grad") as expected:
            total(plain(inputs())).backward()
        assert all(torch.allclose(acts[key], expected[key]) for key in expected)
        if frozen:
            continue
        with (
            pytest.raises(SiteNotReached, match="take the gradient of the module before it"),
            capture(model, "1@input.grad"),
        ):
            total(model(inputs())).backward()


def test_a_tensor_with_several_uses_has_the_gradient_of_this_one():
    """A residual stream goes into a block and past it; an identity gives back what it got."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Linear(4, 4)
            self.point = nn.Identity()

        def forward(self, x):
            return x + self.branch(x) + self.point(x) * 3

    model = Residual()
    with capture(model, "branch@input.grad[0]", "point@grad", "@grad") as acts:
        model(inputs().requires_grad_()).sum().backward()
    assert torch.allclose(acts["branch@input.grad[0]"], torch.ones(5, 4) @ model.branch.weight)
    assert (acts["point@grad"] == 3).all()
    assert (acts["@grad"] == 1).all()


def test_edits_act_in_order_and_change_what_flows_on():
    model = make("Mlp")
    x = inputs().requires_grad_()
    total(model(x)).backward()
    clean, x.grad = x.grad, None
    first, last = capture(model, "embed@grad"), capture(model, "embed@grad")
    with first as seen, edit(model, "embed@grad", lambda g: g * 2), ablate(model, "embed@grad[0]"), last as after:
        total(model(x)).backward()
    assert torch.allclose(x.grad[1:], clean[1:] * 2) and not x.grad[0].any()
    assert torch.allclose(after["embed@grad"][1:], seen["embed@grad"][1:] * 2)
    assert not after["embed@grad"][0].any() and seen["embed@grad"][0].any()
    with patch(model, "embed@input.grad[0]", torch.ones(4)):
        x.grad = None
        total(model(x)).backward()
    assert torch.equal(x.grad, torch.ones(5, 4))


def test_several_backward_passes_and_all_of_them():
    model = make("Mlp")
    with capture(model, "head@grad", keep="all") as acts, capture(model, "head@grad", keep="first") as first:
        out = model(inputs())
        out.sum().backward(retain_graph=True)
        (out * 3).sum().backward()
    assert [g[0, 0].item() for g in acts["head@grad"]] == [1.0, 3.0]
    assert first["head@grad"][0, 0] == 1


def test_the_gradients_of_several_calls_are_in_the_order_of_the_calls():
    """Backward comes to the last call first; values and gradients of one call still belong together."""
    model = make("Thrice")
    with capture(model, "block#*@grad", "block@grad") as each:
        model(inputs()).sum().backward()
    for keep, call in {"first": 0, "last": 2}.items():
        with capture(model, "block@grad", keep=keep) as one:
            model(inputs()).sum().backward()
        assert torch.equal(one["block@grad"], each[f"block#{call}@grad"])
    with capture(model, "block@grad", keep="all") as acts:
        for _ in range(2):
            model(inputs()).sum().backward()
    assert len(acts["block@grad"]) == 6
    assert all(torch.equal(acts["block@grad"][i], each[f"block#{i % 3}@grad"]) for i in range(6))


def test_double_backward():
    model = make("Mlp")
    x = inputs().requires_grad_()
    with capture(model, "embed@grad", keep="first") as acts, edit(model, "embed@grad", lambda g: g * 2):
        (first,) = torch.autograd.grad(total(model(x)), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, retain_graph=True)
        (through,) = torch.autograd.grad(acts["embed@grad"].pow(2).sum(), x)
    assert second.any() and through.any()
    by_torch = model.embed.register_forward_hook(lambda module, args, out: out.register_hook(lambda g: g * 2) and None)
    (plain,) = torch.autograd.grad(total(model(x)), x, create_graph=True)
    (expected,) = torch.autograd.grad(plain.pow(2).sum(), x)
    by_torch.remove()
    assert torch.equal(second, expected)


def test_under_grad_and_vmap_of_grad():
    model = make("Mlp")
    expected = gradient_by_hand(model, "blocks.1")
    with capture(model, "blocks.1@grad") as acts:
        grad(lambda x: total(model(x)))(inputs())
    assert torch.allclose(acts["blocks.1@grad"], expected, atol=1e-6)
    with capture(model, "blocks.1@grad") as acts:
        vmap(grad(lambda x: total(model(x))))(inputs())
    assert torch.allclose(acts["blocks.1@grad"], expected, atol=1e-6)

    def per_example(x):
        with capture(model, "blocks.1@grad") as acts:
            found = grad(lambda x: total(model(x)))(x)
        return found, acts["blocks.1@grad"]

    assert torch.allclose(vmap(per_example)(inputs())[1], expected, atol=1e-6)

    def edited(x):
        with edit(model, "blocks.1@grad", lambda g: g * 0):
            return grad(lambda x: total(model(x)))(x)

    x = inputs().requires_grad_()
    with ablate(model, "blocks.1@grad"):
        total(model(x)).backward()
    assert torch.allclose(vmap(edited)(inputs()), x.grad, atol=1e-6)


def test_no_gradient_is_said():
    model = make("Mlp")
    with (
        pytest.raises(SiteNotReached, match=r"no gradient came by\. Run backward inside the context"),
        capture(model, "head@grad"),
    ):
        model(inputs())
    with torch.no_grad(), pytest.raises(SiteNotReached), capture(model, "head@grad"):
        model(inputs())


def test_no_gradient_under_a_transform_is_said_too():
    model = make("Mlp").requires_grad_(False)
    for run in (lambda: vmap(model)(inputs()), lambda: jvp(model, (inputs(),), (inputs(),))):
        with pytest.raises(SiteNotReached, match="no gradient came by"), capture(model, "embed@grad"):
            run()


def test_a_graph_outlives_its_context_without_effect():
    model = make("Mlp")
    x = inputs().requires_grad_()
    with ablate(model, "embed@grad"):
        first = model(x)
        second = model(x)
        total(first).backward()
    assert not x.grad.any()
    total(second).backward()
    assert x.grad.any()


# --- activation checkpointing -----------------------------------------------------------------------------------------


def run(reentrant, context):
    torch.manual_seed(0)
    model = Checkpointed(reentrant)
    x = inputs().requires_grad_()
    with context(model) as acts:
        total(model(x)).backward()
    return x.grad, [p.grad for p in model.parameters()], acts


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "context",
    [
        lambda model: edit(model, "inner.1", lambda value: value * 2),
        lambda model: edit(model, "inner.1@grad", lambda value: value * 2),
        lambda model: patch(model, {"inner.0[:, 0]": 1.0, "inner.2@bias": 2.0}),
        lambda model: ablate(model, "inner.0[:, 0]", steps=0, calls=0),
    ],
)
def test_backward_inside_the_context_is_as_without_checkpointing(reentrant, context):
    x, parameters, _ = run(reentrant, context)
    expected_x, expected, _ = run(None, context)
    assert torch.equal(x, expected_x)
    pairs = zip(parameters, expected, strict=True)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_is_captured_twice(reentrant):
    _, _, acts = run(reentrant, lambda model: capture(model, "**", "inner.0#*", "inner.2@input[0]", keep="all"))
    assert {key: len(calls) for key, calls in acts.items()} == {
        "inner.0": 1,
        "inner.0#0": 1,
        "inner.1": 1,
        "inner.2@input[0]": 1,
        "inner.2": 1,
        "inner": 1,
        "": 1,
    }


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inner.0@grad", "inner.2@input.grad[0]", "inner@grad[:, 0]", "inner.1@grad"])
def test_gradients_in_a_checkpointed_region(reentrant, where):
    """A reentrant checkpoint has no graph in its first run, and all of it in the second, inside of backward."""
    _, _, acts = run(reentrant, lambda model: capture(model, where, keep="all"))
    _, _, expected = run(None, lambda model: capture(model, where, keep="all"))
    assert len(acts[where]) == len(expected[where]) == 1
    assert torch.equal(acts[where][0], expected[where][0])


# --- what modules return ----------------------------------------------------------------------------------------------

RETURNS = {
    "tuple": (lambda a, b: (a, b), "[0]"),
    "dict": (lambda a, b: {"a": a, "b": b}, "['a']"),
    "ModelOutput": (lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b,)), "['last_hidden_state']"),
}


@pytest.mark.parametrize("world", ["autograd", "grad", "vmap(grad)", "grad(vmap)"])
@pytest.mark.parametrize("kind", RETURNS)
def test_whatever_a_module_returns(kind, world):
    torch.manual_seed(0)
    model = UsesJoined(RETURNS[kind][0])
    port = f"inner@grad{RETURNS[kind][1]}"
    with capture(model, port, f"{port}[:, 0]", "inner@input.grad[0]") as expected:
        total(model(inputs())).backward()
    ports = [port, "inner@input.grad[0]"]
    with capture(model, "first", "second") as acts:
        total(model(inputs())).backward()
    first, second = acts["first"].detach().requires_grad_(), acts["second"]
    (by_hand,) = torch.autograd.grad(total(first.sin() * second), first)
    with capture(model, *ports) as found:
        if world == "autograd":
            total(model(inputs())).backward()
        elif world == "grad":
            grad(lambda x: total(model(x)))(inputs())
        elif world == "vmap(grad)":
            vmap(grad(lambda x: total(model(x))))(inputs())
        else:
            grad(lambda x: vmap(lambda row: total(model(row)))(x).sum())(inputs())
    assert torch.allclose(found[port], by_hand, atol=1e-6)
    assert torch.allclose(found["inner@input.grad[0]"], by_hand, atol=1e-6)
    assert torch.equal(expected[f"{port}[:, 0]"], expected[port][:, 0])


def test_gradients_of_gradients_under_transforms():
    """A gradient port in `grad` of `grad` is differentiated as the gradient by plain autograd is."""
    model = make("Mlp").double()
    x = inputs().double()

    def at_embed(x):
        with capture(model, "embed@grad") as acts:
            grad(lambda x: total(model(x).double()))(x)
        return acts["embed@grad"]

    second = grad(lambda x: at_embed(x).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    with capture(model, "embed@grad") as acts:
        torch.autograd.grad(total(model(leaf).double()), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(acts["embed@grad"].sin().sum(), leaf)
    assert torch.allclose(second, expected) and expected.any()
    doubled = vmap(grad(lambda x: at_embed(x).sin().sum()))(x)
    assert torch.allclose(doubled, expected, atol=1e-6)


@pytest.mark.parametrize("path", ["head@grad", "head@input.grad[0]", "head@input.grad['input']"])
def test_gradients_are_edited_in_the_order_of_entering(path):
    model = make("Mlp")
    with capture(model, path) as clean:
        model(inputs()).sin().sum().backward()
    with edit(model, path, lambda g: g + 1), edit(model, path, lambda g: g * 3), capture(model, path) as acts:
        model(inputs()).sin().sum().backward()
    assert torch.equal(acts[path], (clean[path] + 1) * 3)


def test_the_gradients_before_and_behind_a_module_that_returns_its_argument_are_two():
    model = nn.Sequential(nn.Identity())
    x = torch.ones(3, requires_grad=True)
    with edit(model, "0@input.grad[0]", lambda g: g + 1), edit(model, "0@grad", lambda g: g * 3):
        model(x).sum().backward()
    assert x.grad.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("path", ["1@grad", "1@input.grad[0]"])
def test_a_backward_behind_its_context_is_left_alone_also_by_the_next_one_at_the_same_site(path):
    """Its graph was made under another context, whose rules no one takes over."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), inputs()
    expected = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    with edit(model, path, lambda gradient: gradient * 2):
        model(x).sum().backward()
        left, last = model(x).sum(), model(x).sum()
    model.zero_grad()
    left.backward()
    assert torch.equal(model[0].weight.grad, expected)
    seen = []
    with edit(model, path, seen.append):
        model.zero_grad()
        last.backward()
        assert seen == [] and torch.equal(model[0].weight.grad, expected)
        model(x).sum().backward()
    assert len(seen) == 1
