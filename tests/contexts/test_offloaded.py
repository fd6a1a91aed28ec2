"""Models whose weights `accelerate` keeps elsewhere, and brings as each module is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from nicehooks import UnsupportedModule, ablate, capture, describe, edit, patch


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def dispatched(model: nn.Module, folder: Path) -> Any:
    return dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    "dispatch_model": dispatched,
}


@pytest.fixture(params=OFFLOADS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Sequential:
    model = plain()
    OFFLOADS[request.param](model, tmp_path)
    assert model[1].weight.is_meta
    return model


def test_values_are_captured_and_changed(model: nn.Sequential) -> None:
    clean = plain()(X)
    with capture(model, "*") as acts, ablate(model, "1[:, 0]"):
        assert not model(X)[:, 0].any()
    assert torch.equal(acts["0"], plain()[0](X)) and not acts["1"].is_meta
    x = X.clone().requires_grad_()
    with capture(model, "1@input.grad[0]") as acts:
        model(x).sum().backward()
    assert torch.allclose(acts["1@input.grad[0]"], plain()[1].weight.sum(0).expand(3, 4))
    assert torch.equal(model(X), clean) and model[1].weight.is_meta and not describe(model)


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "capture": lambda model: capture(model, "1@weight"),
    "ablate": lambda model: ablate(model, "1@weight"),
    "patch": lambda model: patch(model, "1@weight[0]", torch.zeros(4)),
    "edit": lambda model: edit(model, "1@weight", lambda weight: weight * 2),
}


@pytest.mark.parametrize("verb", WEIGHTS)
def test_a_weight_that_is_not_there_is_refused_with_the_way_that_works(model: nn.Sequential, verb: str) -> None:
    with pytest.raises(UnsupportedModule, match=r"'1@weight(\[0\])?' is offloaded: accelerate brings its numbers"):
        with WEIGHTS[verb](model):
            model(X)
    assert torch.equal(model(X), plain()(X)) and not describe(model)
    remove_hook_from_submodules(model)
    with WEIGHTS[verb](model):
        assert torch.equal(model(X), plain()(X)) == (verb == "capture")
