"""The gradient at a site is one quantity: that of what is used behind it, however it is asked for."""

from __future__ import annotations

import pytest
import torch
from gallery.returning import AroundAndUses, Gives, UsesTwice
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import grad, jvp, vmap
from transformers import GPT2Config, GPT2LMHeadModel

from nicehooks import SiteNotReached, StaleActivation, ablate, capture, edit, grad_at, patch, run
from nicehooks.hookpoints import hooked


def second_from_first(x):
    y = x * 2
    return y, y.sin()


def twice(x):
    y = x * 2
    return y, y


def with_view(x):
    y = x * 2
    return y, y.view(-1)


RESULTS = {  # what m gives, what is done with it, and the way to the tensor that is asked about
    "second from first": (Gives(second_from_first), lambda found, x: found[0] * 3 + found[1], "[0]"),
    "second": (Gives(second_from_first), lambda found, x: found[0] * 3 + found[1], "[1]"),
    "the same twice": (Gives(twice), lambda found, x: found[0] * 3 + found[1].sin(), "[0]"),
    "the same twice, second": (Gives(twice), lambda found, x: found[0] * 3 + found[1].sin(), "[1]"),
    "a view beside it": (Gives(with_view), lambda found, x: found[0] * 3 + found[1].sin(), "[0]"),
    "a view": (Gives(with_view), lambda found, x: found[0] * 3 + found[1].sin(), "[1]"),
    "the argument": (Gives(lambda x: x), lambda found, x: found * 3 + x.sin(), ""),
    "a view of the argument": (Gives(lambda x: x.view(-1)), lambda found, x: found * 3 + x.sin(), ""),
    "the argument in a tuple": (Gives(lambda x: (x, x * 2)), lambda found, x: found[0] * 3 + found[1] + x, "[0]"),
    "an LSTM": (nn.LSTM(4, 4), lambda found, x: found[0] * 3 + found[1][0].sin(), "[0]"),
    "an LSTM's state": (nn.LSTM(4, 4), lambda found, x: found[0] * 3 + found[1][0].sin(), "[1][0]"),
    "a part": (Gives(second_from_first), lambda found, x: found[0] * 3 + found[1], "[0][:, 1:]"),
}
X = torch.linspace(-1, 1, 4)[None]


def by_patch(model, way, x):
    """The derivative with respect to what is put in the place of the value."""
    with torch.no_grad(), capture(model, f"m{way}") as acts:
        model(x)

    def patched(value):
        with patch(model, f"m{way}", value):
            return model(x).sum()

    return grad(patched)(acts[f"m{way}"].clone())


@pytest.mark.parametrize("case", RESULTS)
def test_all_ways_to_ask_agree(case):
    torch.manual_seed(0)
    m, use, way = RESULTS[case]
    model = AroundAndUses(m, use).requires_grad_(False)
    expected = by_patch(model, way, X)
    port = f"m@grad{way}"
    found = {"grad_at": grad_at(model, f"m{way}", torch.sum)(X)[1][f"m{way}"]}
    for frozen in (False, True):
        with capture(model, port) as acts:
            model(X.clone().requires_grad_(not frozen)).sum().backward()
        found[f"port, {frozen=}"] = acts[port]
    if case != "an LSTM" and case != "an LSTM's state":  # which has no batching rule in torch
        with capture(model, port) as acts:
            vmap(grad(lambda x: model(x).sum()))(X[None])
        found["vmap(grad)"] = acts[port].squeeze(0)
        with capture(model, port) as acts:
            grad(lambda x: vmap(model)(x).sum())(X[None])
        found["grad(vmap)"] = acts[port].squeeze(0)
    for name, value in found.items():
        assert torch.allclose(value, expected, atol=1e-6), name


@pytest.mark.parametrize("case", [case for case in RESULTS if "[" not in RESULTS[case][2] or case.startswith("second")])
def test_a_full_backward_pre_hook_of_torch_and_ours_see_the_same(case):
    """torch's own hooks see all results at once."""
    m, use, _ = RESULTS[case]
    model, by_torch, ours = AroundAndUses(m, use), [], []
    handle = m.register_full_backward_pre_hook(lambda module, gradients: by_torch.extend(gradients))
    model(X.clone().requires_grad_()).sum().backward()
    handle.remove()
    hook = {"m": lambda module, path, gradients: ours.extend(gradients)}
    run(model, X.clone().requires_grad_(), full_backward_pre_hooks=hook)[0].sum().backward()
    with capture(model, "m@grad") as acts:
        model(X.clone().requires_grad_()).sum().backward()
    for found in (ours, [acts[key] for key in sorted(acts)]):
        assert len(found) == len(by_torch)
        assert all(torch.allclose(a, b) for a, b in zip(found, by_torch, strict=True))


def test_the_gradient_of_an_argument_is_that_of_its_use_in_the_module():
    model, x = UsesTwice(), X.clone().requires_grad_()
    with capture(model, "m@input.grad[0]", "@input.grad[0]") as acts:
        model(x).sum().backward()
    assert torch.allclose(acts["m@input.grad[0]"], 2 * X)
    assert torch.allclose(acts["@input.grad[0]"], X.cos() + 2 * X + 5)
    x.grad = None
    with ablate(model, "m@input.grad[0]"):
        model(x).sum().backward()
    assert torch.allclose(x.grad, X.cos() + 5)


# --- order ------------------------------------------------------------------------------------------------------------


def nest():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), nn.ReLU(inplace=True))


