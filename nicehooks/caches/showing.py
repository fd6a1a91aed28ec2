"""How a cache is shown, in a terminal or in a notebook: its sites, structures and size, never what is in a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nicehooks.caches.messages import sites_in
from nicehooks.caches.watching import Calls
from nicehooks.pictures.tables import table_html
from nicehooks.values import trees


def as_text(cache: Mapping[str, Any]) -> str:
    """A line for each site."""
    rows = _rows(cache)
    width = max((len(key) for key, _ in rows), default=0)
    return "\n".join([_title(cache), *(f"  {key:<{width}}  {text}" for key, text in rows)])


def as_html(cache: Mapping[str, Any]) -> str:
    """A table with a row for each site."""
    return table_html(_title(cache), ["site", "value"], _rows(cache))


def _title(cache: Mapping[str, Any]) -> str:
    return f"ActivationCache: {sites_in(cache)}, {show_bytes(size_of(dict.values(cache)))}"  # pyright: ignore


def _rows(cache: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), show_value(value)) for key, value in dict.items(cache)]  # pyright: ignore


def show_value(value: Any) -> str:
    """The structure of a value; calls that look alike are counted."""
    if type(value) is not Calls:
        return trees.structure_of(value)
    groups = [(kind, len(list(same))) for kind, same in itertools.groupby(map(trees.structure_of, value))]
    shown = [kind if count == 1 else f"{count} × {kind}" for kind, count in groups]
    if len(shown) > 3:
        shown = [shown[0], f"… {len(value) - groups[0][1] - groups[-1][1]} more …", shown[-1]]
    return f"Calls[{', '.join(shown)}]"


def size_of(values: Any) -> int:
    """The memory of all tensors in `values`, in bytes; a tensor that is there twice counts once."""
    leaves = [leaf for value in values for leaf in trees.leaves(value)]
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return sum(map(trees.bytes_of, tensors.values()))


def show_bytes(count: int) -> str:
    """A number of bytes for people."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
