"""Which rows a subscript means: a number, a slice, a list, a tensor, or a truth value for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import TreeMismatch


def rows_meant(index: Any, count: int) -> Tensor:
    """The rows of `count` that `index` means, int64, each from 0 on; of its shape, but for slices and truth values.

    >>> rows_meant([3, -1], 10).tolist(), rows_meant(slice(8, None, -4), 10).tolist()
    ([3, 9], [8, 4, 0])

    Raises:
        TreeMismatch: there are no such rows.
    """
    if isinstance(index, slice):
        places = _range_of(index, count)
        return torch.arange(places.start, places.stop, places.step) if places else torch.empty(0, dtype=torch.int64)
    rows = _as_tensor(index)
    if rows.dtype == torch.bool:
        if rows.shape != (count,):
            raise TreeMismatch(f"truth values {list(rows.shape)} choose from {count} rows: there is one for each.")
        return rows.nonzero().squeeze(1)
    wrapped = torch.where(rows < 0, rows + count, rows)
    outside = (wrapped < 0) | (wrapped >= count)
    if outside.any():
        raise TreeMismatch(
            f"the rows of this store go from 0 to {count - 1}, and {index_shown(rows[outside])} was asked for."
        )
    return wrapped


def run_meant(index: slice, count: int) -> tuple[int, int] | None:
    """The first row and the one behind the last, where a slice means rows that follow each other."""
    places = _range_of(index, count)
    return (places.start, max(places.start, places.stop)) if places.step == 1 else None


def _range_of(index: slice, count: int) -> range:
    try:
        return range(*index.indices(count))
    except (TypeError, ValueError) as error:
        raise TreeMismatch(f"rows cannot be read by {index}: {error}.") from None


def _as_tensor(index: Any) -> Tensor:
    try:
        rows = torch.as_tensor(index).cpu()
    except (TypeError, ValueError, RuntimeError):
        rows = None
    if rows is None or (rows.numel() and (rows.is_floating_point() or rows.is_complex())):
        raise TreeMismatch(f"rows are read by numbers, truth values or a slice, and not by {index!r}.")
    return rows if rows.dtype == torch.bool else rows.long()


def index_shown(rows: Tensor) -> str:
    """The first few of some rows."""
    return ", ".join(str(row) for row in rows.reshape(-1)[:3].tolist()) + (", …" if rows.numel() > 3 else "")
