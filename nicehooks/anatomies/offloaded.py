"""Weights that `accelerate` keeps elsewhere: each module brings its own as it is called, and takes them away again.

To read a number without a call, the hook that `accelerate` has left at the module is asked as it would be around one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.errors import UnsupportedModule


def parameter_there(module: nn.Module, name: str) -> Tensor | None:
    """The parameter `name` of a module, brought if it is offloaded; None if there is none."""
    value = getattr(module, name, None)
    hook = hook_of(module)
    if not isinstance(value, Tensor) or not value.is_meta or hook is None:
        return value if isinstance(value, Tensor) else None
    hook.pre_forward(module)
    try:
        return getattr(module, name)
    finally:
        hook.post_forward(module, None)


def hook_of(module: nn.Module) -> Any:
    """The hook of `accelerate` at a module, if there is one (`accelerate` 1.0 … 1.15 keep it as `_hf_hook`)."""
    return getattr(module, "_hf_hook", None)


def device_of_run(run: nn.Module) -> torch.device | None:
    """Where `accelerate` runs the first module in `run` for which it says so; None if it does for none."""
    devices = (getattr(hook_of(module), "execution_device", None) for module in run.modules())
    device = next((one for one in devices if one is not None), None)
    return None if device is None else torch.device(device)


def is_partly_away(model: nn.Module) -> bool:
    """Whether a parameter has no numbers between calls."""
    return any(parameter.is_meta for parameter in model.parameters())


def is_without_weights(model: nn.Module) -> bool:
    """Whether a parameter has no numbers, and nothing brings them."""
    return is_partly_away(model) and all(hook_of(module) is None for module in model.modules())


def refuse_brought_as_a_whole(names: Mapping[str, nn.Module]) -> None:
    """Refuses a model in which a module brings the weights of all that is in it: nothing in it runs by itself.

    Raises:
        UnsupportedModule: there is such a module; the message names it.
    """
    for name, module in names.items():
        inner = (one for child in module.children() for one in child.parameters())
        if getattr(hook_of(module), "place_submodules", False) and any(one.is_meta for one in inner):
            raise UnsupportedModule(AS_A_WHOLE.format(kind=type(names[""]).__name__, name=name or "the model"))


AS_A_WHOLE = (
    "{kind} has no anatomy as it is offloaded: {name!r} brings the weights of all modules in it as it is called, and "
    "none of them runs by itself (preload_module_classes). Offload without that, or\n"
    "    accelerate.hooks.remove_hook_from_submodules(model)  # brings the weights back for good"
)
