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
