"""Which parts of a captured value a path selects: the value's own path and the wanted one, step by step."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from nicehooks.caches.regrouping import regrouped
from nicehooks.errors import PathError
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.ports import EVERY_CALL
from nicehooks.torch_private import evaluated_while_tracing
from nicehooks.values.trees import STAR, Chain


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


@evaluated_while_tracing
def wholes_of(text: str) -> tuple[tuple[str, Chain], ...]:
    """The paths of the values that may have the one at `text` in them, prefixes of it first, and the way from there."""
    return _wholes_of(text)


@lru_cache(maxsize=4096)
def _wholes_of(text: str) -> tuple[tuple[str, Chain], ...]:
    path = ModulePath.parse(text)
    if means_several(path):
        return ()
    steps = range(len(path.chain), -1, -1)
    ways = [(path.chain[:taken], path.chain[taken:]) for taken in steps]
    return tuple((str(replace(path, chain=whole)), rest) for whole, rest in (*ways, *regrouped(path.chain)))


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
