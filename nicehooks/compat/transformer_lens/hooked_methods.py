"""Running a model with hooks, or with a cache: the methods of a model with hook points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nicehooks.caches.cache import ActivationCache
from nicehooks.compat.transformer_lens.caching_hooks import CachingHook, NamesFilter, PosSlice
from nicehooks.compat.transformer_lens.hook_point import adds_itself
from nicehooks.compat.transformer_lens.hooks import Item, LensHooks, Scope, add
from nicehooks.compat.transformer_lens.hooks_by_name import HookList, NamedPoints
from nicehooks.compat.transformer_lens.lens_cache import LensCache
from nicehooks.errors import TreeMismatch, UnsupportedModule, warn_caller


class HookedMethods(NamedPoints):
    """All that a model with hook points can do: what `NamedPoints` has, and running it."""

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
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
    def _scope(self, items: list[Item], reset: bool, clear: bool, forward_only: bool = False) -> Iterator[None]:
        """A context of hooks; where only the forward runs in it, those on gradients act in the backward after it."""
        if torch.compiler.is_dynamo_compiling():
            raise UnsupportedModule(IN_COMPILED_CODE)
        own = [(item, point) for item in items for point in item.points if adds_itself(point)]
        of_all = [
            item._replace(points=points)
            for item in items
            if (points := [point for point in item.points if not adds_itself(point)])
        ]
        try:
            outlives = forward_only and reset
            needs_backward = not (forward_only and not reset)
            with Scope(self._hooked_model(), of_all, not reset, needs_backward, outlives) as scope:
                for item, point in own:
                    point.add_hook(item.hook, dir=item.dir, level=scope.level)  # type: ignore[attr-defined]
                scope.entering = False
                yield
        finally:
            if reset and clear:
                self.clear_contexts()

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Runs the model with hooks; see `hooks`.

        Args:
            model_args: for the model.
            fwd_hooks: as for `hooks`.
            bwd_hooks: as for `hooks`. They act in the backward of what this run computes, whenever that comes, and are
                gone with its graph: `model.run_with_hooks(x, bwd_hooks=…).backward()`.
            reset_hooks_end: as for `hooks`.
            clear_contexts: as for `hooks`.
            model_kwargs: for the model.
        """
        items = self._items(fwd_hooks, "fwd") + self._items(bwd_hooks, "bwd")
        with self._scope(items, reset_hooks_end, clear_contexts, forward_only=True):
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
        clone: bool = False,
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
            clone: keeps copies, which nothing can overwrite.
            model_kwargs: for the model.

        Raises:
            SiteNotFound: `names_filter` names a hook point that is not there, or matches none.
        """
        options: dict[str, Any] = {"device": device, "remove_batch_dim": remove_batch_dim, "clone": clone}
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, **options, pos_slice=pos_slice, detach=detach)
        items = self._items(fwd, "fwd") + self._items(bwd, "bwd")
        with self._scope(items, reset_hooks_end, clear_contexts):
            output = self._hooked_model()(*model_args, **model_kwargs)
            if incl_bwd:
                _scalar_loss(output).backward()
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
        clone: bool = False,
    ) -> tuple[dict[str, Any], list[tuple[str, CachingHook]], list[tuple[str, CachingHook]]]:
        """A cache, and the forward and backward hooks that fill it, for `hooks` or `run_with_hooks`.

        Args:
            names_filter: as for `run_with_cache`.
            incl_bwd: whether to make backward hooks.
            device: as for `run_with_cache`.
            remove_batch_dim: as for `run_with_cache`.
            cache: a dict to put the values into; a new `ActivationCache` by default. A plain dict does not notice that
                the model overwrites a value in place: then say `clone=True`.
            pos_slice: as for `run_with_cache`.
            detach: as for `run_with_cache`.
            clone: as for `run_with_cache`.
        """
        cache = LensCache(layers=self._layers()) if cache is None else cache
        names = self._names(names_filter)
        forward = CachingHook(cache, "", device, remove_batch_dim, pos_slice, detach, clone)
        backward = CachingHook(cache, "_grad", device, remove_batch_dim, pos_slice, detach, clone)
        fwd = [(name, forward) for name in names]
        return cache, fwd, [(name, backward) for name in self._with_gradients(names)] if incl_bwd else []

    def _layers(self) -> int:
        """How many layers the names of the hook points count."""
        found = [re.match(r"blocks\.(\d+)\.", name) for name in self.hook_dict]
        return max([int(one[1]) + 1 for one in found if one is not None], default=0)

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
        clone: bool = False,
    ) -> dict[str, Any]:
        """Adds hooks that cache, until they are removed, and returns the cache; see `get_caching_hooks`."""
        cache, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, pos_slice, detach, clone
        )
        add(LensHooks(self._hooked_model(), self._items(fwd, "fwd") + self._items(bwd, "bwd")))
        return cache

    def cache_all(
        self,
        cache: dict[str, Any] | None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """Deprecated: `add_caching_hooks` without a filter."""
        warn_caller(DEPRECATED.format(name="cache_all"), DeprecationWarning)
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
        warn_caller(DEPRECATED.format(name="cache_some"), DeprecationWarning)
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)


IN_COMPILED_CODE = (
    "hooks of hook points cannot be entered inside compiled code. Enter them outside, around the compiled call;\n"
    "  or enter edit(model, name, fn) inside, which can be."
)

DEPRECATED = "{name} is deprecated: use run_with_cache, or add_caching_hooks."


def _scalar_loss(output: Any) -> Tensor:
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
