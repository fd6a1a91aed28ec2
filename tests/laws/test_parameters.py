"""Law 10. A swapped parameter is swapped for every name it is tied to, and restored."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.utils.prune
from gallery.parameters import CallsItsChild, NormsByFunction, Reads
from gallery.shared import Tied
from torch import nn
from worlds import inputs, make, same, state

from nicehooks import SiteNotFound, ablate, capture, edit, patch, steer
from nicehooks.errors import NotReachedWarning

TOKENS = torch.tensor([[0, 3, 6], [1, 1, 2]])


@pytest.mark.parametrize("path", ["embed@weight", "head@weight"])
def test_under_either_name(path):
    torch.manual_seed(0)
    model = Tied()
    before, clean = state(model), model(TOKENS)
    new = torch.randn(7, 4)
    other = Tied()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.embed.weight.copy_(new)
    with patch(model, path, new), capture(model, path) as acts:
        assert torch.equal(model(TOKENS), other(TOKENS))
    assert torch.equal(acts[path], new)
    assert model.head.weight is model.embed.weight
    assert state(model) == before
    assert torch.equal(model(TOKENS), clean)


def test_one_module_under_two_names():
    model = Tied()
    with (
        patch(model, "again@weight", 0.0),
        patch(model, "block@bias", 1.0),
        capture(model, "again", "block", keep="all") as acts,
    ):
        model(TOKENS)
    assert list(acts) == ["again"]
    assert len(acts["block"]) == 2
    assert all((value == 1).all() for value in acts["block"])


def test_a_weight_that_only_the_parent_reads():
    model = Tied()
    with ablate(model, "reader.hidden@weight"), capture(model, "reader", "reader.hidden@weight") as acts:
        model(TOKENS)
    assert not acts["reader"].any() and not acts["reader.hidden@weight"].any()
    attention = nn.MultiheadAttention(4, 2, bias=False)
    with ablate(attention, "out_proj@weight"):
        assert not attention(inputs(), inputs(), inputs())[0].any()


def test_a_buffer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = model[1].running_mean.clone()
    value = torch.full((4,), 3.0)
    with patch(model, "1@running_mean", value):
        model(inputs())
    assert torch.equal(value, torch.full((4,), 3.0))
    assert torch.equal(model[1].running_mean, before)
    model.eval()
    with steer(model, "1@running_mean", torch.ones(4)):
        steered = model(inputs())
    model[1].running_mean += 1
    assert torch.equal(model(inputs()), steered)


def test_a_running_statistic_is_captured_as_the_forward_has_read_it():
    """In training a batch norm overwrites it without a trace."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    with capture(model, "1@running_mean", "1@running_var") as acts:
        model(inputs())
    assert torch.equal(acts["1@running_mean"], torch.zeros(4)) and model[1].running_mean.any()
    assert torch.equal(acts["1@running_var"], torch.ones(4))


def test_one_that_requires_grad():
    model = make("Mlp").requires_grad_(False)
    weight = torch.randn(2, 6, requires_grad=True)
    with patch(model, "head@weight", weight):
        model(inputs()).sum().backward()
    assert weight.grad is not None
    assert not model.head.weight.requires_grad
    with edit(model, "head@weight[0]", lambda row: row + weight[1]):
        model(inputs()).sum().backward()


def test_a_part_of_a_parameter():
    model = make("Mlp")
    clean = model(inputs())
    with ablate(model, "head@weight[0]"), ablate(model, "head@bias[0]"):
        out = model(inputs())
    assert not out[:, 0].any() and torch.equal(out[:, 1], clean[:, 1])
    with patch(model, "**@bias", 0.0):
        model(inputs())
    with pytest.raises(SiteNotFound, match="'head' \\(Linear\\) has no parameter 'wait'; it has: weight, bias"):
        capture(model, "head@wait").__enter__()


def test_an_edit_in_place_is_an_edit_and_leaves_the_parameter():
    model = make("Mlp")
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        for fn in (lambda w: w.zero_(), lambda w: (w.zero_(), None)[1]):
            with edit(model, "head@weight", fn):
                assert torch.equal(model(inputs()), model.head.bias.expand(5, 2))
        assert torch.equal(model.head.weight, before)


