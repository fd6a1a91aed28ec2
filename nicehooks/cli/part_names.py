"""The parts of the anatomy by the names that are written on the command line."""

from __future__ import annotations

from torch import nn

from nicehooks import select
from nicehooks.anatomies.anatomy import Anatomy, EncoderDecoder, anatomy
from nicehooks.anatomies.layouts import SINGLE_LAYOUT
from nicehooks.anatomies.parts import Part, Parts
from nicehooks.errors import NiceHooksError, UnsupportedModule


def anatomy_if_known(model: nn.Module) -> Anatomy | EncoderDecoder | None:
    """The anatomy of `model`; None where it is not known."""
    try:
        return anatomy(model)
    except UnsupportedModule:
        return None


def parts_called(model: nn.Module, name: str) -> list[Part]:
    """The part `name` of each layer, or the single part; none where that is no name of a part, but a path.

    Raises:
        UnsupportedModule: it is the name of a part that the model lacks, and nothing in the model is called so.
    """
    found = anatomy_if_known(model) if name.isidentifier() else None
    if found is None:
        return []
    try:
        parts = getattr(found, name, None)
    except UnsupportedModule:
        if _selects(model, name):
            return []
        raise
    return _as_list(parts)


def parts_by_name(model: nn.Module) -> dict[str, list[Part]]:
    """The parts of the anatomy by their names; none where the model is not known, or has two sides."""
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
    return _as_list(parts)


def _as_list(parts: object) -> list[Part]:
    """A part of every layer, or a single part; none where it is something else."""
    return list(parts) if isinstance(parts, Parts) else [parts] if isinstance(parts, Part) else []


def is_single(name: str) -> bool:
    """Whether the part `name` is one that a model has once."""
    return name in SINGLE_LAYOUT


def _selects(model: nn.Module, path: str) -> bool:
    try:
        return bool(select(model, path))
    except NiceHooksError:
        return False
