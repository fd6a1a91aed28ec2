"""What tells one model, and one stream of data, from another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.harvesting.shards import bytes_of_tensor

LOOKS = 64
"""How many elements of a parameter are looked at."""


def fingerprint(model: nn.Module) -> str:
    """A short text that another model, or the same with other weights, does not have.

    It takes the class of each module, and of each parameter and buffer the name, the shape, the dtype, and up to 64
    elements that are spread evenly over it: a model of any size is told in milliseconds, and one that was trained
    further is another one.

    >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
    (True, False)
    """
    found = hashlib.sha256(type(model).__name__.encode())
    found.update(" ".join(f"{name} {type(module).__name__}" for name, module in model.named_modules()).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_look(tensor))
    return found.hexdigest()[:16]


def _look(tensor: Tensor) -> bytes:
    """Some elements of `tensor`, if they are here: not on the device `meta`, and not in pieces elsewhere."""
    if tensor.is_meta or type(tensor).__name__ == "DTensor" or not tensor.numel() or tensor.layout != torch.strided:
        return b""
    with torch.no_grad():
        at = torch.linspace(0, tensor.numel() - 1, min(LOOKS, tensor.numel()), dtype=torch.float64).long()
        index = torch.unravel_index(at.to(tensor.device), tensor.shape) if tensor.ndim else ()
        few = tensor.detach()[index].to("cpu", torch.float64 if tensor.is_floating_point() else torch.int64)
        return bytes(bytes_of_tensor(few.contiguous()))


class Digest:
    """The fingerprint of a stream of batches, as far as it was read."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *tensors: Tensor | None) -> None:
        """Goes on by one batch."""
        for tensor in tensors:
            if tensor is not None:
                here = tensor.detach().to("cpu").contiguous()
                self._hash.update(f"{tuple(here.shape)} {here.dtype}".encode())
                self._hash.update(bytes_of_tensor(here))

    @property
    def text(self) -> str:
        """The fingerprint of what was added so far."""
        return self._hash.hexdigest()[:16]


def name_of(fn: Any) -> str:
    """How a function is called where it was written: all that can be told of one in a file."""
    if fn is None:
        return ""
    named = getattr(fn, "__qualname__", None)
    return str(named) if named else str(fn) if isinstance(fn, str) else type(fn).__qualname__