def test_an_edit_acts_once_though_root_and_owner_both_run():
    model = make("Mlp")
    seen = []
    with edit(model, "head@bias", lambda value: seen.append(value) or value + 1):
        out = model(inputs())
        alone = model.head(torch.zeros(1, 6))
    assert len(seen) == 2
    assert torch.allclose(out, model(inputs()) + 1)
    assert torch.equal(alone[0], model.head.bias + 1)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")  # it is what is tested
@pytest.mark.parametrize("kind", ["parametrized", "old"])
def test_weight_norm(kind):
    norm = torch.nn.utils.parametrizations.weight_norm if kind == "parametrized" else torch.nn.utils.weight_norm
    model = nn.Sequential(norm(nn.Linear(4, 3)), nn.Identity())
    clean = model(inputs())
    before = state(model) if kind == "parametrized" else None
    with ablate(model, "0@weight"), capture(model, "0@weight") as acts:
        out = model(inputs())
    assert not acts["0@weight"].any()
    assert torch.equal(out, model[0].bias.expand(5, 3))
    with steer(model, "0@weight[1]", torch.ones(4)):
        assert torch.allclose(model(inputs())[:, 1], clean[:, 1] + inputs().sum(-1), atol=1e-5)
    assert torch.equal(model(inputs()), clean)
    assert before is None or state(model) == before


def test_the_weights_of_an_lstm():
    model = nn.Sequential(nn.LSTM(4, 3))
    clean = model(inputs())
    before = state(model)
    other = nn.LSTM(4, 3)
    other.load_state_dict(model[0].state_dict())
    with torch.no_grad():
        other.weight_hh_l0.zero_()
    with ablate(model, "0@weight_hh_l0"):
        assert same(model(inputs()), other(inputs()))
    assert same(model(inputs()), clean)
    assert state(model) == before


def test_what_a_forward_assigns_is_kept():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.count = 0

        def forward(self, x):
            self.count += 1
            return x * self.scale

    model = Counting()
    with patch(model, "@scale", 3.0):
        assert torch.equal(model(inputs()), inputs() * 3)
    assert model.count == 1


def test_outside_readers_see_the_real_parameters():
    model = make("Mlp")
    real = model.head.bias.detach().clone()
    with patch(model, "head@bias", 9.0):
        assert torch.equal(model.state_dict()["head.bias"], real)
        model(inputs())
        assert torch.equal(list(model.parameters())[-1], real)


READINGS = {
    "by name": lambda module: module.weight,
    "parameters": lambda module: next(module.parameters()),
    "named_parameters": lambda module: dict(module.named_parameters())["weight"],
    "get_parameter": lambda module: module.get_parameter("weight"),
    "state_dict": lambda module: module.state_dict(keep_vars=True)["weight"],
    "the table": lambda module: next(iter(module._parameters.values())),
}
"""How a forward may get at a weight of its own."""


WHERE_READ = [
    (how, where)
    for how in READINGS
    for where in ("eager", "compiled", "inside compiled")
    if how != "get_parameter" or where == "eager"  # which asks for an nn.Parameter, that compiled code has not
]


@pytest.mark.parametrize(("how", "where"), WHERE_READ)
def test_however_a_forward_reads_its_parameter_it_reads_the_other_value(how, where):
    torch.compiler.reset()
    model = nn.Sequential(Reads(READINGS[how]))
    value = torch.full((3,), 3.0, requires_grad=True)

    def run(x):
        if where != "inside compiled":
            return model(x)
        with patch(model, {"0@weight": value}):
            return model(x)

    called = run if where == "eager" else torch.compile(run, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    with contextlib.nullcontext() if where == "inside compiled" else patch(model, {"0@weight": value}):
        out = called(x)
    (gradient,) = torch.autograd.grad(out.sum(), value)
    assert torch.equal(out, x * 3) and torch.allclose(gradient, x.sum(0))
    assert torch.equal(model(x), x)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # it says so, and calls it
def test_what_torch_does_not_compile_reads_the_tables_in_code_of_its_own():
    """Around an LSTM Dynamo breaks off, and meets what its weights are read by as functions of their own."""
    torch.compiler.reset()
    model, x = nn.Sequential(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for _ in range(2):
        with ablate(model, "0@weight_hh_l0"):
            found, expected = compiled(x)[0], model(x)[0]
        assert torch.allclose(found, expected) and not torch.allclose(found, model(x)[0])


def test_a_functional_call_inside_a_forward_takes_the_other_value_along():
    model = CallsItsChild(Reads(READINGS["by name"]))
    with ablate(model, "child@weight"):
        assert not model(torch.ones(2, 3)).any()


def test_the_other_value_is_a_parameter_to_isinstance_while_it_stands_there():
    seen = []
    model = nn.Sequential(Reads(lambda module: seen.append(isinstance(module.weight, nn.Parameter)) or module.weight))
    value = torch.zeros(3)
    with patch(model, {"0@weight": value}):
        model(torch.ones(2, 3))
    assert seen == [True] and not isinstance(value, nn.Parameter)


def test_parameters_in_a_parameter_list():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(1), torch.ones(1)])

        def forward(self, x):
            return x * self.scales[0] + self.scales[1]

    model = Listed()
    with patch(model, "scales@1", 5.0):
        assert torch.equal(model(inputs()), inputs() + 5)
    assert torch.equal(model(inputs()), inputs() + 1)