@pytest.mark.parametrize("first", [["0.0.0", "0.0", "0"], ["0", "0.0", "0.0.0"]])
def test_backward_comes_to_each_container_before_what_is_in_it(first):
    """In whichever order the contexts were entered, and with an in-place layer behind."""
    model, order, handles = nest(), [], []
    for name in first:
        handles.append(edit(model, f"{name}@grad", lambda gradient, name=name: order.append(name)).attach())
    model(X.clone().requires_grad_()).sum().backward()
    for handle in handles:
        handle.remove()
    assert order == ["0", "0.0", "0.0.0"]


@pytest.mark.parametrize("api", ["port", "nice_hooks", "TransformerLens"])
def test_what_a_container_does_to_its_gradient_its_child_sees(api):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with capture(model, "1.0@grad") as acts:
        if api == "port":
            with ablate(model, "1@grad"):
                model(X).sum().backward()
        elif api == "nice_hooks":
            hook = {"1": lambda module, path, gradients: (gradients[0] * 0,)}
            run(model, X, full_backward_pre_hooks=hook)[0].sum().backward()
        else:
            with hooked(model).hooks(bwd_hooks=[("1", lambda gradient, hook: gradient * 0)]):
                model(X).sum().backward()
    assert not acts["1.0@grad"].any()


# --- what the model does with the memory ------------------------------------------------------------------------------


def test_an_in_place_layer_behind_the_site_overwrites_what_was_captured_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with capture(model, "0") as acts, capture(model, "0@grad") as grads:
        out = model(X)
        out.sum().backward()
    with pytest.raises(StaleActivation):
        acts["0"]
    assert torch.equal(grads["0@grad"], (out > 0).float())
    assert torch.equal(out, model(X))


def test_autograd_still_knows_what_an_in_place_layer_has_destroyed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.ReLU(inplace=True))
    with (
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
        capture(model, "1@grad"),
    ):
        model(X).sum().backward()


def test_an_argument_that_comes_out_and_is_overwritten_is_not_reached():
    """The caller holds the same memory: an in-place layer behind goes past the site, which is said."""
    model = AroundAndUses(nn.Identity(), lambda found, x: found.relu_() + x)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    with pytest.raises(SiteNotReached, match="in-place layer"), capture(model, "m@grad"):
        model(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_gradient_port_costs_no_memory_of_the_value():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Identity()), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.data_ptr()))
    with capture(model, "0@grad"), capture(model, "1@input[0]") as acts:
        model(X).sum().backward()
    # torch's hooks run behind `forward`: what they see is what takes the place of the result
    assert acts["1@input[0]"].data_ptr() == seen[0]
    with capture(model, "0") as before, capture(model, "0@grad"), capture(model, "0") as behind:
        model(X).sum().backward()
    assert before["0"].data_ptr() == behind["0"].data_ptr()


def test_forward_mode_goes_through():
    model = AroundAndUses(Gives(second_from_first), lambda found, x: found[0] * 3 + found[1])
    expected = jvp(grad(lambda x: model(x).sin().sum()), (X,), (X,))
    with capture(model, "m@grad") as acts:
        found = jvp(grad(lambda x: model(x).sin().sum()), (X,), (X,))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert set(acts) == {"m@grad[0]", "m@grad[1]"}


# --- gradients that come as a batch -----------------------------------------------------------------------------------


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def by_rows(model, x, basis):
    """The gradients for each of a batch of cotangents, one after the other."""
    return torch.stack([torch.autograd.grad(model(x), x, one)[0] for one in basis])


BASIS = torch.eye(2)[:, None].expand(2, 5, 2)


@pytest.mark.parametrize("path", ["1@grad", "1@grad[:, 0]", "2@input.grad[0]"])
def test_a_batch_of_gradients_is_captured_whole(path):
    model, x = chain(), torch.randn(5, 3, requires_grad=True)
    with capture(model, path) as found:
        torch.autograd.grad(model(x), x, BASIS, is_grads_batched=True)
    with capture(model, path, keep="all") as expected:
        by_rows(model, x, BASIS)
    assert torch.allclose(found[path], torch.stack(expected[path]), atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: ablate(model, "1@grad[:, 0]"),
        lambda model: edit(model, "1@grad", lambda gradient: gradient * gradient.sum()),
        lambda model: patch(model, "1@grad[0]", torch.ones(4)),
    ],
)
def test_a_batch_of_gradients_is_changed_one_by_one(change):
    model, x = chain(), torch.randn(5, 3, requires_grad=True)
    with change(model):
        (found,) = torch.autograd.grad(model(x), x, BASIS, is_grads_batched=True)
    with change(model):
        expected = by_rows(model, x, BASIS)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_vectorized_jacobian():
    model, x = chain(), torch.randn(3)
    with capture(model, "0@grad") as acts, edit(model, "1@grad", lambda gradient: gradient * 2):
        found = jacobian(model, x, vectorize=True)
    assert torch.allclose(found, 2 * jacobian(model, x), atol=1e-6)
    assert acts["0@grad"].shape == (2, 4) and torch.isfinite(acts["0@grad"]).all()


@pytest.mark.parametrize("model", ["gpt2"])
def test_a_batch_of_gradients_in_a_transformer(model):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=5)).eval()
    logits = []
    with capture(model, "transformer.h.0@grad", "transformer.h.0.attn.c_proj@input.grad[0]/2[:, :, 1]") as acts:
        logits.append(model(torch.tensor([[1, 2, 3]])).logits[0, -1])
        torch.autograd.grad(logits[0], model.transformer.wte.weight, torch.eye(5), is_grads_batched=True)
    assert acts["transformer.h.0@grad"].shape == (5, 1, 3, 8)
    assert acts["transformer.h.0.attn.c_proj@input.grad[0]/2[:, :, 1]"].shape == (5, 1, 3, 4)
