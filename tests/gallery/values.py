"""Values with parts: what modules of the gallery return and take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class Box:
    """A dataclass with a field that is no tensor."""

    content: Any
    note: str = "kept"


class Pair(NamedTuple):
    """A named tuple."""

    left: Any
    right: Any


@dataclass
class WithDefault:
    """A dataclass with a field that may be None."""

    u: Any
    v: Any = None


class Couple(NamedTuple):
    """A named tuple with a list in it."""

    first: Tensor
    rest: object


@dataclass
class Output(ModelOutput):
    """What models of `transformers` return: a dict that leaves out what is None."""

    logits: Any = None
    states: Any = None
    loss: Any = None


@dataclass
class Record:
    """A dataclass."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    """A dataclass that cannot be changed."""

    first: Any
    second: Any


@dataclass
class Encoded:
    """A dataclass with the names that encoders have."""

    last_hidden_state: Tensor
    pooled: Tensor


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, start: int = 0) -> Tensor:
    """A tensor of that shape that counts up from `start`."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count).reshape(shape).to(dtype)
