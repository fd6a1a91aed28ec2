"""Whether a module is ever called."""

from __future__ import annotations

from torch import nn

from nicehooks import torch_private


def has_forward(module: nn.Module) -> bool:
    """Whether `module` can be called at all; a `ModuleList` cannot."""
    return has_forward_by_type(module) or "forward" in vars(module)


def has_forward_by_type(module: nn.Module) -> bool:
    """Whether every module of this type can be called."""
    return torch_private.is_scripted(module) or type(module).forward is not torch_private.no_forward


def has_own_call(module: nn.Module) -> bool:
    """Whether the class of `module` has a `__call__` of its own, which may never get to `forward`."""
    return type(module).__call__ is not nn.Module.__call__


SCRIPTED = (
    "{name!r} is a {kind}: TorchScript runs its forward outside of Python, where nothing can be captured or changed.\n"
    "  Use the original nn.Module instead of the scripted one, or select only modules around it."
)
