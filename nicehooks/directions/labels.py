"""Labels as they come from the user: a tensor, a list, an array; of truth values, whole numbers, text or numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from nicehooks.errors import TreeMismatch


def known_labels(labels: Any, count: int) -> Any:
    """`labels` as a numpy array of `count`.

    Raises:
        TreeMismatch: they are no labels, or not as many.
    """
    import numpy

    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        labels = (labels.float() if labels.is_floating_point() else labels).numpy()
    elif isinstance(labels, str | Mapping | set | frozenset) or not isinstance(labels, Iterable):
        raise TreeMismatch(NO_LABELS.format(what=type(labels).__name__))
    else:
        labels = _of_one_kind(list(labels))
    found: Any = numpy.asarray(labels)
    if len(found) != count:
        raise TreeMismatch(f"probe takes a label for each row: there are {len(found)} labels for {count} rows.")
    if found.ndim != 1 or found.dtype.kind not in "biufU":
        raise TreeMismatch(f"probe takes truth values, numbers or text [{count}]: these are {list(found.shape)}.")
    if found.dtype.kind == "f" and not numpy.isfinite(found).all():
        raise TreeMismatch("probe takes finite numbers as labels: there are NaN or infinite ones.")
    return found


def _of_one_kind(labels: list[Any]) -> list[Any]:
    """`labels`, of which numpy would make text where one of them is."""
    values = [label.item() if isinstance(label, Tensor) and label.ndim == 0 else label for label in labels]
    text = {isinstance(value, str) for value in values}
    if len(text) > 1 or any(value is None for value in values):
        raise TreeMismatch("probe takes labels of one kind: some are text, or None, and others are not.")
    return values


NO_LABELS = """\
probe takes a label for each row, and no {what}: a tensor, or a list.
  Of a store also a mapping from the numbers of its samples, or a function of its rows."""
