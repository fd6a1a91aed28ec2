"""Rows of a store for Arrow and for pandas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nicehooks.extras import needs
from nicehooks.harvesting.stored_rows import StoredRows


def arrow_table(rows: StoredRows) -> Any:
    """`rows` as a `pyarrow.Table`. Numbers that Arrow has no type for (bfloat16, float8) become float32."""
    with needs("harvest"):
        import pyarrow
    columns = {name: pyarrow.array(_as_numbers(value)) for name, value in _origin(rows).items()}
    for key, value in rows.items():
        flat = pyarrow.array(_as_numbers(value.reshape(-1)))
        width = math.prod(value.shape[1:])
        columns[key] = pyarrow.FixedSizeListArray.from_arrays(flat, width) if value.ndim > 1 else flat
    return pyarrow.table(columns)


def data_frame(rows: StoredRows) -> Any:
    """`rows` as a `pandas.DataFrame`."""
    with needs("harvest"):
        import pandas
    parts = [pandas.DataFrame({name: _as_numbers(value) for name, value in _origin(rows).items()})]
    for key, value in rows.items():
        flat = _as_numbers(value.reshape(len(value), math.prod(value.shape[1:])))
        names: Any = [(key, number) for number in range(flat.shape[1])] if value.ndim > 1 else [key]
        parts.append(pandas.DataFrame(dict(zip(names, flat.T, strict=True))))
    return pandas.concat(parts, axis=1)


def _origin(rows: StoredRows) -> dict[str, Tensor]:
    found = {name: getattr(rows, name) for name in ("sample", "position", "token")}
    return {name: value for name, value in found.items() if value is not None}


def _as_numbers(value: Tensor) -> Any:
    few = value.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (value.float() if few else value).numpy()
