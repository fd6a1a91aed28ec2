"""The tree of a model's sites, with the names that the field has for them, or a part of the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nicehooks import ModulePath, select
from nicehooks.anatomies.parts import Part
from nicehooks.cli.part_names import parts_by_name, parts_called
from nicehooks.contexts.listing import SiteTable, sites


def named_sites(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> SiteTable:
    """The sites of `model`, each with the parts of the anatomy that are there.

    Args:
        model: a language model, or any other, which then has no such names.
        paths: which modules: paths, or names of parts such as `z` and `resid_post`; all where there are none.
        inputs: what the model runs on, to find the shapes.

    Raises:
        SiteNotFound: a path selects nothing.
        UnsupportedModule: a path is the name of a part that the model lacks.
    """
    parts = parts_by_name(model)
    table = sites(model, **inputs)
    wanted = {where for path in paths for where in _modules(model, parts, path)}
    records = [record for record in table if not paths or record.path in wanted]
    return SiteTable(records, table.kind, _notes_on(parts))


def _modules(model: nn.Module, parts: Mapping[str, list[Part]], path: str) -> list[str]:
    """The names of the modules that have the sites of `path`."""
    named = parts.get(path) or parts_called(model, path)
    if named:
        return [part.name for part in named]
    return [site.path.name for site in select(model, path)]


def _notes_on(parts: Mapping[str, list[Part]]) -> dict[str, str]:
    """What to say of each module: `= attn_out[3]` where its output is that part, `z[3] = @input[0]/9` where more is."""
    notes: dict[str, list[str]] = {}
    for part in [part for each in parts.values() for part in each]:
        path = ModulePath.parse(str(part))
        behind = str(part).removeprefix(path.name)
        notes.setdefault(path.name, []).append(f"{part.what} = {behind}" if behind else f"= {part.what}")
    return {name: "  ".join([SAYS, *sorted(said)]) for name, said in notes.items()}


SAYS = "·"