@pytest.mark.parametrize("model", [lambda: nn.LazyLinear(3), lambda: nn.Sequential(nn.LazyLinear(3))], ids=["it", "in"])
def test_weights_that_the_first_call_of_their_module_makes(model):
    """They have no numbers as the model is called, only as their own module is."""
    model = nn.Sequential(model())
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.LazyLinear))
    with capture(model, f"{layer}@weight") as acts, patch(model, f"{layer}@bias", 7.0):
        out = model(inputs())
    weight = model.get_submodule(layer).weight
    assert acts[f"{layer}@weight"] is weight and torch.allclose(out, inputs() @ weight.T + 7)
    with ablate(model, f"{layer}@weight"):
        assert torch.equal(model(inputs()), model.get_submodule(layer).bias.expand(5, 3))


def test_a_weight_of_which_a_part_is_pruned():
    model = nn.Sequential(torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5), nn.Identity())
    clean = model(inputs())
    with capture(model, "0@weight") as acts, edit(model, "0@weight", lambda weight: 2 * weight):
        out = model(inputs())
    assert (acts["0@weight"] == 0).sum() == 6 and torch.allclose(out - model[0].bias, 2 * (clean - model[0].bias))
    assert torch.equal(model(inputs()), clean)


@pytest.mark.parametrize("norm", ["weight_norm", "orthogonal"])
def test_a_computed_weight_is_another_one_only_while_the_model_runs(norm):
    """Who makes a plain parameter of it inside of the context gets the model's own, and is told of it."""
    model = nn.Sequential(getattr(nn.utils.parametrizations, norm)(nn.Linear(4, 3)))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.expand(5, 3)
    with pytest.warns(NotReachedWarning, match="these sites were: '0@weight'"), ablate(model, "0@weight"):  # noqa: PT031
        assert torch.equal(model(inputs()), bias) and torch.equal(model[0](inputs()), bias)
        assert torch.equal(model[0].weight, weight)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model[0].weight, weight)


def test_a_computed_weight_is_in_no_cache_of_torch_under_another_value():
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)))
    clean = model(inputs())
    with nn.utils.parametrize.cached():
        for _ in range(2):
            with ablate(model, "0@weight"), capture(model, "0@weight") as acts:
                assert torch.equal(model(inputs()), model[0].bias.expand(5, 3))
            assert not acts["0@weight"].any() and torch.equal(model(inputs()), clean)


def test_a_buffer_that_a_function_overwrites_without_a_trace_is_captured_as_it_was():
    model = nn.Sequential(NormsByFunction()).train()
    with capture(model, "0@mean") as acts:
        model(inputs())
    assert torch.equal(acts["0@mean"], torch.zeros(4)) and model[0].mean.any()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_running_statistic_in_compiled_code_is_captured_as_the_forward_has_read_it():
    model = nn.Sequential(nn.BatchNorm1d(4)).train()
    run = torch.compile(model, backend="aot_eager")
    run(inputs())
    before = model[0].running_mean.clone()
    with capture(model, "0@running_mean") as acts:
        run(inputs())
    assert torch.equal(acts["0@running_mean"], before) and not torch.equal(model[0].running_mean, before)
