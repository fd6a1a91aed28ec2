"""The sites at many paths at once, with one walk through the model for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from torch import nn

from nicehooks.core.census import Census
from nicehooks.core.selection import select
from nicehooks.core.sites import Site
from nicehooks.core.traces import has_port
from nicehooks.core.walking import ENCODERS
from nicehooks.errors import NiceHooksError
from nicehooks.paths.grammar import ModulePath
from nicehooks.torch_private import is_scripted


def sites_at(model: nn.Module, paths: Iterable[str]) -> list[Site]:
    """The sites of `model` at `paths`; a path that selects nothing is passed over.

    Args:
        model: any module.
        paths: any number of them.
    """
    names = dict(Census(model).unwrapped())
    is_plain = not any(isinstance(module, ENCODERS) or is_scripted(module) for module in names.values())
    found: list[Site] = []
    for path in paths:
        with suppress(NiceHooksError):
            one = ModulePath.parse(path)
            module = None if one.is_wild or not is_plain else names.get(one.plain_name)
            if module is None:
                found += select(model, path)
            elif has_port(module, one.port):
                found.append(Site(one.plain_name, module, one, model))
    return found
