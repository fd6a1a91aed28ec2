"""Hooks by name: the hook points of a model, and the hooks on them, listed, added and removed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from nicehooks.compat.transformer_lens.caching_hooks import CachingHook, Matched, NamesFilter, chooser
from nicehooks.compat.transformer_lens.hook_point import (
    Directions,
    HookMethods,
    adds_itself,
    checked,
    checked_direction,
    directions,
)
from nicehooks.compat.transformer_lens.hooks import (
    Direction,
    Hook,
    HookFunction,
    Item,
    LensHandle,
    LensHooks,
    add,
    level_of,
    remove_all,
)
from nicehooks.errors import SiteNotFound

Name = str | Callable[[str], bool]
"""Which hook points: the name of one, or a predicate over names."""

HookList = Iterable[tuple[Name, HookFunction]]


class HookIntrospectionMixin:
    """What a model with hook points can say of them. It works from two dicts, which whoever has it provides.

    Attributes:
        hook_dict: the hook points by name.
        mod_dict: the modules by name.
    """

    hook_dict: dict[str, Any]
    mod_dict: dict[str, nn.Module]

    def _hooked_model(self) -> Any:
        """The model."""
        return self

    def _cached_by_default(self) -> list[str]:
        """The names that `names_filter=None` means."""
        return list(self.hook_dict)

    def _every_name(self) -> list[str]:
        """The names of all hook points that there may be hooks on."""
        return list(self.hook_dict)

    def _names_of(self, name: Any) -> list[str]:
        """The names of the hook points that one name, or a predicate, stands for."""
        return self._matching(name) if callable(name) else [name]

    # what there is

    def hook_points(self) -> Iterable[Any]:
        """The hook points."""
        return self.hook_dict.values()

    @property
    def context_level(self) -> int:
        """How many contexts of hooks are open here, in each other."""
        return level_of(self._hooked_model())

    @context_level.setter
    def context_level(self, value: int) -> None:
        """Changes nothing: it is counted, but models that were written for an attribute assign to it."""

    @property
    def is_caching(self) -> bool:
        """Whether a caching hook acts here and now."""
        handles = [handle for point in self.list_hooks().values() for handle in point]
        return any(isinstance(handle.user_hook, CachingHook) for handle in handles)

    @is_caching.setter
    def is_caching(self, value: bool) -> None:
        """Changes nothing: it is looked up, but models that were written for an attribute assign to it."""

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """The hooks that act here and now, in the order in which they act, by the name of their hook point.

        Hook points without hooks are left out.

        Args:
            name_filter: the hook points: a name, names, or a predicate; all by default.
            dir: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: whether to list permanent ones.

        Raises:
            SiteNotFound: there is no hook point of such a name.
        """
        names = self._every_name() if name_filter is None else self._names(name_filter)
        listed = {str(name): _handles(self._point(name), dir, including_permanent) for name in names}
        return {name: handles for name, handles in listed.items() if handles}

    # names

    def _has_points(self) -> None:
        if not self.hook_dict:
            raise SiteNotFound(NO_POINTS.format(model=type(self._hooked_model()).__name__))

    def _point(self, name: Any) -> HookMethods:
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is no name of a hook point, and no predicate over names")
        self._has_points()
        point = self.hook_dict.get(name)
        if point is None:
            raise SiteNotFound(self._no_point(name))
        return point

    def _no_point(self, name: str) -> str:
        model = type(self._hooked_model()).__name__
        text = f"no hook point {name!r} in {model}."
        modules = getattr(self, "mod_dict", {})
        if name in modules:
            text = f"{name!r} in {model} is no hook point, but a {type(modules[name]).__name__}."
            text += " hooked(model) has every module as one."
        nearest = difflib.get_close_matches(name, list(self.hook_dict), n=3, cutoff=0.0)
        return f"{text}\n  nearest names: {', '.join(nearest)}"

    def _names(self, names_filter: NamesFilter) -> list[str]:
        """The names that a filter chooses, at least one; those of a predicate know that they are of one wildcard."""
        self._has_points()
        if names_filter is None:
            return one_wildcard(self._cached_by_default(), "names_filter=None")
        chosen = chooser(names_filter)
        if not callable(chosen):
            names = [one for name in chosen for one in self._names_of(name)]
            for name in names:
                self._point(name)
            if not names:
                raise SiteNotFound("names_filter is an empty list: it has to name a hook point.")
            return list(dict.fromkeys(names))
        return self._matching(chosen)

    def _matching(self, predicate: Callable[[str], Any]) -> list[str]:
        self._has_points()
        names = [name for name in self.hook_dict if predicate(name)]
        shown = getattr(predicate, "__name__", None) or type(predicate).__name__
        if not names:
            model = type(self._hooked_model()).__name__
            have = ", ".join(map(repr, list(self.hook_dict)[:3]))
            raise SiteNotFound(f"{shown} matches no hook point of {model}.\n  hook points: {have}, …")
        return one_wildcard(names, shown)

    def _items(self, hooks: HookList, dir: Direction) -> list[Item]:
        """Each `(name, function)` as an `Item`, with its hook points."""
        items: list[Item] = []
        groups: list[object] = []
        for name, hook in _pairs(hooks, dir):
            for one in self._names_of(name):
                group = getattr(one, "group", None)
                if group is not None and groups and groups[-1] is group and items[-1].hook is hook:
                    items[-1] = items[-1]._replace(points=[*items[-1].points, self._point(one)])
                    continue
                groups.append(group)
                shown = repr(one) if group is None else one.shown  # type: ignore[attr-defined]
                items.append(Item(shown, [self._point(one)], hook, dir, group is not None))
        return items


class NamedPoints(HookIntrospectionMixin):
    """What a model with hook points can do without running: list hooks, add and remove them by name."""

    def add_hook(
        self,
        name: Name,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook, in every thread, until it is removed.

        Args:
            name: the name of a hook point, or a predicate over names.
            hook: `fn(value, hook=point)`; see `HookPoint.add_hook`, also for the other arguments.
            dir: `"fwd"` or `"bwd"`.
            is_permanent: whether only `including_permanent=True` removes it.
            level: the `context_level` that it belongs to.
            prepend: whether it acts before all that is there, not after.

        Raises:
            SiteNotFound: there is no such hook point; the message has the nearest names.
        """
        items = self._items([(name, hook)], checked_direction(dir))
        names = self._names_of(name)
        points = [self._point(one) for one in names]
        if type(self).check_and_add_hook is not NamedPoints.check_and_add_hook or any(map(adds_itself, points)):
            for one, point in zip(names, points, strict=True):
                self.check_and_add_hook(
                    point, str(one), checked(hook), dir=dir, is_permanent=is_permanent, level=level, prepend=prepend
                )
            return
        for one, point in zip(names, points, strict=True):
            self.check_hooks_to_add(point, str(one), hook, dir, is_permanent, prepend)
        add(LensHooks(self._hooked_model(), items, level=level, is_permanent=is_permanent, first=prepend))

    def check_and_add_hook(
        self,
        hook_point: Any,
        hook_point_name: str,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook to one hook point, after `check_hooks_to_add`."""
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir, is_permanent, prepend)
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def check_hooks_to_add(
        self,
        hook_point: Any,
        hook_point_name: str,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Called before a hook is added; a subclass may raise here. Does nothing by itself."""

    def add_perma_hook(self, name: Name, hook: HookFunction, dir: Direction = "fwd") -> None:
        """Adds a hook that only `including_permanent=True` removes."""
        self.add_hook(name, hook, dir=dir, is_permanent=True)

    def remove_all_hook_fns(
        self, direction: Directions = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Removes the hooks that act here and now, from every hook point.

        Args:
            direction: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: whether to remove permanent ones, too.
            level: removes those of this level alone.
        """
        hooks: list[Hook] = []
        for point in self.hook_points():
            hooks += point.chosen_hooks(direction, including_permanent, level)
        remove_all(hooks)

    def clear_contexts(self) -> None:
        """Empties the `ctx` of every hook point."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Directions = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes the hooks that act here and now, as `remove_all_hook_fns` does; empties each `ctx` as well."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)


NO_POINTS = "{model} has no hook points. It has to call self.setup() at the end of its __init__, after defining them."


def _handles(point: Any, dir: Directions, including_permanent: bool) -> list[LensHandle]:
    every = [handle for one in directions(dir) for handle in (point.fwd_hooks if one == "fwd" else point.bwd_hooks)]
    return [handle for handle in every if including_permanent or not handle.is_permanent]


def one_wildcard(names: list[str], shown: str) -> list[str]:
    """`names` that know that they are of one wildcard, which messages show so."""
    group = object()
    return [Matched(name, group, shown) for name in names]


def _pairs(hooks: Any, dir: Direction) -> Iterator[tuple[Any, HookFunction]]:
    if isinstance(hooks, str | dict) or callable(hooks) or not isinstance(hooks, Iterable):
        raise TypeError(PAIRS.format(dir=dir, what=type(hooks).__name__))
    for pair in hooks:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(PAIRS.format(dir=dir, what=f"list of {type(pair).__name__}s"))
        yield pair[0], checked(pair[1])


PAIRS = "{dir}_hooks is a list of pairs (name, function), not a {what}"
