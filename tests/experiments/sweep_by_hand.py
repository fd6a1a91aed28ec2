"""What a sweep is held against: the plain loop over contexts, and models of other kinds than transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import capture, edit, patch
from nicehooks.experiments.grids import stems_of


def plain_loop(model: nn.Module, effects: Any, value_at: Any, metric: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The metric under a context of its own for each cell, in the order of the grid."""
    found: list[Tensor] = []
    with torch.no_grad():
        for path in effects.sites:
            value = value_at(path)
            context = edit(model, path, value) if callable(value) else patch(model, path, value)
            with context:
                found.append(metric(model(*args, **kwargs)))
    return torch.stack(found)


def far_from_loop(model: nn.Module, effects: Any, value_at: Any, metric: Any, *args: Any, **kwargs: Any) -> float:
    """How far the effects are from those of the plain loop, at most, in parts of the largest of these."""
    with torch.no_grad():
        baseline = metric(model(*args, **kwargs))
    expected = plain_loop(model, effects, value_at, metric, *args, **kwargs) - baseline
    found = effects.values.flatten() if effects.examples is None else effects.examples.reshape(expected.shape)
    assert expected.abs().max() > 0, "a sweep in which nothing has an effect proves nothing"
    return ((found - expected).abs().max() / expected.abs().max()).item()


def recorded(model: nn.Module, where: Any, *args: Any, **kwargs: Any) -> Any:
    """The values around the sites in a run."""
    with torch.no_grad(), capture(model, *stems_of(model, where), clone=True) as seen:
        model(*args, **kwargs)
    return seen


def made(kind: type[nn.Module], seed: int = 0) -> Any:
    """A model of `kind` in evaluation mode."""
    torch.manual_seed(seed)
    model = kind().eval()
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        assert norm.running_mean is not None
        norm.running_mean.normal_()
    return model
