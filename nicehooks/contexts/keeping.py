"""How what a model computes gets to where it is kept: out of the transforms around it, once, and as a copy if asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private, torch_private_tensors
from nicehooks.torch_private import innermost_transform
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS, refused


class Keeper:
    """Keeps values as a capture does, whatever it is that keeps them.

    Args:
        detach: takes each tensor out of the autograd graph.
        clone: copies each, so that in-place layers cannot overwrite it.
        to: a device or dtype, or a tuple of arguments for `Tensor.to`.
        full: brings each together that is spread over processes.
    """

    __slots__ = ("clone", "copies", "detach", "full", "to")

    def __init__(self, detach: bool, clone: bool, to: Any, full: bool = False) -> None:
        self.detach = detach
        self.clone = clone
        self.to: tuple[Any, ...] = () if to is None else to if isinstance(to, tuple) else (to,)
        self.full = full
        self.copies = detach or clone or full or bool(self.to)

    def keep(self, value: Any, level: int, put: Callable[[Any], None]) -> None:
        """Hands `value` to `put`, as it is outside of every transform above `level`, where `put` runs, too."""
        if torch.compiler.is_dynamo_compiling():
            put(self._copied(trees.map_tensors(lambda tensor: torch_private_tensors.lift_traced(tensor, level), value)))
        elif innermost_transform() is None:
            put(self._copied(value))
        else:
            lifted = trees.map_tensors(lambda tensor: torch_private_tensors.lift(tensor, level), value)
            with torch_private_tensors.outside_transforms(level):
                put(self._copied(lifted))

    def _copied(self, value: Any) -> Any:
        return trees.map_tensors(self._copy, value) if self.copies else value

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = trees.gathered(tensor) if self.full else tensor
        tensor = tensor.detach() if self.detach else tensor
        tensor = tensor.clone() if self.clone else tensor
        try:
            return tensor.to(*self.to) if self.to else tensor
        except (*TORCH_ERRORS, AssertionError) as error:  # the latter from a torch without CUDA
            asked = ", ".join(map(str, self.to))
            raise refused(error, f"{trees.structure_of(tensor)} does not go to {asked}") from None


def runs_again(kept: dict[str, Any], key: str) -> bool:
    """Whether what comes by is the second run of a checkpointed region, whose first is in `kept`; for no gradient."""
    if torch.compiler.is_compiling():
        return False
    return dict.__contains__(kept, key) and torch_private.in_backward()
