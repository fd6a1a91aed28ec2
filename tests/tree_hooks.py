"""What the tests of trees of hooks share: a recorder by hand, trees of one hook each, and comparing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gallery.families import IDS
from torch import Tensor, nn

from nicehooks.hooktrees import TransformerHooks


class Recorder:
    """Records the values at all places of a model by hand."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int | None, Tensor]]] = {}

    def __call__(self, place: str, value: Tensor, layer: int | None = None) -> Tensor:
        self.values.setdefault(place, []).append((layer, value))
        return value


def tree_of(places: Any, hook: Callable[[str], Callable[..., Any]], kind: str = "fwd") -> TransformerHooks:
    tree = TransformerHooks()
    for place in places:
        tree.append_to_path(f"{place}.{kind}", hook(place))
    return tree


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def warped(value: Tensor) -> Tensor:
    """Another value, for a softmax and for a norm, too."""
    return value + value.tanh()


POST_MLP = "resid.torso.post_mlp.fwd"


def logits_of(model: Any) -> Tensor:
    return model(IDS).logits


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]
