"""The tree of a model's sites, with the names that the field has for them, or a part of the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nicehooks import ModulePath, select
from nicehooks.anatomies.anatomy import Anatomy
from nicehooks.anatomies.parts import Part, Parts
from nicehooks.cli.part_names import anatomy_if_known, parts_called
from nicehooks.contexts.listing import SiteTable, sites
from nicehooks.errors import NiceHooksError


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
    parts = _parts_of(model)
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


def _parts_of(model: nn.Module) -> dict[str, list[Part]]:
    """The parts of the anatomy by their names; none where the model is not known."""
    found = anatomy_if_known(model)
    if not isinstance(found, Anatomy):
        return {}
    return {name: parts for name in dir(found) if (parts := _parts_named(found, name))}


def _parts_named(found: Anatomy, name: str) -> list[Part]:
    """A part of every layer, or a single part; none where the model lacks it, or where `name` is none."""
    try:
        parts = getattr(found, name)
    except NiceHooksError:
        return []
    return list(parts) if isinstance(parts, Parts) else [parts] if isinstance(parts, Part) else []


def _notes_on(parts: Mapping[str, list[Part]]) -> dict[str, str]:
    """What to say of each module: `= attn_out[3]` where its output is that part, `z[3] = @input[0]/9` where more is."""
    notes: dict[str, list[str]] = {}
    for part in [part for each in parts.values() for part in each]:
        path = ModulePath.parse(str(part))
        behind = str(part).removeprefix(path.name)
        notes.setdefault(path.name, []).append(f"{part.what} = {behind}" if behind else f"= {part.what}")
    return {name: "  ".join([SAYS, *sorted(said)]) for name, said in notes.items()}


SAYS = "·"
