"""Which sites of a model a path, or whatever else may be written for one, selects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from nicehooks import torch_private
from nicehooks.core.explaining import explained
from nicehooks.core.register import kind_of
from nicehooks.core.sites import Site
from nicehooks.core.traces import NOTHING_LOOKED_AT, Trace, has_port, is_remembering, remember, remembered
from nicehooks.core.walking import Found, Walk
from nicehooks.paths.grammar import ModulePath

Where = Any
"""What selects sites: a path, a `Site`, a list of them, True, False, a regular expression or a predicate
`(name, module) -> bool` over module names, a module type, a module."""


class Group(NamedTuple):
    """The sites that one item of a `where` selects, whether it was a wildcard, and what selecting has looked at."""

    where: Where
    sites: list[Site]
    wild: bool
    trace: Trace = NOTHING_LOOKED_AT


def select(model: nn.Module, *where: Where) -> list[Site]:
    """The sites of `model` that `where` selects, in the order of the model's modules, each once.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> select(model, nn.Linear), select(model, "{0..1}[:, -1]")
    ([Site('0'), Site('2')], [Site('0[:, -1]'), Site('1[:, -1]')])

    Args:
        model: any module.
        where: paths, sites, True, False, regular expressions, predicates `(name, module) -> bool`, module types,
            modules, or lists of them.

    Raises:
        PathError: a path is not written in the path language.
        SiteNotFound: an item selects nothing; the message has the nearest names.
        UnsupportedModule: a selected module is TorchScript.
    """
    chosen: dict[Any, Site] = {}
    for group in select_groups(model, where or (True,)):
        for site in group.sites:
            chosen.setdefault(site.key, site)
    return list(chosen.values())


def select_groups(model: nn.Module, where: Where, verb: str = "select") -> list[Group]:
    """The sites of each item of `where`; two groups may have the same one.

    It is the very same list as the last time, as long as `where` selects the same in the model; nobody changes it. So
    what was made for a selection, and depends on nothing else in the model, is good for as long as its groups are the
    same ones. What cannot be remembered (see NOTE [Selections are remembered]) is a new list each time.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> before = select_groups(model, "0")
    >>> model.append(nn.ReLU())[0] = nn.Linear(2, 2)
    >>> select_groups(model, "1") is select_groups(model, "1"), select_groups(model, "0") is before
    (True, False)
    """
    items = list(flat(where))
    key = _key_of(model, items)
    kept = None if key is None else remembered(model, key)
    if kept is not None:
        return kept
    finder = _Finder(model, verb, Trace())
    groups = [Group(item, *finder.find(item), finder.trace) for item in items]
    if key is not None:
        remember(model, key, groups, finder.trace)
    return groups


def _key_of(model: nn.Module, items: list[Where]) -> Any:
    """What tells these items from others, if what they select can be remembered: paths, sites, True and False."""
    if not is_remembering():
        return None
    keys: list[Any] = []
    for item in items:
        if isinstance(item, Site) and not item.belongs_to(model):
            keys.append((Site, str(item)))
        elif isinstance(item, str | ModulePath | Site | bool):
            keys.append((type(item), item))
        else:
            return None
    return tuple(keys)


def flat(where: Where) -> Iterator[Where]:
    """The items of `where`, however they are nested."""
    if isinstance(where, str | ModulePath | Site | Group):
        yield where
    elif isinstance(where, Iterable) and not isinstance(where, str | nn.Module | type):
        for item in where:
            yield from flat(item)
    else:
        yield where


class _Finder:
    """Finds the sites of one item of a `where` after the other, and notes in its trace what it has looked at."""

    def __init__(self, model: nn.Module, verb: str, trace: Trace) -> None:
        self.model = model
        self.verb = verb
        self.trace = trace

    def find(self, item: Where) -> tuple[list[Site], bool]:
        """The sites of `item`, and whether it is a wildcard; a `Group` knows both."""
        if isinstance(item, Group):
            return item.sites, item.wild
        if isinstance(item, Site) and item.belongs_to(self.model):
            Walk(self.model, item.path.pattern, self.trace)  # notes whether that is still there
            return [item], False
        if isinstance(item, str | ModulePath | Site):
            path = item.path if isinstance(item, Site) else ModulePath.parse(item)
            return list(self._at_path(path)), path.is_wild
        return ([], True) if item is False else (self._chosen(item), True)

    def _at_path(self, path: ModulePath) -> Iterator[Site]:
        """The sites at `path`; each alternative in its braces has to have one."""
        walk = Walk(self.model, path.pattern, self.trace)
        for choice in path.pattern.choices():
            found = walk.named(choice)
            sites = self._sites(found, path)
            if not sites:
                named = [(name, module) for name, module, *_ in found]
                raise explained("nearest.nothing_matches", self.model, path.chosen(choice), named, self.verb)
            yield from sites

    def _chosen(self, item: Where) -> list[Site]:
        sites = self._sites(self._chosen_by(item), EVERYTHING)
        if not sites:
            raise explained("nearest.nothing_chosen", self.model, item)
        return sites

    def _chosen_by(self, item: Where) -> list[Found]:
        found = Walk(self.model, EVERYTHING.pattern, self.trace).named(())
        return found if item is True else [one for one in found if _chooses(item, one.name, one.module)]

    def _sites(self, named: list[Found], path: ModulePath) -> list[Site]:
        """A site per module, under the first of its names; a module without such a site is passed over."""
        return [
            Site(found.name, found.module, path.on(found.name), self.model, found.encoders)
            for found in _once(named)
            if self._has_site(found, path)
        ]

    def _has_site(self, found: Found, path: ModulePath) -> bool:
        name, module = found.name, found.module
        if torch_private.is_scripted(module):
            raise explained("nearest.scripted", name, module)
        if not path.is_wild and kind_of(path.port).needs_forward:
            explained("own_calls.refuse_own_call", name, module)
        answer = has_port(module, path.port)
        self.trace.asked(module, path.port, answer)
        return answer


def _once(named: Iterable[Found]) -> Iterator[Found]:
    seen: set[int] = set()
    for found in named:
        if id(found.module) not in seen:
            seen.add(id(found.module))
            yield found


EVERYTHING = ModulePath("**")


def _chooses(item: Where, name: str, module: nn.Module) -> bool:
    if isinstance(item, nn.Module):
        return module is item
    if isinstance(item, type):
        return isinstance(module, item)
    if isinstance(item, re.Pattern):
        return item.search(name) is not None
    if callable(item):
        return bool(item(name, module))
    raise explained("nearest.chooses_nothing", item)
