"""The residual stream of a language model after each layer: by its anatomy, or, of an unknown one, by its blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.finding import find_anatomy
from nicehooks.contexts.functions import captured
from nicehooks.errors import UnsupportedModule


def decoder_blocks(model: nn.Module) -> list[str]:
    """The names of the decoder blocks of `model`: the children of the `ModuleList` that holds most of it.

    >>> decoder_blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
    ['layers.0', 'layers.1']

    Raises:
        UnsupportedModule: there is no `ModuleList` with parameters in it.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not any(sizes.values()):
        raise UnsupportedModule(f"{type(model).__name__} has no ModuleList of decoder blocks.")
    largest = max(sizes, key=lambda name: sizes[name])
    return [f"{largest}.{name}" for name, _ in model.get_submodule(largest).named_children()]


def residual_stream(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """One run of `model` without gradients, and the residual stream after each layer.

    Returns:
        The model's output, and `[batch, pos, d_model]` by the path of its site, as `"h.3"`: `resid_post` of its
        anatomy. Where no table knows the model, what its decoder blocks return: `"h.3[0]"`, if that is a tuple.
    """
    try:
        where = [str(path) for path in find_anatomy(model).resid_post]
    except UnsupportedModule:
        where = decoder_blocks(model)
    with torch.no_grad():
        output, found = captured(model, *where)(**inputs)
    paths = {path: f"{path}[0]" if isinstance(value, tuple) else path for path, value in found.items()}
    return output, {path: found[path] for path in paths.values()}
