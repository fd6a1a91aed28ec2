"""What was seen in the forward on which a layout is checked, and how two values are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.ends import unembedded_by
from nicehooks.anatomies.layouts import Layout
from nicehooks.anatomies.places import PartPlaces
from nicehooks.caches.cache import ActivationCache


def off_by(made: Tensor, came: Tensor, least: float | None = None) -> str | None:
    """By how much two values differ, beside rounding; None if they agree.

    Args:
        made: what it should be.
        came: what it is.
        least: the size of the smallest thing that an error must be small beside.
    """
    if made.shape != came.shape:
        return f"shape {list(made.shape)} in the place of {list(came.shape)}"
    size = float(came.abs().max())
    rounding = 16 * torch.finfo(came.dtype).eps * size if came.dtype.is_floating_point else 0.0
    allowed = max(1e-3 * (size if least is None else min(least, size)), rounding)
    error = float((made - came).abs().max())
    return None if error <= allowed else f"{error:.2g}, where values are up to {size:.2g}"


class Seen:
    """The values of the forward on which a layout is checked.

    Attributes:
        acts: the values by path.
        names: the modules of the model by name.
        now: the attention implementation that is set.
    """

    def __init__(self, acts: ActivationCache, names: Mapping[str, nn.Module], now: str) -> None:
        self.acts = acts
        self.names = names
        self.now = now

    def at(self, path: str) -> Tensor | None:
        """The value at a path, if it is a tensor and was seen."""
        value = self.acts.get(path)
        return value if isinstance(value, Tensor) else None

    def part(self, places: PartPlaces, part: str) -> Tensor | None:
        """The value of a part of a layer."""
        path = places.path(part, self.now)
        return self.at(path) if isinstance(path, str) else None

    def single(self, layout: Layout, part: str) -> Tensor | None:
        """The value of a part that a model has once."""
        path = layout.singles.get(part)
        return self.at(path) if isinstance(path, str) else None

    def unembedded(self, name: str, value: Tensor) -> Tensor | None:
        """The logits that an unembedding makes of a value by itself."""
        return self.run(name, value, unembedded_by)

    def run(
        self, name: str, value: Tensor, call: Callable[[nn.Module, Tensor], Any] = lambda module, value: module(value)
    ) -> Tensor | None:
        """What a module makes of a value by itself."""
        try:
            with torch.no_grad():
                made = call(self.names[name], value)
        except Exception:  # whatever a module raises that takes something else
            return None
        return made if isinstance(made, Tensor) else None

    def reaches(self, made: Tensor, came: Tensor, norm: str | None) -> bool:
        """Whether `made` is `came`, or becomes it in the norm behind the branch."""
        if off_by(made, came) is None:
            return True
        normed = None if norm is None else self.run(norm, made)
        return normed is not None and off_by(normed, came) is None
