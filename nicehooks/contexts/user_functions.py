"""The functions that users hand in, and how what they wrote is shown back to them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from nicehooks.core.selection import Group, Site, Where
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees
from nicehooks.values.sharded import PlainIsWhole


def takes_site(fn: Callable[..., Any]) -> bool:
    """Whether `fn` wants to be told the site."""
    code = getattr(fn, "__code__", None)
    if code is not None and torch.compiler.is_compiling():  # Dynamo knows no signature of what traced code defines
        return "site" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return "site" in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def call_user(fn: Callable[..., Any], with_site: bool, value: Any, key: str, site: Site) -> Any:
    """What `fn` returns for `value`, which stands at the path `key`; it is told the site if it wants to be.

    Where `value` is spread over processes, the plain tensors that `fn` brings are whole ones.
    """
    told = {"site": site if str(site) == key else site.at(ModulePath.parse(key))} if with_site else {}
    if not any([trees.is_distributed(leaf) for leaf in trees.leaves(value)]):
        return fn(value, **told)
    with PlainIsWhole():
        return fn(value, **told)


def show_where(where: Where) -> str:
    """A `where` as it was written, as far as there is room."""
    if isinstance(where, Group):
        return show_where(where.where)
    if isinstance(where, tuple | list):
        more = [f"… {len(where) - 3} more"] if len(where) > 4 else []
        return ", ".join([show_where(item) for item in (where[:3] if more else where)] + more)
    if isinstance(where, str | Site | ModulePath):
        return repr(str(where))
    if isinstance(where, bool | re.Pattern):
        return repr(where)
    return getattr(where, "__name__", None) or type(where).__name__
