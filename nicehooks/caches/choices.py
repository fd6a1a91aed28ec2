"""Which keys of a cache something selects: paths, regular expressions, predicates, and lists of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.caches.containment import is_within, means_several, parsed
from nicehooks.caches.watching import Calls
from nicehooks.core.selection import Site
from nicehooks.errors import PathError, SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.ports import OUTPUT
from nicehooks.values import trees

Cache = dict[str, Any]


def keys_chosen(cache: Cache, where: Any) -> list[str]:
    """The keys that `where` selects, those of parts too."""
    if isinstance(where, Iterable) and not isinstance(where, str | nn.Module | type):
        return [key for item in where for key in keys_chosen(cache, item)]
    if isinstance(where, bool):
        return list(cache) if where else []
    text = text_of(where)
    if text is None:
        return _chosen_by(cache, where)
    return _keys_at(text, tuple(cache)) if torch.compiler.is_dynamo_compiling() else _at_path(cache, text)


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


def _at_path(cache: Cache, text: str) -> list[str]:
    """The keys that a path selects; each alternative in its braces has to select something."""
    options = list(ModulePath.parse(text).alternatives())
    found = [(option, part) for key in cache for option in options for part in _parts(cache, key, option)]
    parts = [part for _, part in found]
    for option in options:
        if all(option is not other for other, _ in found):
            if option not in cache:  # under another name of the module
                raise SiteNotFound(not_captured(cache, option))
            parts.append(str(option))
    return parts


def _parts(cache: Cache, key: str, path: ModulePath) -> list[str]:
    """The keys of what `path` selects in the value at `key`."""
    own = parsed(key)
    if own is None or not path.matches(own.plain_name):
        return []
    if path.call is None and path.port == OUTPUT and not path.chain:
        return [key]
    if not is_within(own, path):
        return []
    value, rest = dict.__getitem__(cache, key), path.chain[len(own.chain) :]
    whole = value[0] if type(value) is Calls and value else value
    return [str(replace(own, chain=(*own.chain, *more))) if more else key for more in trees.each_index(whole, rest)]


@torch_private.evaluated_while_tracing
def _keys_at(text: str, keys: tuple[str, ...]) -> list[str]:
    """`_at_path`, for a cache with `keys` whose values only traced code knows: a `*` in a subscript finds nothing."""
    return _at_path(dict.fromkeys(keys), text)


def text_of(key: Any) -> str | None:
    """`key` as text; None where it is no path."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, ModulePath | Site) else None


# --- messages ---------------------------------------------------------------------------------------------------------

SEVERAL = (
    "{key!r} may mean several sites, and has no single value in this cache of {sites}.\n"
    '    acts.select("{key}")  # a cache of them all'
)

NO_WHERE = (
    "{shown} selects nothing in a cache, which knows paths and no modules: write a path, a Site, True, "
    "a regular expression or a predicate over the keys, or a list of them"
)


def not_captured(cache: Cache, key: Any) -> str:
    """Says that `key` is not in a cache, and what is."""
    shown, sites, keys = text_of(key), sites_in(cache), [str(one) for one in cache]
    if shown is not None and means_several(ModulePath.parse(shown)):
        return SEVERAL.format(key=shown, sites=sites)
    near = difflib.get_close_matches(str(key), keys, n=3, cutoff=0.3) or keys[:3]
    have = f"nearest: {', '.join(near)}" if near else "it is empty"
    return f"{key if shown is None else shown!r} is not in this cache of {sites} ({have})."


def sites_in(cache: Cache) -> str:
    """How many sites a cache has, in words."""
    return "1 site" if len(cache) == 1 else f"{len(cache)} sites"
