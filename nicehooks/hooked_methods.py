"""The methods of a model with hook points: run with hooks, run with a cache, add and remove hooks by name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from nicehooks.activations import ActivationCache
from nicehooks.caching_hooks import CachingHook, Matched, NamesFilter, PosSlice, chooser
from nicehooks.errors import NotReachedWarning, SiteNotFound, TreeMismatch
from nicehooks.hooks import Direction, Hook, HookFunction, Hooks, Item, Scope, add, level_of, remove_all
from nicehooks.points import Directions, HookMethods, checked, direction, directions

Name = str | Callable[[str], bool]
"""Which hook points: the name of one, or a predicate over names."""

NamedHooks = Iterable[tuple[Name, HookFunction]]


class HookRecord(NamedTuple):
    """One hook, as `list_hooks` shows it.

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


class HookedMethods:
    """What a model with hook points can do. It works from two dicts, which whoever has it provides.

    Attributes:
        hook_dict: the hook points by name.
        mod_dict: the modules by name.
    """

    hook_dict: dict[str, Any]
    mod_dict: dict[str, nn.Module]

    def _hooked_model(self) -> nn.Module:
        """The model."""
        raise NotImplementedError  # abstract: `HookedRootModule` and `HookedModule` have their own

    def _cached_by_default(self) -> list[str]:
        """The names that `names_filter=None` means."""
        return list(self.hook_dict)

    # what there is

    def hook_points(self) -> Iterable[Any]:
        """The hook points."""
        return self.hook_dict.values()

    @property
    def context_level(self) -> int:
        """How many contexts of hooks are open here, in each other."""
        return level_of(self._hooked_model())

    @property
    def is_caching(self) -> bool:
        """Whether a caching hook acts here and now."""
        return any(isinstance(record.hook, CachingHook) for record in self.list_hooks())

    def list_hooks(
        self, names_filter: NamesFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> list[HookRecord]:
        """The hooks that act here and now, point by point, in the order in which they act.

        Args:
            names_filter: the hook points: a name, names, or a predicate; all by default.
            dir: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: whether to list permanent ones.
        """
        names = list(self.hook_dict) if names_filter is None else self._names(names_filter)
        return [
            HookRecord(str(name), one, handle.hook.hook, handle.is_permanent, handle.context_level)
            for name in names
            for one in directions(dir)
            for handle in (self.hook_dict[name].fwd_hooks if one == "fwd" else self.hook_dict[name].bwd_hooks)
            if including_permanent or not handle.is_permanent
        ]

    # names

    def _point(self, name: Any) -> HookMethods:
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is no name of a hook point, and no predicate over names")
        point = self.hook_dict.get(name)
        if point is None:
            raise SiteNotFound(self._no_point(name))
        return point

    def _no_point(self, name: str) -> str:
        model = type(self._hooked_model()).__name__
        if not self.hook_dict:
            return f"{model} has no hook points: it calls self.setup() at the end of its __init__, after defining them."
        text = f"no hook point {name!r} in {model}."
        if name in self.mod_dict:
            text = f"{name!r} in {model} is no hook point, but a {type(self.mod_dict[name]).__name__}."
            text += " hooked(model) has every module as one."
        nearest = difflib.get_close_matches(name, list(self.hook_dict), n=3, cutoff=0.0)
        return f"{text}\n  nearest names: {', '.join(nearest)}"

    def _names(self, names_filter: NamesFilter) -> list[str]:
        """The names that a filter chooses, at least one; those of a predicate know that they are of one wildcard."""
        if names_filter is None:
            return _matched(self._cached_by_default(), "names_filter=None")
        chosen = chooser(names_filter)
        if not callable(chosen):
            for name in chosen:
                self._point(name)
            if not chosen:
                raise SiteNotFound("names_filter is an empty list: it has to name a hook point.")
            return list(dict.fromkeys(chosen))
        return self._matching(chosen)

    def _matching(self, predicate: Callable[[str], Any]) -> list[str]:
        names = [name for name in self.hook_dict if predicate(name)]
        shown = getattr(predicate, "__name__", None) or type(predicate).__name__
        if not names:
            model = type(self._hooked_model()).__name__
            have = ", ".join(map(repr, list(self.hook_dict)[:3])) or "none: call self.setup()"
            raise SiteNotFound(f"{shown} matches no hook point of {model}.\n  hook points: {have}, …")
        return _matched(names, shown)

    def _items(self, hooks: NamedHooks, dir: Direction) -> list[Item]:
        """Each `(name, function)` as an `Item`, with its hook points."""
        items: list[Item] = []
        groups: list[object] = []
        for name, hook in _pairs(hooks, dir):
            names = self._matching(name) if callable(name) else [name]
            for one in names:
                group = getattr(one, "group", None)
                if group is not None and groups and groups[-1] is group and items[-1].hook is hook:
                    items[-1] = items[-1]._replace(points=[*items[-1].points, self._point(one)])
                    continue
                groups.append(group)
                shown = repr(one) if group is None else one.shown  # type: ignore[attr-defined]
                items.append(Item(shown, [self._point(one)], hook, dir, group is not None))
        return items

    # adding and removing

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
        items = self._items([(name, hook)], direction(dir))
        names = self._matching(name) if callable(name) else [name]
        for one in names:
            self.check_hooks_to_add(self._point(one), str(one), hook, dir, is_permanent, prepend)
        add(Hooks(self._hooked_model(), items, level=level, is_permanent=is_permanent, first=prepend))

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

    # running

    @contextmanager
    def hooks(
        self,
        fwd_hooks: NamedHooks = (),
        bwd_hooks: NamedHooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """A context with hooks, which act in the thread or task that entered it; leaving it removes them.

        Args:
            fwd_hooks: pairs of a name, or a predicate over names, and a function `fn(value, hook=point)`.
            bwd_hooks: likewise, for the gradients. Backward has to run inside the context.
            reset_hooks_end: whether leaving removes them. If not, they act everywhere until they are removed; after an
                error they are removed all the same.
            clear_contexts: whether leaving empties the `ctx` of every hook point.

        Raises:
            SiteNotFound: on entry: there is no such hook point.
            SiteNotReached: on exit: a hook with a name never acted.
        """
        items = self._items(fwd_hooks, "fwd") + self._items(bwd_hooks, "bwd")
        with self._scope(items, reset_hooks_end, clear_contexts):
            yield self

    @contextmanager
    def _scope(self, items: list[Item], reset: bool, clear: bool, needs_backward: bool = True) -> Iterator[None]:
        try:
            with Scope(self._hooked_model(), items, keep=not reset, needs_backward=needs_backward):
                yield
        finally:
            if reset and clear:
                self.clear_contexts()

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: NamedHooks = (),
        bwd_hooks: NamedHooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Runs the model with hooks; see `hooks`.

        Args:
            model_args: for the model.
            fwd_hooks: as for `hooks`.
            bwd_hooks: as for `hooks`. They are removed before you can call backward, and a warning says so: use
                `with model.hooks(bwd_hooks=…):` around both.
            reset_hooks_end: as for `hooks`.
            clear_contexts: as for `hooks`.
            model_kwargs: for the model.
        """
        items = self._items(fwd_hooks, "fwd")
        backward = self._items(bwd_hooks, "bwd")
        if backward and reset_hooks_end:
            warnings.warn(NO_BACKWARD, NotReachedWarning, stacklevel=2)
        with self._scope(items + backward, reset_hooks_end, clear_contexts, needs_backward=False):
            return self._hooked_model()(*model_args, **model_kwargs)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: PosSlice = None,
        detach: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs the model, and returns its output and an `ActivationCache` of the values at its hook points.

        Args:
            model_args: for the model.
            names_filter: what to cache: a name, a list of names, a predicate over names, or None for everything.
            device: where to keep the values; where they are by default.
            remove_batch_dim: takes the only example out of its batch.
            incl_bwd: calls backward on the output, which is a scalar, and caches the gradients, too, under names with
                `_grad` after them.
            reset_hooks_end: as for `hooks`.
            clear_contexts: as for `hooks`.
            pos_slice: the positions to keep: an int, a slice, a tuple for one, a list of ints, or None for all.
            detach: takes each value out of the autograd graph.
            model_kwargs: for the model.

        Raises:
            SiteNotFound: `names_filter` names a hook point that is not there, or matches none.
        """
        options: dict[str, Any] = {"device": device, "remove_batch_dim": remove_batch_dim}
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, **options, pos_slice=pos_slice, detach=detach)
        items = self._items(fwd, "fwd") + self._items(bwd, "bwd")
        with self._scope(items, reset_hooks_end, clear_contexts):
            output = self._hooked_model()(*model_args, **model_kwargs)
            if incl_bwd:
                _scalar(output).backward()
        return output, cache  # type: ignore[return-value]

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Any] | None = None,
        pos_slice: PosSlice = None,
        detach: bool = False,
    ) -> tuple[dict[str, Any], list[tuple[str, CachingHook]], list[tuple[str, CachingHook]]]:
        """A cache, and the forward and backward hooks that fill it, for `hooks` or `run_with_hooks`.

        Args:
            names_filter: as for `run_with_cache`.
            incl_bwd: whether to make backward hooks.
            device: as for `run_with_cache`.
            remove_batch_dim: as for `run_with_cache`.
            cache: a dict to put the values into; a new `ActivationCache` by default.
            pos_slice: as for `run_with_cache`.
            detach: as for `run_with_cache`.
        """
        cache = ActivationCache() if cache is None else cache
        names = self._names(names_filter)
        forward = CachingHook(cache, "", device, remove_batch_dim, pos_slice, detach)
        backward = CachingHook(cache, "_grad", device, remove_batch_dim, pos_slice, detach)
        fwd = [(name, forward) for name in names]
        return cache, fwd, [(name, backward) for name in self._with_gradients(names)] if incl_bwd else []

    def _with_gradients(self, names: list[str]) -> list[str]:
        """The names that have gradients."""
        return names

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Any] | None = None,
        pos_slice: PosSlice = None,
        detach: bool = False,
    ) -> dict[str, Any]:
        """Adds hooks that cache, until they are removed, and returns the cache; see `get_caching_hooks`."""
        cache, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, pos_slice, detach
        )
        add(Hooks(self._hooked_model(), self._items(fwd, "fwd") + self._items(bwd, "bwd"), needs_backward=False))
        return cache

    def cache_all(
        self,
        cache: dict[str, Any] | None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """Deprecated: `add_caching_hooks` without a filter."""
        warnings.warn(DEPRECATED.format(name="cache_all"), DeprecationWarning, stacklevel=2)
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
        cache: dict[str, Any] | None,
        names: Callable[[str], bool],
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """Deprecated: `add_caching_hooks` with a filter."""
        warnings.warn(DEPRECATED.format(name="cache_some"), DeprecationWarning, stacklevel=2)
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)


NO_BACKWARD = (
    "run_with_hooks only runs forward: its bwd_hooks are removed before you can call backward, and never act.\n"
    "    with model.hooks(bwd_hooks=…):       # correct\n"
    "        model(…).sum().backward()"
)

DEPRECATED = "{name} is deprecated: use run_with_cache, or add_caching_hooks."


def _matched(names: list[str], shown: str) -> list[str]:
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


def _scalar(output: Any) -> Tensor:
    """`output`, if backward can be called on it."""
    if not isinstance(output, Tensor) or output.numel() != 1 or not output.requires_grad:
        shown = output if not isinstance(output, Tensor) else f"a tensor of shape {list(output.shape)}"
        more = " without a gradient" if isinstance(output, Tensor) and not output.requires_grad else ""
        shown = shown if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TreeMismatch(NO_SCALAR.format(shown=shown + more))
    return output


NO_SCALAR = (
    "incl_bwd=True calls backward on the output, which has to be a scalar loss with a gradient, but it is {shown}.\n"
    "    cache, fwd, bwd = model.get_caching_hooks(incl_bwd=True)\n"
    "    with model.hooks(fwd, bwd):\n"
    "        loss(model(…)).backward()"
)
