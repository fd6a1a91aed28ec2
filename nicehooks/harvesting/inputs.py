"""A batch as it comes from the user: what of it the model is given, and which of its places give rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.core.selection import Site
from nicehooks.errors import NiceHooksError, TreeMismatch
from nicehooks.values import trees

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
    """Raises a `BatchFault` where one batch was given in the place of many, or something that gives none."""
    if isinstance(stream, Tensor | Mapping | str):
        raise BatchFault(ONE_BATCH.format(kind=type(stream).__name__))
    if not isinstance(stream, Iterable) and not hasattr(stream, "__getitem__"):
        raise BatchFault(f"batches is a {type(stream).__name__}, and should be an iterable of batches.")


def _batch(given: Any, number: int, first: int) -> Batch:
    if isinstance(given, Batch):
        return given
    args, kwargs = _inputs(given, number)
    samples = kwargs.pop(SAMPLE, None)
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not trees.has_fractions(ids) else None
    mask = _mask(kwargs, ids, number)
    size = _examples_in([ids, mask, *args, *kwargs.values()], number)
    return Batch(number, args, kwargs, ids, mask, _samples(samples, range(first, first + size), number))


def _samples(given: Any, otherwise: range, number: int) -> Tensor:
    """The numbers of the examples of a batch."""
    samples = torch.as_tensor(list(otherwise) if given is None else given).cpu()
    if samples.shape != (len(otherwise),):
        raise BatchFault(f"batch {number}: {SAMPLE!r} has the shape {list(samples.shape)}, not [{len(otherwise)}].")
    if len(samples) and (trees.has_fractions(samples) or samples.dtype == torch.bool):
        raise BatchFault(f"batch {number}: {SAMPLE!r} has {str(samples.dtype)[6:]}s in it, and not whole numbers.")
    return samples.long()


def _inputs(given: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    if isinstance(given, tuple | list) and len(given) == 1 and isinstance(given[0], Tensor):
        return (given[0],), {}  # of a `TensorDataset`
    raise BatchFault(NO_BATCH.format(number=number, kind=type(given).__name__))


def _examples_in(values: Sequence[Any], number: int) -> int:
    """How many examples there are: what `values` says first, of which tokens come before everything else."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise BatchFault(f"batch {number} has no tensor with a batch dimension.")


def _mask(kwargs: dict[str, Any], ids: Tensor | None, number: int) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise BatchFault(
            f"batch {number}: attention_mask is no tensor [batch, pos], so it does not say what is padding."
        )
    if ids is not None and mask.shape != ids.shape:
        raise BatchFault(
            f"batch {number}: attention_mask has the shape {list(mask.shape)}, and the tokens {list(ids.shape)}."
        )
    return mask.bool().cpu()


def check_shape(shape: torch.Size, wanted: tuple[int, ...], key: str, per: str, whole: Any) -> None:
    """Raises a `TreeMismatch` unless a tensor of the value `whole` at `key` has a row for what is to have one."""
    if tuple(shape[: len(wanted)]) == wanted:
        return
    lines = [SHAPE.format(key=key, shape=list(shape), per=per, wanted=", ".join(map(str, wanted)))]
    if not isinstance(whole, Tensor):
        lines.append(f'    harvest(model, "{key}[0]", …)  # one part of the value, which is a {type(whole).__name__}')
    elif per == "token" and shape and shape[0] == wanted[0]:
        lines.append('    harvest(…, per="example")  # a row for each example')
    elif per == "token" and shape and shape[0] == wanted[0] * wanted[1]:
        lines.append(f'    harvest(model, "{key}/rows", …)  # all positions of all examples are one dimension')
    raise TreeMismatch("\n".join(lines))


def check_has_rows(site: Site, per: str) -> None:
    """Raises a `TreeMismatch` where the path of a site says that it has no such rows, whatever its sizes are.

    Sizes tell it in most batches, but not in one of as many positions as the value happens to have of something else.
    """
    port = site.path.port
    if port.name and isinstance(getattr(site.module, port.name, None), Tensor):
        raise TreeMismatch(f"'{site}' is a parameter: it has no row for each {per}.")
    by_head = port.part in ("pattern", "scores") or getattr(site.path, "head_dim", None) == 1
    if per == "token" and by_head and 1 not in _dims_gone(site):
        raise TreeMismatch(BY_HEAD.format(site=site))


def check_keeps_positions(site: Site, value: Any) -> None:
    """Raises a `TreeMismatch` where a subscript has made a value `[batch, d]` of one `[batch, pos, d]`.

    What is left of one `[batch, head, pos, d]` is another matter: it has a row for each token.
    """
    if isinstance(value, Tensor) and value.ndim == 2 and _dims_gone(site) == [1]:
        raise TreeMismatch(GONE.format(site=site))


def _dims_gone(site: Site) -> list[int]:
    """Which dimensions of a value a subscript has taken one entry of."""
    for index in site.path.chain:
        if isinstance(index, tuple):
            ahead = index[: index.index(...)] if ... in index else index
            return [dim for dim, entry in enumerate(ahead) if type(entry) is int]
    return []


ONE_BATCH = """\
batches is one {kind}, and should be an iterable of batches.
    harvest(model, where, batches, store)    # incorrect
    harvest(model, where, [batches], store)  # correct"""

NO_BATCH = """\
batch {number} is a {kind}: a batch is a dict of what the model is called with, or the one tensor it takes.
    {{"input_ids": ids, "attention_mask": mask}}"""

SHAPE = "{key!r} has the shape {shape}, but a row for each {per} takes a value [{wanted}, …]."

BY_HEAD = """\
'{site}' is [batch, head, pos, …]: it has no row for each token, but one for each head and token.
    harvest(model, "{site}[:, 0]", …)  # of one head
    harvest(…, per="example")  # a row for each example"""

GONE = """\
'{site}' takes one of its positions, so it has no row for each token.
    harvest(…, per="example")  # a row for each example"""
