"""The port `@weight.uses()`: the results of the operations that a parameter enters."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from gallery.parameters import SameNames, Weighted
from gallery.shared import SharesList
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from worlds import WORLDS, inputs, same, state, total

from nicehooks import (
    ModulePath,
    PathError,
    SiteNotFound,
    SiteNotReached,
    UnsupportedModule,
    capture,
    captured,
    edit,
    functional,
    patch,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SameNames()


def by_hand(model, x, at=lambda name, value: value):
    """The model's forward, with every use shown to `at`."""
    auto = model.autoencoder
    x = at("autoencoder@b_dec.uses()", x - auto.b_dec)
    pre = at("autoencoder@b_enc.uses()", at("autoencoder@W_enc.uses()", x @ auto.W_enc) + auto.b_enc)
    x = at("autoencoder@W_dec.uses()", torch.relu(pre) @ auto.W_dec)
    x = at("autoencoder@b_dec.uses()", x + auto.b_dec)
    x = at("@b_dec.uses()", x * model.b_dec)
    for i, scale in enumerate(model.scales):
        x = at(f"scales@{i}.uses()", x * scale)
    return torch.stack([x, at("shifts@up.uses()", model.shifts["up"].expand_as(x))]).sum(0)


PATHS = [
    "autoencoder@b_dec.uses()",
    "autoencoder@W_enc.uses()",
    "autoencoder@b_enc.uses()",
    "autoencoder@W_dec.uses()",
    "@b_dec.uses()",
    "scales@0.uses()",
    "scales@1.uses()",
    "shifts@up.uses()",
]


def test_every_use_is_seen_in_order_and_nothing_else(model):
    expected = {}
    out = by_hand(model, inputs(), lambda name, value: (expected.setdefault(name, []).append(value), value)[1])
    before = state(model)
    with capture(model, PATHS, keep="all") as acts:
        assert torch.equal(model(inputs()), out)
    assert list(acts) == PATHS == list(expected)
    assert all(same(list(acts[path]), expected[path]) for path in PATHS)
    assert len(acts["autoencoder@b_dec.uses()"]) == 2
    assert state(model) == before


def test_a_number_chooses_one_use(model):
    with capture(model, "autoencoder@b_dec.uses#*()", "autoencoder@b_dec.uses#1()[:, 0]") as acts:
        model(inputs())
    assert sorted(acts) == [
        "autoencoder@b_dec.uses#0()",
        "autoencoder@b_dec.uses#1()",
        "autoencoder@b_dec.uses#1()[:, 0]",
    ]
    out = model.autoencoder(inputs())
    assert torch.equal(acts["autoencoder@b_dec.uses#1()"], out)
    assert torch.equal(acts["autoencoder@b_dec.uses#1()[:, 0]"], out[:, 0])
    with patch(model.autoencoder, "@b_dec.uses#1()", 7.0):
        assert (model.autoencoder(inputs()) == 7.0).all()


@pytest.mark.parametrize("path", PATHS)
def test_edits_act_on_each_use(model, path):
    expected = by_hand(model, inputs(), lambda name, value: value * 2 + 1 if name == path else value)
    with edit(model, path, lambda value: value * 2), edit(model, path, lambda value: value + 1):
        assert torch.equal(model(inputs()), expected)


def test_order_holds_between_uses_and_calls(model):
    auto = model.autoencoder
    with (
        edit(auto, "@matmul#0()", lambda value: value + 1),
        edit(auto, "@W_enc.uses()", lambda value: value * 2),
        edit(auto, "@matmul#0()", lambda value: value + 3),
        capture(auto, "@W_enc.uses()") as acts,
    ):
        auto(inputs())
    assert torch.equal(acts["@W_enc.uses()"], ((inputs() - auto.b_dec) @ auto.W_enc + 1) * 2 + 3)


@pytest.mark.parametrize("world", WORLDS)
def test_identity_in_every_world(model, world):
    clean = WORLDS[world](model, inputs())
    with edit(model, PATHS, lambda value: value):
        assert same(WORLDS[world](model, inputs()), clean)


def test_values_leave_vmap_and_grad(model):
    xs = torch.stack([inputs(), inputs() + 1])
    _, acts = vmap(captured(model, *PATHS))(xs)
    for i, x in enumerate(xs):
        _, one = captured(model, *PATHS)(x)
        assert all(torch.allclose(acts[path][i], one[path], atol=1e-6) for path in PATHS)
    with edit(model, "autoencoder@W_enc.uses()", lambda value: value * 2):
        found = grad(lambda x: total(model(x)))(inputs())
    x = inputs().requires_grad_()
    changed = by_hand(model, x, lambda name, value: value * 2 if "W_enc" in name else value)
    assert torch.allclose(found, torch.autograd.grad(total(changed), x)[0], atol=1e-6)


