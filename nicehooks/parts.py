"""Which parts of a captured value a path selects: the value's own path and the wanted one, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nicehooks.errors import PathError
from nicehooks.paths import EVERY_CALL, ModulePath
from nicehooks.trees import STAR


def parsed(key: str) -> ModulePath | None:
    """The path that `key` is; the keys of somebody else's file may be none."""
    try:
        return ModulePath.parse(str(key))
    except PathError:
        return None


def means_several(path: ModulePath) -> bool:
    """Whether `path` may select more than one site."""
    several_calls = EVERY_CALL in (path.call, path.port.call)
    return several_calls or path.is_wild or path.has_stars or any(one.name != path.name for one in path.alternatives())


def is_within(own: ModulePath, path: ModulePath) -> bool:
    """Whether the value at `own`, of a module that `path` matches, is what `path` selects, or has that in it."""
    ports = replace(own.port, call=None) == replace(path.port, call=None)
    calls = _is_call(own.call, path.call) and _is_call(own.port.call, path.port.call)
    steps = len(own.chain) <= len(path.chain) and all(map(_is_step, own.chain, path.chain))
    return ports and calls and steps


def _is_call(call: Any, wanted: Any) -> bool:
    return call == wanted or (wanted == EVERY_CALL and call is not None)


def _is_step(step: Any, wanted: Any) -> bool:
    if isinstance(step, tuple) and isinstance(wanted, tuple):
        return len(step) == len(wanted) and all(map(_is_step, step, wanted))
    return isinstance(step, int | str) if wanted is STAR else step == wanted
