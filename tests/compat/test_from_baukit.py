"""The rows of docs/from_baukit.md: each beside the same by PyTorch's own hooks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from by_hooks import arguments_by_hooks, changed_by_hook, outputs_by_hooks, put
from torch import Tensor, nn

from nicehooks import (
    ActivationCache,
    SiteNotFound,
    SiteNotReached,
    StaleActivation,
    ablate,
    capture,
    edit,
    grad_at,
    patch,
    select,
    sites,
    splice,
    steer,
)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


X, OTHER = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def test_outputs_are_those_of_a_hook(net: nn.Sequential) -> None:
    _, seen = outputs_by_hooks(net, lambda: net(X))
    with capture(net, "1") as one, capture(net, "1", "3") as two, capture(net, "*") as every:
        net(X)
    assert list(one) == ["1"] and list(two) == ["1", "3"] and list(every) == list("01234")
    assert all(torch.equal(value, seen[name][0]) for name, value in every.items())
    assert one["1"] is two["1"] is every["1"]


def test_inputs_are_those_of_a_hook_and_keywords_are_seen(net: nn.Sequential) -> None:
    seen = arguments_by_hooks(net, lambda: net(X))
    with capture(net, "1@input[0]") as acts:
        net(X)
    assert torch.equal(acts["1@input[0]"], seen["1"][0].args[0]) and list(acts) == ["1@input[0]"]
    layer = net[0]
    with capture(layer, "@input[0]", "@input['input']") as acts:
        layer(input=X)
    assert acts["@input[0]"] is X and acts["@input['input']"] is X


def test_clone_and_detach_reach_into_what_a_module_returns() -> None:
    layer = nn.LSTM(4, 8)
    for option, expected in (({}, (True, True)), ({"detach": True}, (False, True)), ({"clone": True}, (True, False))):
        with capture(layer, "", **option) as acts:
            out, (hidden, cell) = layer(X)
        leaves = acts[""][0], *acts[""][1]
        pairs = list(zip(leaves, (out, hidden, cell), strict=True))
        assert [kept.requires_grad for kept, _ in pairs] == [expected[0]] * 3
        assert [kept.data_ptr() == given.data_ptr() for kept, given in pairs] == [expected[1]] * 3


def test_the_gradient_is_that_which_a_tensor_retains(net: nn.Sequential) -> None:
    kept: list[Tensor] = []
    with changed_by_hook(net, "1", lambda value: value.retain_grad() or kept.append(value)):
        net(X).square().sum().backward()
    with capture(net, "1@grad") as acts:
        net(X).square().sum().backward()
    _, gradients = grad_at(net, "1", lambda out: out.square().sum())(X)
    assert torch.equal(acts["1@grad"], kept[0].grad) and torch.equal(gradients["1"], kept[0].grad)


def test_stop_runs_that_far_and_the_block_goes_on(net: nn.Sequential) -> None:
    ran: list[Any] = []
    for layer in net:
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    with capture(net, "1", stop=True) as acts:
        assert net(X) is None
        ran.append("behind the call")
    assert ran == [net[0], net[1], "behind the call"]
    assert torch.equal(acts["1"], net[:2](X))


def test_an_edit_is_a_hook_that_returns_a_value(net: nn.Sequential) -> None:
    names: list[str] = []
    with changed_by_hook(net, "1", lambda value: value / 2):
        expected = net(X)
    with edit(net, "1", lambda value: value / 2):
        assert torch.equal(net(X), expected)
    with edit(net, ["1", "3", "1@input[0]"], lambda value, site: names.append(str(site))):
        assert torch.equal(net(X), net(X))
    assert names == ["1@input[0]", "1", "3"] * 2


def test_zeros_a_vector_and_another_runs_value(net: nn.Sequential) -> None:
    vector = torch.arange(8.0)
    _, other = outputs_by_hooks(net, lambda: net(OTHER))
    for context, hook in (
        (ablate(net, "1"), lambda value: value * 0),
        (steer(net, "1", vector), lambda value: value + vector),
        (patch(net, "1", other["1"][0]), lambda value: other["1"][0]),
    ):
        with changed_by_hook(net, "1", hook):
            expected = net(X)
        with context:
            assert torch.equal(net(X), expected)
        assert not torch.equal(net(X), expected)


def test_a_patch_of_a_part_writes_nothing_in_place(net: nn.Sequential) -> None:
    with changed_by_hook(net, "1", lambda value: put(value, (slice(None), -1), torch.tensor(2.0))):
        expected = net(X)
    with capture(net, "1") as before, patch(net, "1[:, -1]", 2.0):
        assert torch.equal(net(X), expected)
    assert torch.equal(before["1"], net[:2](X))


def test_names_are_those_of_the_modules(net: nn.Sequential) -> None:
    names = [str(site) for site in select(net, "**")]
    assert names == [name for name, _ in net.named_modules()] == [record.path for record in sites(net, X)]
    assert [record.value for record in sites(net, X)][1] == "Tensor[3, 8] float32"
    assert net.get_submodule("1") is net[1]


def test_a_weight_is_put_for_the_time_of_the_context_alone(net: nn.Sequential) -> None:
    weight, new, elsewhere = net[2].weight, torch.eye(8), []
    clean = net(X)
    expected = net[3:](net[:2](X) @ new.T + net[2].bias)
    with pytest.raises(ZeroDivisionError), patch(net, "2@weight", new):
        assert torch.allclose(net(X), expected)
        thread = threading.Thread(target=lambda: elsewhere.append(net(X)))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert net[2].weight is weight and torch.equal(net(X), clean) and torch.equal(elsewhere[0], clean)


def test_values_go_through_a_module_that_is_spliced_in(net: nn.Sequential) -> None:
    new = nn.Linear(8, 8)
    expected = net[3:](new(net[:3](X)))
    with splice(net, "2", new):
        assert torch.equal(net(X), expected)
    assert net[2] is not new and not torch.equal(net(X), expected)


def test_the_tensors_of_a_cache_are_tensors(net: nn.Sequential) -> None:
    """So what other packages count and draw, they count and draw of these."""
    with capture(net, "1") as acts:
        net(X)
    assert type(acts["1"]) is Tensor and isinstance(acts, ActivationCache) and isinstance(acts, dict)


# --- what is different on purpose -------------------------------------------------------------------------------------


def test_a_capture_acts_when_it_is_entered_and_again(net: nn.Sequential) -> None:
    context = capture(net, "1")
    net(X)
    for x in (X, OTHER):
        with context as acts:
            assert not acts
            net(x)
        assert torch.equal(acts["1"], net[:2](x))


def test_a_wrong_name_and_a_module_that_never_ran_are_errors(net: nn.Sequential) -> None:
    with pytest.raises(SiteNotFound, match="no module matches '7' in Sequential"), capture(net, "1", "7"):
        pass
    net.add_module("idle", nn.Identity())
    net.forward = lambda x: net[:5](x)  # type: ignore[method-assign]
    with pytest.raises(SiteNotReached, match="'idle'"), ablate(net, "1", "idle"):
        net(X)


def test_a_context_acts_in_its_thread_alone(net: nn.Sequential) -> None:
    clean, elsewhere = net(X), []
    with ablate(net, "1"):
        thread = threading.Thread(target=lambda: elsewhere.append(net(X)))
        thread.start()
        thread.join()
        assert not torch.equal(net(X), clean)
    assert torch.equal(elsewhere[0], clean)


def test_what_the_model_overwrites_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True))
    with capture(model, "0") as acts, capture(model, "0", clone=True) as own:
        model(X)
    with pytest.raises(StaleActivation, match="'0' was overwritten in place"):
        acts["0"]
    assert torch.equal(own["0"], model[0](X))


def test_contexts_act_in_the_order_in_which_they_were_entered(net: nn.Sequential) -> None:
    with capture(net, "1") as before, ablate(net, "1"), capture(net, "1") as after:
        net(X)
    assert torch.equal(before["1"], net[:2](X)) and not after["1"].any()
