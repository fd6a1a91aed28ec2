"""What a cache says of a path that it cannot answer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nicehooks.caches.containment import means_several, parsed
from nicehooks.core.selection import Site
from nicehooks.paths.grammar import ModulePath

STALE = (
    "{key!r} was overwritten in place after it was captured (an in-place layer such as ReLU(inplace=True), or x += y), "
    "so this value is no longer what the site produced.\n"
    '    capture(model, "{key}", clone=True)  # keeps a copy of its own\n'
    "  run_with_cache, get_caching_hooks and add_caching_hooks take clone=True, too. For run(…), capture around it."
)

OUTLIVED = (
    "{key!r} was captured inside a torch.func transform (vmap, grad, …) that is over, and its value was good in there "
    "only.\n"
    '    output, acts = captured(model, "{key}")(x)  # inside the transform: return acts from the function\n'
    '    with capture(model, "{key}") as acts: ...   # around the transform: acts gets the full batch'
)

SEVERAL = (
    "{key!r} may mean several sites, and has no single value in this cache of {sites}.\n"
    '    acts.select("{key}")  # a cache of them all'
)

TOGETHER = (
    "{key!r} is one call, but this cache of {sites} holds all calls of that site together.\n"
    '    acts.calls("{whole}")[{call}]  # in the order in which they were made, over all steps'
)

APART = (
    "{key!r} is not in this cache of {sites}, which holds calls of that site each by itself.\n"
    '    acts.calls("{key}")  # a list of them'
)

NO_WHERE = (
    "{shown} selects nothing in a cache, which knows paths and no modules: write a path, a Site, True, "
    "a regular expression or a predicate over the keys, or a list of them"
)

NOTHING_IN_COMMON = "these caches have no site in common: {mine}, and {theirs}."


def not_captured(cache: Mapping[str, Any], key: Any, may_be_several: bool = False) -> str:
    """Says that `key`, which `may_be_several` sites, is not in a cache, and what is."""
    shown, sites, keys = text_of(key), sites_in(cache), [str(one) for one in cache]
    about_calls = None if shown is None else _about_calls(cache, parsed(shown))
    if about_calls is not None:
        return about_calls
    if shown is not None and not may_be_several and _means_several(shown):
        return SEVERAL.format(key=shown, sites=sites)
    near = difflib.get_close_matches(str(key), keys, n=3, cutoff=0.3) or keys[:3]
    have = f"nearest: {', '.join(near)}" if near else "it is empty"
    return f"{key if shown is None else shown!r} is not in this cache of {sites} ({have})."


def _means_several(text: str) -> bool:
    path = parsed(text)
    return path is not None and means_several(path)


def _about_calls(cache: Mapping[str, Any], path: ModulePath | None) -> str | None:
    """What to write where the calls of a site were captured together, and one is asked for, or the other way round."""
    if path is None or means_several(path):
        return None
    if isinstance(path.call, int):
        whole = str(replace(path, call=None))
        have = whole in cache
        return TOGETHER.format(key=str(path), whole=whole, call=path.call, sites=sites_in(cache)) if have else None
    each = any(str(replace(own, call=None)) == str(path) for own in map(parsed, cache) if own is not None)
    return APART.format(key=str(path), sites=sites_in(cache)) if each else None


def nothing_in_common(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Says that two caches share no key, and what they have."""
    return NOTHING_IN_COMMON.format(mine=_first_keys(mine), theirs=_first_keys(theirs))


def _first_keys(cache: Mapping[str, Any]) -> str:
    keys = [repr(str(key)) for key in cache]
    return ", ".join(keys if len(keys) < 4 else [*keys[:3], f"… {len(keys) - 3} more"]) or "an empty one"


def sites_in(cache: Mapping[str, Any]) -> str:
    """How many sites a cache has, in words."""
    return "1 site" if len(cache) == 1 else f"{len(cache)} sites"


def text_of(key: Any) -> str | None:
    """`key` as text; None where it is no path."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, ModulePath | Site) else None
