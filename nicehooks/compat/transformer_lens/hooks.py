"""Hooks: functions `fn(value, hook=point)` at the places of a model, entered and left as one intervention.

NOTE [Who holds an attached hook]
`point.add_hook(fn)` returns the hook, so nobody holds the intervention that it attaches. It lies in the model itself,
in the entry `HANDLES` of its `__dict__`: there it neither keeps the model alive nor comes along into a copy. What is
bound to the taps knows it by a weak reference only, and so does the hook.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from nicehooks import torch_private_tensors
from nicehooks.contexts.intervention import Intervention
from nicehooks.core.binding import unbind
from nicehooks.core.census import Census
from nicehooks.core.children import unwrap
from nicehooks.core.copies import HANDLES
from nicehooks.core.exclusive import Exclusive
from nicehooks.core.frames import Rule
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Group, Site
from nicehooks.core.sessions import Session, is_acting
from nicehooks.core.tap import tap_of
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees
from nicehooks.values.shared_memory import as_written, last_written
from nicehooks.values.trees import Chain, show_step

Direction = Literal["fwd", "bwd"]
HookFunction = Callable[..., Any]


class Point(Protocol):
    """A place where hooks can be: a `HookPoint`, or what `hooked(model).hook_dict` has in it."""

    name: str | None
    ctx: dict[str, Any]

    def site_in(self, model: nn.Module, census: Census, dir: Direction) -> Site:
        """The site of this place in `model`."""
        ...

    def way_in(self, value: Any) -> Chain:
        """The steps from `value` to the part of it that hooks are given."""
        ...

    def part(self, subscripts: str) -> Any:
        """What a hook is told for a part of the value, or for the whole of it; None where it is given neither."""
        ...

    def called(self, name: str) -> Any:
        """The same place under another name."""
        ...


class Item(NamedTuple):
    """One function, and the places that it was given for.

    Attributes:
        shown: the names as they were given, for messages.
        points: the places.
        hook: the function.
        dir: whether it is given the values or their gradients.
        wild: whether a predicate has chosen the places: then some of them may never be reached.
    """

    shown: str
    points: Sequence[Point]
    hook: HookFunction
    dir: Direction
    wild: bool


class Hook(Action):
    """An edit by one function at one place. What it returns is assigned to the value there; None leaves it.

    Attributes:
        hook: the function.
        dir: whether it is given the values or their gradients.
        is_permanent: whether only `including_permanent=True` removes it.
        level: the level of the context that it belongs to, or None.
        removed: whether it was removed; a gradient may still come by.
        again: whether the same function acts at this site under another name, which is asked whether it was reached.
        outlives: whether it acts on gradients after its context was left: in the backward of what a run computed.
    """

    __slots__ = (
        "again",
        "aliases",
        "changes",
        "dir",
        "hook",
        "is_permanent",
        "level",
        "may_write",
        "outlives",
        "point",
        "removed",
        "scope",
    )

    verb = "hook"
    for_part = "edit"

    def __init__(self, item: Item, point: Point | None, scope: LensHooks, again: bool = False) -> None:
        self.hook = item.hook
        self.dir: Direction = item.dir
        self.changes = self.may_write = not getattr(item.hook, "only_looks", False)
        self.point = point
        self.is_permanent = scope.is_permanent
        self.level = scope.level
        self.aliases = scope.aliases
        self.removed = False
        self.again = again
        self.outlives = scope.outlives
        self.scope = weakref.ref(scope)

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        if self.removed and self.dir == "bwd":  # of a forward that ran before; else, this call had begun
            return value
        way: Chain = self._place(site).way_in(value) if self.dir == "fwd" else ()
        act = partial(self._act_on_part, session, key=key, site=site)
        return trees.rewrite(value, way, act, self.may_write)

    def _act_on_part(self, session: Session, value: Any, key: str, site: Site) -> Any:
        before = last_written(value)
        new = self.changed(value, key, site)
        if new is None or new is value:
            return as_written(value, before) if self.changes else value
        return trees.assign(value, new) if self.changes else value

    def _place(self, site: Site) -> Any:
        return self.point if self.point is not None else site.module

    def changed(self, value: Any, key: str, site: Site) -> Any:
        point = self._place(site)
        if self.dir == "bwd":
            more = ModulePath.parse(key).chain[len(site.path.chain) :]  # to one of several tensors at the place
            point = point.part("".join(map(show_step, more)))
        if point is None:
            return None
        new: Any = None
        for alias in self.aliases:
            result = _call(self.hook, value, point.called(alias) if alias else point)
            if self.dir == "bwd" and isinstance(result, tuple) and len(result) == 1:
                result = result[0]
            if result is not None:
                new = value = trees.assign(value, result)
        return new

    def remove(self) -> None:
        """Removes the hook; once removed, does nothing."""
        scope = self.scope()
        if scope is not None and not self.removed:
            scope.drop(self)


_in_a_hook: ContextVar[bool] = ContextVar("nicehooks.hook_is_running", default=False)
"""Whether a hook is running here: what it removes may have its turn in this very call still."""


def _call(hook: HookFunction, value: Any, point: Any) -> Any:
    if torch.compiler.is_compiling():  # which cannot trace a ContextVar
        return hook(value, hook=point)
    token = _in_a_hook.set(True)
    try:
        return hook(value, hook=point)
    finally:
        _in_a_hook.reset(token)


class LensHandle(NamedTuple):
    """A hook as `point.fwd_hooks` and `model.list_hooks()` list it: `handle.hook.remove()` removes it.

    Attributes:
        hook: what is removed.
        is_permanent: whether only `including_permanent=True` removes it.
        context_level: the level of the context that it belongs to, or None.
        user_hook: the function.
        dir: `"fwd"` or `"bwd"`.
    """

    hook: Hook
    is_permanent: bool
    context_level: int | None
    user_hook: HookFunction | None = None
    dir: Direction = "fwd"


class HookRecord(NamedTuple):
    """One hook, as `list_hooks` showed it before it gave handles.

    Attributes:
        name: the name of its hook point.
        dir: `"fwd"` or `"bwd"`.
        hook: the function.
        is_permanent: whether only `including_permanent=True` removes it.
        level: the level of the context that it belongs to, or None.
    """

    name: str
    dir: Direction
    hook: HookFunction
    is_permanent: bool
    level: int | None


def handle_of(hook: Hook) -> LensHandle:
    """How `hook` is listed."""
    return LensHandle(hook, hook.is_permanent, hook.level, hook.hook, hook.dir)


class LensHooks(Intervention):
    """Some hooks of a model as one intervention.

    Args:
        model: the model that the places belong to; for hooks that were added to a `HookPoint` itself, that.
        items: what to do where.
        level: see `Hook`.
        is_permanent: see `Hook`.
        first: whether the hooks act before what is there already.
        aliases: the names under which each hook is called, one after the other.
        needs_backward: whether gradient hooks are there for a backward pass that has to come by.
        outlives: whether gradient hooks act in the backward of what was computed here, whenever that runs. They are
            held by the graph then, and by nothing else.
    """

    verb = "add_hook"

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[Item],
        *,
        level: int | None = None,
        is_permanent: bool = False,
        first: bool = False,
        aliases: Iterable[str] = (),
        needs_backward: bool = True,
        outlives: bool = False,
    ) -> None:
        super().__init__(model)
        self.items = items
        self.level = level
        self.is_permanent = is_permanent
        self.first = first
        self.aliases: tuple[str, ...] = tuple(aliases) or ("",)
        self.needs_backward = needs_backward
        self.outlives = outlives
        self._hooks: list[Hook] = []

    def __repr__(self) -> str:
        names = list(dict.fromkeys(item.shown for item in self.items))
        more = [f"… {len(names) - 3} more"] if len(names) > 4 else []
        return f"{self.verb}({', '.join((names[:3] if more else names) + more)})"

    def _actions(self) -> list[tuple[Any, Action]]:
        census = Census(self.model)
        return [pair for item in self.items for pair in self._actions_of(item, census)]

    def _actions_of(self, item: Item, census: Census) -> list[tuple[Any, Action]]:
        """One action for all places of an item; of the places that are one site under several names, one for each."""
        rounds: list[dict[Any, tuple[Site, Point]]] = [{}]
        for point in item.points:
            site = point.site_in(self.model, census, item.dir)
            free = next((found for found in rounds if site.key not in found), None)
            if free is None:
                rounds.append(free := {})
            free[site.key] = site, point
        return [
            (Group(item.shown, [site for site, _ in found.values()], item.wild), _Items(item, found, again=number > 0))
            for number, found in enumerate(rounds)
        ]

    def _rules(self, site: Site, action: Any) -> Pairs:
        _, point = action.places[site.key]
        owned = point is site.module and not self.outlives  # a rule may not keep a module alive; a graph has to
        hook = Hook(action.item, None if owned else point, self, action.again)
        self._hooks.append(hook)
        return super()._rules(site, hook)

    def _was_reached(self, session: Session, rule: SiteRule) -> bool:
        hook: Any = rule.action
        excused = (
            hook.again
            or _in_a_hook.get()
            or (hook.removed and not session.attached)
            or (hook.dir == "bwd" and not self.needs_backward)
        )
        return excused or super()._was_reached(session, rule)

    def attach(self) -> Any:
        super().attach()
        with Exclusive():
            handles = vars(unwrap(self.model)).setdefault(HANDLES, [])
            if self.active and self not in handles:
                handles.append(self)
        return self

    def _stop(self, broken_off: bool = False) -> None:
        """See NOTE [Who holds an attached hook]."""
        entries = vars(unwrap(self.model))
        with Exclusive():
            handles = [handle for handle in entries.pop(HANDLES, ()) if handle is not self]
            if handles:
                entries[HANDLES] = handles
        super()._stop(broken_off)

    def drop(self, hook: Hook) -> None:
        """Removes one hook; with the last one, the intervention is over."""
        hook.removed = True
        if all([hook.removed for hook in self._hooks]):
            self.remove()
        elif self._plan is not None:
            unbind([bound for bound in self._plan.taps if getattr(bound[1], "action", None) is hook])


class _Items(Action):
    """What `LensHooks` has to do at some sites, before each of them has a `Hook` of its own."""

    __slots__ = ("again", "item", "places")

    def __init__(self, item: Item, places: dict[Any, tuple[Site, Point]], again: bool) -> None:
        self.item = item
        self.places = places
        self.again = again


def hooks_on(module: nn.Module, key: str, dir: Direction) -> list[Hook]:
    """The hooks that act here and now on the port `key` of `module`, in the order in which they act."""
    tap = tap_of(module)
    rules: list[Rule] = [] if tap is None else [rule for rule in tap.rules if is_acting(rule.session)]
    mine = [rule.action for rule in rules if isinstance(rule, SiteRule) and rule.site.key[1] == key]
    return [hook for hook in mine if isinstance(hook, Hook) and hook.dir == dir]


def remove_all(hooks: Iterable[Hook]) -> None:
    """Removes each of `hooks`, also if the warning that one of them never acted is an error."""
    with ExitStack() as stack:
        for hook in reversed(list(hooks)):
            stack.callback(hook.remove)


# --- contexts, and their levels ---------------------------------------------------------------------------------------

_open: ContextVar[tuple[weakref.ref[Scope], ...]] = ContextVar("nicehooks.open_scopes", default=())


class Scope:
    """A context of hooks on a model, and its level: how many such contexts are open here, with itself.

    Args:
        model: the model.
        items: what to do where.
        keep: whether the hooks stay when the context ends without an error.
        needs_backward: see `LensHooks`.
        outlives: see `LensHooks`.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[Item],
        keep: bool = False,
        needs_backward: bool = True,
        outlives: bool = False,
    ) -> None:
        self.model = model
        self.items = items
        self.keep = keep
        self.needs_backward = needs_backward
        self.outlives = outlives
        self.own: list[LensHooks] = []
        self.kept: list[LensHooks] = []
        self.entering = True  # until the hooks that belong to the context itself are there

    def __enter__(self) -> Scope:
        return torch_private_tensors.in_eager(self._enter)

    def _enter(self) -> Scope:
        self.level = level_of(self.model) + 1
        if self.items:
            hooks = LensHooks(self.model, self.items, level=self.level)
            hooks.verb = "hooks"
            self.begin(hooks)
        _open.set((*_open.get(), weakref.ref(self)))
        return self

    def begin(self, hooks: LensHooks) -> None:
        """Lets `hooks` act for as long as this context; what belongs to it itself may stay."""
        stays = self.keep and self.entering
        if self.entering:
            hooks.needs_backward, hooks.outlives = self.needs_backward, self.outlives
        if stays:
            hooks.attach()
            self.kept.append(hooks)
        else:
            hooks.__enter__()
        self.own.append(hooks)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        torch_private_tensors.in_eager(self._exit, kind, error, trace)

    def _exit(self, kind: Any, error: Any, trace: Any) -> None:
        _open.set(tuple([ref for ref in _open.get() if ref() not in (self, None)]))
        with ExitStack() as stack:
            for hooks in self.own:
                if kind is not None or hooks not in self.kept:
                    stack.callback(hooks.__exit__, kind, error, trace)


def _open_scopes() -> list[Scope]:
    """The contexts of hooks that are open here."""
    return [scope for ref in _open.get() if (scope := ref()) is not None]


def level_of(model: nn.Module) -> int:
    """How many contexts of hooks on `model` are open here."""
    return len([scope for scope in _open_scopes() if scope.model is model])


def _scope_at(level: int | None, module: nn.Module) -> Scope | None:
    """The open context of this level whose model has `module` in it."""
    scopes = [scope for scope in _open_scopes() if scope.level == level]
    return next((scope for scope in scopes if any(module is inner for inner in scope.model.modules())), None)


def add(hooks: LensHooks) -> list[Hook]:
    """Attaches `hooks`; those of the level of an open context end with it, and act only where it does."""
    scope = None if hooks.level is None or hooks.is_permanent else _scope_at(hooks.level, unwrap(hooks.model))
    if scope is None:
        hooks.attach()
    else:
        scope.begin(hooks)
    return list(hooks._hooks)