def test_the_parameter_is_found_by_owner_and_name(model):
    """Whatever `functional_call`, a transform or another intervention puts under it."""
    auto = model.autoencoder
    other = {name: torch.randn_like(value) for name, value in auto.named_parameters()}
    with capture(auto, "@W_enc.uses()") as acts:
        functional_call(auto, other, (inputs(),))
    assert torch.equal(acts["@W_enc.uses()"], (inputs() - other["b_dec"]) @ other["W_enc"])
    many = {name: torch.stack([value, value * 2]) for name, value in other.items()}
    x = inputs()
    out, acts = vmap(lambda p: functional(auto, "@W_enc.uses()")(p, x))(many)
    assert out.shape == (2, 5, 4)
    row = (inputs() - 2 * other["b_dec"]) @ (2 * other["W_enc"])
    assert torch.allclose(acts["@W_enc.uses()"][1], row, atol=1e-5)

    def loss(weight):
        with edit(auto, "@W_enc.uses()", lambda value: value * 3):
            return total(functional_call(auto, {"W_enc": weight}, (inputs(),)))

    weight = auto.W_enc.detach().clone().requires_grad_()
    pre = (inputs() - auto.b_dec) @ weight * 3 + auto.b_enc
    by_autograd = torch.autograd.grad(total(torch.relu(pre) @ auto.W_dec + auto.b_dec), weight)[0]
    assert torch.allclose(grad(loss)(auto.W_enc.detach()), by_autograd, atol=1e-5)
    with patch(auto, "@W_enc", 0.0), capture(auto, "@W_enc.uses()") as acts:
        auto(inputs())
    assert not acts["@W_enc.uses()"].any()


def test_gradients_of_uses(model):
    auto = model.autoencoder
    expected = []

    def at(name, value):
        if "b_dec" in name and "autoencoder" in name:
            value.register_hook(expected.append)
        return value

    total(by_hand(model, inputs(), at)).backward()
    with capture(model, "autoencoder@b_dec.uses().grad", "autoencoder@b_dec.uses#0().grad", keep="all") as acts:
        total(model(inputs())).backward()
    assert torch.allclose(acts["autoencoder@b_dec.uses().grad"][1], expected[0], atol=1e-6)
    assert torch.allclose(acts["autoencoder@b_dec.uses().grad"][0], expected[1], atol=1e-6)
    assert same(acts["autoencoder@b_dec.uses#0().grad"][0], acts["autoencoder@b_dec.uses().grad"][0])
    auto.zero_grad()
    with edit(model, "autoencoder@W_enc.uses().grad", lambda gradient: gradient * 0):
        total(model(inputs())).backward()
    assert not auto.W_enc.grad.any() and auto.W_dec.grad.any()


def test_a_list_of_parameters_that_two_modules_use():
    model = SharesList()
    with capture(model, "weights@0.uses()", keep="all") as acts:
        out = model(inputs())
    first = inputs() + model.weights[0]
    assert same(list(acts["weights@0.uses()"]), [first, out])
    with edit(model, "@add()", lambda value: value), capture(model, "weights@0.uses()", keep="all") as acts:
        model(inputs())  # a method that somebody watches is no operation
    assert same(list(acts["weights@0.uses()"]), [first, out])


def test_what_has_no_uses_is_said(model):
    class Passed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(self.weight) + x

    with pytest.raises(SiteNotFound, match="has no parameter 'W'; it has: b_dec"), capture(model, "@W.uses()"):
        pass
    passed = Passed()
    passed.inner.forward = lambda weight: weight * 2
    with pytest.raises(SiteNotReached, match="enters no torch function"), capture(passed, "@weight.uses()"):
        passed(inputs())
    with pytest.raises(UnsupportedModule, match="no module that is ever called"), capture(model.scales, "@0.uses()"):
        pass


@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_computed_parameters(normalize):
    torch.manual_seed(0)
    model = nn.Sequential(normalize(Weighted(), "weight"))
    x, weight = inputs()[:4], model[0].weight
    other = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    with (
        capture(model, "0@weight.uses#*()") as first,
        edit(model, "0@weight.uses#1()", lambda value: value + 1),
        capture(model, "0@weight.uses()", keep="all") as acts,
    ):
        out = model(x)
        functional_call(model, other, (x,))
    assert torch.equal(acts["0@weight.uses()"][0], x @ weight)
    assert torch.equal(acts["0@weight.uses()"][1], out) and torch.equal(out, x @ weight + weight + 1)
    assert sorted(first) == ["0@weight.uses#0()", "0@weight.uses#1()"]
    assert len(acts["0@weight.uses()"]) == 4 and not torch.equal(acts["0@weight.uses()"][2], x @ weight)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("text", ["@W.uses()", "h.3@W.uses#2()[:, 0]", "@0.uses#*().grad", "a#1@b.uses().grad/4[0]"])
def test_paths_round_trip(text):
    path = ModulePath.parse(text)
    assert str(path) == text and ModulePath.parse(str(path)) == path and path.port.kind.startswith("use")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("@W.uses", "with brackets: @weight.uses()"),
        ("@W.uses().input", "results, which have no input"),
        ("@softmax().input.grad", "a parameter's uses alone"),
    ],
)
def test_what_is_no_path(text, says):
    with pytest.raises(PathError, match=says.replace("(", r"\(").replace(")", r"\)")):
        ModulePath.parse(text)


def test_nothing_keeps_the_model_alive():
    model = SameNames()
    with capture(model, PATHS):
        model(inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
