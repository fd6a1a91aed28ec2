"""Functions in the place of contexts: a participle transforms a model into a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nicehooks.activations import ActivationCache
from nicehooks.interventions import capture
from nicehooks.selection import Where


def captured(model: nn.Module, *where: Where, **options: Any) -> Callable[..., tuple[Any, ActivationCache]]:
    """A function with the model's signature that returns `(output, activations)`.

    So activations leave a `torch.func` transform as ordinary outputs:

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> output, acts = torch.vmap(captured(model, "0"))(torch.ones(5, 4))
    >>> acts["0"].shape
    torch.Size([5, 3])

    Args:
        model: any module.
        where: paths, sites, … (see `select`); every module if there is none.
        options: as for `capture`.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, ActivationCache]:
        with capture(model, *where, **options) as acts:
            output = model(*args, **kwargs)
        return output, acts

    return run
