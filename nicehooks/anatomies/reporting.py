"""A table of every part of a model: where it is, what shape it has, how it was found, and which check it has passed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nicehooks.anatomies.layouts import SINGLE_LAYOUT
from nicehooks.anatomies.tables import PARTS, Lacks

if TYPE_CHECKING:
    from nicehooks.anatomies.body import Anatomy


class Row(NamedTuple):
    """What is known of one part.

    Attributes:
        part: its name; of the layers that have it at the same place.
        path: its path in the first of them, or why there is none.
        shape: the shape that it had in the check.
        found: by what: `"structure"`, or `"table"`.
        check: the check that it has passed; empty if it has passed none.
    """

    part: str
    path: str
    shape: str
    found: str
    check: str


class Report:
    """What is known of every part; shown as a table.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy
    >>> report = anatomy(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=100))).report()
    >>> print(report.rows[1].part, "|", report.rows[1].path, "|", report.rows[1].check)
    resid_pre[0…1] | transformer.h.0@input[0] | resid_pre + attn_out + mlp_out = resid_post

    Attributes:
        rows: one for each part, and each place that it has in some layers.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.title = repr(anatomy)
        self.rows = [*_singles(anatomy, "embed"), *_of_layers(anatomy), *_singles(anatomy, "final_norm", "logits")]

    def __str__(self) -> str:
        table = [("part", "path", "shape", "found by", "check"), *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            "  ".join([*(row[at].ljust(width) for at, width in enumerate(widths)), row[4]]).rstrip() for row in table
        ]
        return "\n".join([self.title, *lines])

    __repr__ = __str__


def _singles(anatomy: Anatomy, *parts: str) -> list[Row]:
    layout, rows = anatomy.layout, list[Row]()
    for part in parts:
        place = layout.singles.get(part)
        if isinstance(place, Lacks):
            rows.append(Row(part, f"none: {place.reason}", "", "", ""))
        elif anatomy.lacks(part) or (place is None and not _has(anatomy, part)):
            rows.append(Row(part, "none", "", "", ""))
        else:
            found = "structure" if layout.is_found else "table"
            rows.append(
                Row(
                    part,
                    str(getattr(anatomy, part)),
                    _short_reason(layout.shapes.get(part, "")),
                    found,
                    layout.passed.get(part, ""),
                )
            )
    return rows


def _has(anatomy: Anatomy, part: str) -> bool:
    try:
        return getattr(anatomy, part) is not None
    except Exception:  # a table may name what is not there
        return False


def _of_layers(anatomy: Anatomy) -> list[Row]:
    layout = anatomy.layout
    names = dict.fromkeys([*PARTS, *(part for places in layout.layers for part in places.parts)])
    return [row for part in names if part not in SINGLE_LAYOUT for row in _report_rows(anatomy, part)]


def _report_rows(anatomy: Anatomy, part: str) -> list[Row]:
    """A row for the layers that are alike in this part."""
    layout, groups = anatomy.layout, dict[tuple[str, str], list[int]]()
    for index, places in enumerate(layout.layers):
        place = places.path(part, layout.attention)
        if place is not None:
            where = f"none: {place.reason}" if isinstance(place, Lacks) else place.removeprefix(places.block)
            groups.setdefault((where, places.passed.get(part, "")), []).append(index)
    rows: list[Row] = []
    for (_, check), layers in groups.items():
        place = layout.layers[layers[0]].path(part, layout.attention)
        title = f"{part}[{_span(layers)}]"
        if isinstance(place, str):
            found = "structure" if layout.is_found else "table"
            rows.append(Row(title, place, _short_reason(layout.shapes.get(part, "")), found, check))
        elif isinstance(place, Lacks):
            rows.append(Row(title, f"none: {place.reason}", "", "", ""))
    return rows


def _span(layers: list[int]) -> str:
    """Layers as text: `0…3`, or `1, 5`."""
    whole = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}…{layers[-1]}" if whole else ", ".join(map(str, layers))


def _short_reason(shape: str) -> str:
    return shape.partition("]")[0].removeprefix("Tensor") + "]" if "]" in shape else shape
