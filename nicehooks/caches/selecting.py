"""Which keys of a cache something selects: paths, regular expressions, predicates, and lists of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.caches.containment import is_within, parsed
from nicehooks.caches.messages import NO_WHERE, not_captured, sites_in, text_of
from nicehooks.caches.spellings import NO_NAMES, Names, spellings_of
from nicehooks.caches.watching import Calls
from nicehooks.errors import PathError, SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees

Cache = dict[str, Any]


def keys_chosen(cache: Cache, where: Any, names: Names) -> list[str]:
    """The keys that `where` selects, those of parts too; `names` knows the other spellings of each."""
    if isinstance(where, Iterable) and not isinstance(where, str | ModulePath | nn.Module | type):
        return [key for item in where for key in keys_chosen(cache, item, names)]
    if isinstance(where, bool):
        return list(cache) if where else []
    text = text_of(where)
    if text is None:
        return _chosen_by(cache, where)
    return _keys_at(text, tuple(cache)) if torch.compiler.is_dynamo_compiling() else _at_path(cache, text, names)


def _chosen_by(cache: Cache, test: Any) -> list[str]:
    if isinstance(test, re.Pattern):
        found = [key for key in cache if test.search(key)]
    elif callable(test) and not isinstance(test, type | nn.Module):
        found = [key for key in cache if test(key)]
    else:
        shown = f"this {type(test).__name__}" if isinstance(test, nn.Module) else getattr(test, "__name__", test)
        raise PathError(NO_WHERE.format(shown=shown))
    if not found:
        shown = getattr(test, "pattern", None) or getattr(test, "__name__", test)
        raise SiteNotFound(f"{shown!r} selects nothing in this cache of {sites_in(cache)}.")
    return found


def _at_path(cache: Cache, text: str, names: Names) -> list[str]:
    """The keys that a path selects; each alternative in its braces has to select something."""
    wanted = ModulePath.parse(text)
    options = [(option, key) for key in cache for option in _alternatives_at(key, wanted)]
    found = [(option, part) for option, key in options for part in _inside(cache, key, option, names)]
    reached, keys = {option.name for option, _ in found}, [part for _, part in found]
    for option in wanted.alternatives():
        if option.name not in reached:
            if option not in cache:  # under another name of the module
                raise SiteNotFound(not_captured(cache, option, may_be_several=True))
            keys.append(str(option))
    return keys


def _alternatives_at(key: str, path: ModulePath) -> list[ModulePath]:
    """The alternatives of `path` that match the module of the value at `key`."""
    own = parsed(key)
    return [] if own is None else path.alternatives_of(own.plain_name)


def _inside(cache: Cache, key: str, path: ModulePath, names: Names) -> list[str]:
    """The keys of what `path` selects in the value at `key`: what it would select there in a model."""
    own = _as_wanted(key, path, names)
    if own is None:
        return []
    value, rest = dict.__getitem__(cache, key), path.chain[len(own.chain) :]
    whole = value[0] if type(value) is Calls and value else value
    return [str(replace(own, chain=(*own.chain, *more))) for more in trees.each_index(whole, rest)]


def _as_wanted(key: str, path: ModulePath, names: Names) -> ModulePath | None:
    """The spelling of `key` in which what `path` selects is in its value, if there is one."""
    own = parsed(key)
    if own is None or not path.matches(own.plain_name):
        return None
    if is_within(own, path):
        return own
    spellings = spellings_of(own, names) if path.port.is_of_arguments else ()
    return next((other for other in spellings if path.matches(other.plain_name) and is_within(other, path)), None)


@torch_private.evaluated_while_tracing
def _keys_at(text: str, keys: tuple[str, ...]) -> list[str]:
    """`_at_path`, for a cache with `keys` whose values only traced code knows: a `*` in a subscript finds nothing."""
    return _at_path(dict.fromkeys(keys), text, NO_NAMES)
