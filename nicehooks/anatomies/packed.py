"""Streams without a dimension for the batch, as in towers that read the patches of all pictures in one row.

NOTE [Packed patches]
Such a tower maps `[patch, d_model]` to `[patch, d_model]`. Its record is read with a batch of one row: every value over
patches as `[1, patch, …]`, which is what the subscript `[None]` makes of it. So the paths of its parts have `[None]` in
them, and all that is said of a part, its dimensions and its heads, holds of them as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.recording import Record
from nicehooks.anatomies.stacks import numbered_as
from nicehooks.anatomies.streams import is_attention

ONE_ROW = "[None]"


def as_one_row(record: Record) -> bool:
    """Gives the values of `record` a batch of one row, if its layers have none; whether they have none."""
    count = _patches_in(record)
    if count is None:
        return False
    for call in record.calls:
        call.outputs = _in_row(call.outputs, count, ONE_ROW)
        call.inputs = _in_row(call.inputs, count, "" if call.function else ONE_ROW)  # a function's are no paths
    return True


def _patches_in(record: Record) -> int | None:
    """How many patches the first layer maps that has attention in it, `[patch, d_model]` to the same shape."""
    for call in record.of_modules():
        if "#" in numbered_as(call.owner) and any(map(is_attention, record.within(call))):
            given = [value.shape for value in call.outputs if len(value.shape) == 2]
            if given and given[0] in [value.shape for value in call.inputs]:
                return given[0][0]
    return None


def _in_row(values: Sequence[Value], count: int, step: str) -> list[Value]:
    return [value.in_row(step) if _is_over_patches(value.shape, count) else value for value in values]


def _is_over_patches(shape: tuple[int, ...], count: int) -> bool:
    """Whether it is `[patch, …]`, or `[head, patch, patch]`."""
    return (len(shape) in (2, 3) and shape[0] == count) or (len(shape) == 3 and shape[1:] == (count, count))
