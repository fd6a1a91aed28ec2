"""Encoders of PyTorch that run a fused kernel, which would not call the modules inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Pairs, add_around
from nicehooks.core.selection import Site


class Passing(torch.overrides.TorchFunctionMode):
    """Does nothing, but PyTorch's fused fast paths see that it is there, in this thread, and stand back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SlowPathRule(Rule):
    """Keeps an `nn.TransformerEncoder` or its layer from a fused kernel that would not call its submodules."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        frame.enter(Passing())


def _slow_path_rules(sites: list[Site], root: nn.Module, counting: bool) -> Pairs:
    """A rule for each encoder that contains one of `sites`."""
    encoders = {id(encoder): encoder for site in sites if site._encoders for encoder in site.encoders}
    return [(encoder, SlowPathRule()) for encoder in encoders.values()]


add_around(_slow_path_rules)
