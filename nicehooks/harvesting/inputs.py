"""A batch as it comes from the user: what of it the model is given, and which of its places give rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.errors import NiceHooksError, TreeMismatch

SAMPLE = "sample"
"""The entry of a batch with the numbers of its examples, which the model is not given."""


class BatchFault(NiceHooksError, ValueError):
    """A batch that `harvest` cannot read."""


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        number: which of the stream it is.
        args: what the model is called with.
        kwargs: what it is called with by name.
        ids: the tokens `[batch, pos]`, if there are any.
        mask: which places of `ids` are no padding `[batch, pos]`; None where all of them are.
        samples: the numbers of its examples `[batch]`.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: Tensor | None
    mask: Tensor | None
    samples: Tensor

    def run(self, model: nn.Module, device: torch.device | None) -> None:
        """Calls `model` with it, on `device`."""
        model(*[_on(device, value) for value in self.args], **{k: _on(device, v) for k, v in self.kwargs.items()})

    def only(self, keep: Tensor) -> Batch:
        """The part of it with the examples that a mask `[batch]` keeps."""
        size = len(self.samples)
        args = tuple([_kept(value, keep, size) for value in self.args])
        kwargs = {name: _kept(value, keep, size) for name, value in self.kwargs.items()}
        ids, mask = (_kept(value, keep, size) for value in (self.ids, self.mask))
        return Batch(self.number, args, kwargs, ids, mask, self.samples[keep])

    @property
    def tensors(self) -> list[Tensor]:
        """Everything in it that the model is given."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


def _on(device: torch.device | None, value: Any) -> Any:
    return value.to(device) if device is not None and isinstance(value, Tensor) else value


def _kept(value: Any, keep: Tensor, size: int) -> Any:
    return value[keep] if isinstance(value, Tensor) and value.ndim and len(value) == size else value


def batches_of(stream: Iterable[Any], part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """The batches of a stream, or every so-many-th of them; the examples are numbered over all of it.

    Raises:
        BatchFault: the stream gives something that is no batch.
    """
    check_stream(stream)
    first = 0
    for number, given in enumerate(stream):
        batch = _batch(given, number, first)
        first += len(batch.samples)
        if number % part[1] == part[0]:
            yield batch


def check_stream(stream: Any) -> None:
    """Raises a `BatchFault` where one batch was given in the place of many."""
    if isinstance(stream, Tensor | Mapping | str):
        raise BatchFault(ONE_BATCH.format(kind=type(stream).__name__))


def _batch(given: Any, number: int, first: int) -> Batch:
    if isinstance(given, Batch):
        return given
    args, kwargs = _inputs(given, number)
    samples = kwargs.pop(SAMPLE, None)
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not _is_real(ids) else None
    size = _examples_in(args, kwargs, number)
    if samples is None:
        samples = torch.arange(first, first + size)
    samples = torch.as_tensor(samples).long().cpu()
    if samples.shape != (size,):
        raise BatchFault(f"batch {number}: {SAMPLE!r} has the shape {list(samples.shape)}, not [{size}].")
    return Batch(number, args, kwargs, ids, _mask(kwargs, number), samples)


def _inputs(given: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    if isinstance(given, tuple | list) and len(given) == 1 and isinstance(given[0], Tensor):
        return (given[0],), {}  # of a `TensorDataset`
    raise BatchFault(NO_BATCH.format(number=number, kind=type(given).__name__))


def _examples_in(args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise BatchFault(f"batch {number} has no tensor with a batch dimension.")


def _mask(kwargs: dict[str, Any], number: int) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise BatchFault(
            f"batch {number}: attention_mask is no tensor [batch, pos], so it does not say what is padding."
        )
    return mask.bool().cpu()


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def check_shape(shape: torch.Size, wanted: tuple[int, ...], key: str, per: str) -> None:
    """Raises a `TreeMismatch` unless a value at `key` has a row for everything that is to have one."""
    if tuple(shape[: len(wanted)]) != wanted:
        raise TreeMismatch(SHAPE[per].format(key=key, shape=list(shape), wanted=", ".join(map(str, wanted))))


ONE_BATCH = """\
batches is one {kind}, and should be an iterable of batches.
    harvest(model, where, batches, store)    # incorrect
    harvest(model, where, [batches], store)  # correct"""

NO_BATCH = """\
batch {number} is a {kind}: a batch is a dict of what the model is called with, or the one tensor it takes.
    {{"input_ids": ids, "attention_mask": mask}}"""

SHAPE = {
    "token": """\
{key!r} has the shape {shape}, but a row for each token takes a value [{wanted}, …].
    harvest(…, per="example")  # a row for each example
    harvest(model, "{key}/rows", …)  # where all positions of all examples are one dimension""",
    "example": "{key!r} has the shape {shape}, but a row for each example takes a value [{wanted}, …].",
}
