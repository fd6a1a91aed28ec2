"""Many regions in one `patch` are what they are one after the other, however they are written."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import WORLDS

from nicehooks import SiteNotReached, TreeMismatch, capture, edit, patch

KEYS: dict[str, list[str]] = {
    "rows": ["0[0]", "0[2]", "0[-1]"],
    "cells": ["0[0, 1]", "0[1, -1]", "0[4, 0]"],
    "columns": ["0[:, 2]", "0[:, 0]"],
    "one place twice": ["0[1]", "0[-4]", "0[0]"],
    "two shapes": ["0[0]", "0[:, 1]", "0[1]", "0[2]"],
    "something between": ["0[0]", "0[1:3]", "0[1]", "0[2, 0]"],
    "the whole between": ["0[0]", "0[1]", "0", "0[-4]", "0[2]"],
    "two modules": ["0[0]", "1[0]", "0[1]", "1[1]"],
    "the model, too": ["[0]", "1[0]", "[1]", "1[1]"],
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh())


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 20).reshape(5, 4)


def value_for(number: int) -> Any:
    return float(number) if number % 2 else torch.tensor(number / 10, dtype=torch.float64)


def together(net: nn.Module, keys: list[str], values: list[Any], x: Tensor) -> Tensor:
    with patch(net, dict(zip(keys, values, strict=True))):
        return net(x)


def one_by_one(net: nn.Module, keys: list[str], values: list[Any], x: Tensor) -> Tensor:
    with ExitStack() as stack:
        for key, value in zip(keys, values, strict=True):
            stack.enter_context(patch(net, key, value))
        return net(x)


CASES = [
    pytest.param(world, keys, id=f"{world}, {name}")
    for world in WORLDS
    for name, keys in KEYS.items()
    if not (world.startswith("vmap") and "," in str(keys).replace("', '", ""))  # an example has one dimension
    and not (world == "jacrev" and ("[2" in str(keys) or "[4" in str(keys) or "-4" in str(keys)))  # two examples
]


@pytest.mark.parametrize(("world", "keys"), CASES)
def test_together_is_one_by_one(world: str, keys: list[str]) -> None:
    net, values = model(), [value_for(number) for number in range(len(keys))]
    found, expected = (
        WORLDS[world](lambda x, way=way: way(net, keys, values, x), inputs()) for way in (together, one_by_one)
    )
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_gradients_of_values_inputs_and_weights(keys: list[str]) -> None:
    found: list[tuple[Tensor | None, ...]] = []
    for way in (together, one_by_one):
        net, x = model(), inputs().requires_grad_()
        values = [torch.tensor(float(number), requires_grad=True) for number in range(len(keys))]
        wanted = [x, *values, *net.parameters()]
        found.append(torch.autograd.grad(way(net, keys, values, x).sin().sum(), wanted, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(*(torch.zeros(()) if g is None else g for g in (a, b)))


def test_a_tensor_is_copied_once_and_not_written_to() -> None:
    net, x = nn.Identity(), inputs()
    with capture(net) as before, patch(net, {f"[{i}]": float(i) for i in range(5)}), capture(net) as after:
        net(x)
    assert before[""] is x and after[""][:, 0].tolist() == [0, 1, 2, 3, 4] and x.equal(inputs())
    with torch.profiler.profile() as profile, patch(net, {f"[{i}]": float(i) for i in range(5)}):
        net(x)
    calls = [event.count for event in profile.key_averages() if event.key in ("aten::clone", "aten::slice_scatter")]
    assert sum(calls) == 1


def test_errors_name_the_place() -> None:
    net = model()
    with pytest.raises(TreeMismatch, match=r"^patch at '0\[9\]': \[9\] is out of range for Tensor\[5, 6\] float32"):
        together(net, ["0[0]", "0[9]"], [0.0, 0.0], inputs())
    with pytest.raises(TreeMismatch, match=r"^patch at '0\[1\]': Tensor\[5\] float32 does not broadcast"):
        together(net, ["0[0]", "0[1]"], [0.0, torch.ones(5)], inputs())
    with pytest.raises(SiteNotReached, match=r"'1\[0\]' was never reached"):
        with patch(net, {"0[0]": 0.0, "0[1]": 0.0, "1[0]": 0.0}):
            net[0](inputs())


def test_steps_and_other_contexts_keep_their_order() -> None:
    net, x = model(), inputs()
    with edit(net, "0", lambda value: value + 1), patch(net, {"0[0]": 5.0, "0[1]": 6.0}):
        with edit(net, "0", lambda value: value * 2), capture(net, "0") as acts:
            net(x)
    assert acts["0"][:2, 0].tolist() == [10.0, 12.0] and acts["0"][2:].equal((net[0](x)[2:] + 1) * 2)
    with patch(net, {"0[0]": 5.0, "0[1]": 6.0}, steps=1), capture(net, "0", keep="all") as every:
        net(x)
        net(x)
    assert [value[:2, 0].tolist() == [5.0, 6.0] for value in every.calls("0")] == [False, True]


def test_compiled_before_and_entered_again_with_other_values() -> None:
    net, x = model(), inputs()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for scale in (1.0, 2.0):
        with patch(net, {"0[0]": scale, "0[1]": 2 * scale}), capture(net, "0") as acts:
            compiled(x)
        assert acts["0"][:2, 0].tolist() == [scale, 2 * scale]


@pytest.mark.parametrize("keys", [["0[5:5]"], ["0[0]", "0[5:5]"]])
def test_a_region_with_nothing_in_it_is_not_reached(keys: list[str]) -> None:
    values = {key: torch.zeros(0, 6) if ":" in key else torch.ones(6) for key in keys}
    with pytest.raises(SiteNotReached, match=r"'0\[5:5\]'"), patch(net := model(), values):
        net(inputs())
