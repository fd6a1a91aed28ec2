"""A grid of numbers with labelled axes as a page: a heat map, or bars, to look at cell by cell and to sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nicehooks.pictures.pages import Page

Labelled = tuple[str, Sequence[str]]
"""An axis: what it is ("layer"), and a label for each index."""

MOST_LABELS = 400
"""How many labels of an axis are shown; a page with more takes browsers seconds to lay out."""


def grid_view(
    values: Tensor,
    axes: Sequence[Labelled],
    title: str = "effects",
    spread: Tensor | None = None,
    sites: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Page:
    """A grid of numbers as a page: the value of what is under the pointer, rows and columns sorted by a click.

    The two longest axes are rows and columns, one axis alone is shown as bars. Of each further axis one index is shown
    at a time, or the mean over all.

    >>> import torch
    >>> grid_view(torch.eye(2), [("layer", "01"), ("position", ["the", "cat"])], "what was found")
    Page('what was found')

    Args:
        values: `[*axes]`; NaN is a cell without a value.
        axes: `(name, labels)` for each dimension of `values`.
        title: what stands above it.
        spread: `[*axes]`, the standard deviation of each value.
        sites: the path of each cell, in the order of `values.flatten()`.
        notes: sentences to stand below the title.
    """
    numbers = values.detach().to("cpu", torch.float64)
    cells = torch.arange(numbers.numel()).reshape(numbers.shape)
    named = [(str(name), [str(label) for label in labels]) for name, labels in axes]
    said = list(notes)
    for axis in grid_axes(numbers.shape):
        kept = _largest(numbers, axis)
        if len(kept) < numbers.shape[axis]:
            name, labels = named[axis]
            said.append(
                f"Of {len(labels)} along the axis {name!r}, the {MOST_LABELS} with the largest values are shown."
            )
            named[axis] = (name, [labels[index] for index in kept.tolist()])
            numbers, cells = numbers.index_select(axis, kept), cells.index_select(axis, kept)
    order = [*grid_axes(numbers.shape), *further_axes(numbers.shape)]
    shown = cells.permute(order).flatten().tolist()
    data: dict[str, Any] = {
        "axes": [{"name": named[axis][0], "labels": named[axis][1]} for axis in order],
        "values": _digits(numbers.permute(order)),
        "spread": None if spread is None else _digits(spread.detach().to("cpu", torch.float64).flatten()[shown]),
        "sites": [sites[cell] for cell in shown] if any(sites) else None,
        "notes": said,
    }
    return Page(title, "grid", data)


def grid_axes(shape: Sequence[int]) -> list[int]:
    """Which dimensions are the rows and the columns: the two longest, in their order; of equal ones, the later."""
    return sorted(sorted(range(len(shape)), key=lambda axis: (-shape[axis], -axis))[:2])


def further_axes(shape: Sequence[int]) -> list[int]:
    """The other dimensions."""
    return [axis for axis in range(len(shape)) if axis not in grid_axes(shape)]


def _largest(numbers: Tensor, axis: int) -> Tensor:
    """The indices along `axis` that have the largest numbers, of either sign, in their order."""
    count = numbers.shape[axis]
    if count <= MOST_LABELS or not numbers.numel():
        return torch.arange(count)
    return (
        numbers.abs()
        .nan_to_num(-1.0)
        .movedim(axis, 0)
        .reshape(count, -1)
        .amax(1)
        .topk(MOST_LABELS)
        .indices.sort()
        .values
    )


def _digits(numbers: Tensor) -> list[float | None]:
    """Six digits of each number, and None for what JSON has no word for."""
    return [float(f"{number:.6g}") if abs(number) < float("inf") else None for number in numbers.flatten().tolist()]
