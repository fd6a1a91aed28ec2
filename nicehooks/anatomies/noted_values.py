"""The values that go by in a recorded forward, and what tells one of them from another.

NOTE [Values have keys]
Parts are found by asking where a value comes from and who reads it. Two values are taken for the same one if their
bytes are equal, whatever their shapes: so a view, a reshape, and a dropout in evaluation are seen through, and an
accident is next to impossible on random inputs. A value is copied at once, because a model may write into it later;
its key is taken when it is asked for, which of most values nobody does. A tensor that goes by again, unchanged, is the
copy that there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[int, int]
"""What tells the numbers of one tensor from those of others: how many there are, and a hash of their bytes."""

MOST_NUMBERS = 1 << 24
"""Larger values than these many numbers are not looked at."""


def key_of(value: Tensor) -> Key:
    """The key of a value; see NOTE [Values have keys]."""
    flat = value.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single number may have any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return value.numel(), hash(flat.view(torch.uint8).cpu().numpy().tobytes())


class Copied:
    """A copy of a tensor, and its key, as soon as somebody asks for it."""

    __slots__ = ("_key", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._key: Key | None = None

    @property
    def key(self) -> Key:
        if self._key is None:
            self._key = key_of(self.tensor)
        return self._key


class Value:
    """One tensor in an argument or a result of a call.

    Attributes:
        step: where it is in them, as text: `""`, `"[0]"`, `"['logits']"`; of an argument, `"input[0]"`.
        is_in_row: whether a dimension was put before those that it had; see NOTE [Packed patches].
    """

    __slots__ = ("_copied", "is_in_row", "shape", "step")

    def __init__(self, step: str, copied: Copied, is_in_row: bool = False) -> None:
        self.step = step
        self._copied = copied
        self.is_in_row = is_in_row
        self.shape: tuple[int, ...] = tuple(copied.tensor.shape)

    @property
    def tensor(self) -> Tensor:
        """What it was when it went by."""
        return self._copied.tensor

    @property
    def key(self) -> Key:
        """What it shares with every value of the same numbers."""
        return self._copied.key

    def in_row(self, step: str) -> Value:
        """The same value with one dimension more, the first, which `step` makes in a path."""
        return Value(self.step + step, Copied(self.tensor[None]), is_in_row=True)


def _values_in(value: Any) -> bool:
    if type(value) is not Tensor and (not isinstance(value, Tensor) or isinstance(value, nn.Parameter)):
        return False  # what is no parameter by its type need not be asked, which is slow
    usual = value.layout == torch.strided
    return usual and 0 < value.numel() <= MOST_NUMBERS and value.device.type != "meta"


def tensors_of(output: Any, step: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a result, at most two levels deep, with the subscripts that lead to them."""
    if _values_in(output):
        yield step, output
    elif isinstance(output, dict) and step.count("[") < 2:
        for name, one in output.items():
            yield from tensors_of(one, f"{step}[{name!r}]")
    elif isinstance(output, tuple | list) and step.count("[") < 2:
        for index, one in enumerate(output):
            yield from tensors_of(one, f"{step}[{index}]")


def given_to_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a module: those that its forward numbers by their numbers."""
    for index, one in enumerate(args):
        if _values_in(one):
            yield f"input[{index}]", one
        elif type(one) is dict:
            yield from ((f"input[{index}][{name!r}]", each) for name, each in one.items() if _values_in(each))
    if kwargs:
        order = _parameters_in(type(module))
        for name, one in kwargs.items():
            if _values_in(one):
                yield f"input[{order.index(name) if name in order else repr(name)}]", one


def given_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a function, also those in a list, with their number or name."""
    for index, one in enumerate(args):
        if _values_in(one):
            yield str(index), one
        elif isinstance(one, tuple | list):
            yield from ((str(index), each) for each in one if _values_in(each))
    yield from ((name, one) for name, one in kwargs.items() if _values_in(one))


def _parameters_in(kind: type[nn.Module]) -> list[str]:
    try:
        signature = inspect.signature(kind.forward)
    except (TypeError, ValueError):
        return []
    names = list(signature.parameters)[1:]
    return [name for name in names if signature.parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
