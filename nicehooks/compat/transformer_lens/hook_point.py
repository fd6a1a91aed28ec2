"""`HookPoint`: an identity module that hooks can be added to; and the same methods for any place of any model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from nicehooks import torch_private
from nicehooks.compat.transformer_lens.hooks import (
    Direction,
    Hook,
    HookFunction,
    Item,
    LensHandle,
    LensHooks,
    add,
    handle_of,
    hooks_on,
    remove_all,
)
from nicehooks.core.census import Census
from nicehooks.core.explaining import explained
from nicehooks.core.selection import Site
from nicehooks.errors import SiteNotFound, UnsupportedModule
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape
from nicehooks.paths.ports import OUTPUT
from nicehooks.ports.arguments import INPUT
from nicehooks.ports.gradients import GRADIENT, INPUT_GRADIENT
from nicehooks.values.trees import Chain

Directions = Literal["fwd", "bwd", "both"]

GRADIENTS = {OUTPUT: GRADIENT, INPUT: INPUT_GRADIENT}
"""The port of the gradient of each port whose gradient is a place."""


class HookMethods:
    """The methods of a place where hooks can be. `name` and `ctx` are its name, and a dict for the hooks to share."""

    name: str | None
    ctx: dict[str, Any]
    _key = ""  # what the path of the place has after the name of the module

    # where it is

    def _root(self) -> nn.Module:
        """The model that hooks on this place alone are entered on."""
        raise NotImplementedError  # abstract: `HookPoint` and `HookPlace` have their own

    def _module(self) -> nn.Module:
        """The module whose value this is."""
        raise NotImplementedError  # abstract: `HookPoint` and `HookPlace` have their own

    def _tapped(self) -> nn.Module:
        """The module whose tap has the rules of this place."""
        return self._module()

    def site_in(self, model: nn.Module, census: Census, dir: Direction) -> Site:
        """The site of this place in `model`.

        Raises:
            SiteNotFound: the place is in another model.
            UnsupportedModule: there is no such site.
        """
        module = self._module()
        name = (self.name or "") if module is model else census.first.get(id(module))
        if name is None:
            raise SiteNotFound(f"the hook point {self.name!r} is no part of this {type(model).__name__} (any more).")
        if torch_private.is_scripted(module):
            raise explained("nearest.scripted", name, module)
        path = self._path(name, dir)
        if path is None:
            why = NO_CALL_GRADIENT if "(" in self._key else NO_PARAMETER_GRADIENT
            raise UnsupportedModule(why.format(name=self.name))
        return Site(name, module, path, model, census.encoders_around(name))

    def _path(self, module: str, dir: Direction) -> ModulePath | None:
        """The path of the value, or of its gradient, in the module of this name; None where there is no gradient."""
        path = ModulePath.parse(escape(module) + self._key)
        if dir == "fwd":
            return path
        return replace(path, port=GRADIENTS[path.port]) if path.port in GRADIENTS else None

    @property
    def has_gradient(self) -> bool:
        """Whether there can be hooks on the gradient."""
        return self._path("", "bwd") is not None

    # adding

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: Iterable[str] | None = None,
    ) -> LensHandle:
        """Adds `hook(value, hook=self)`, in every thread, until it is removed.

        >>> import torch
        >>> from nicehooks.hookpoints import HookPoint
        >>> point = HookPoint()
        >>> handle = point.add_hook(lambda value, hook: value * 2)
        >>> point(torch.ones(2)), handle.hook.remove(), point(torch.ones(2))
        (tensor([2., 2.]), None, tensor([1., 1.]))

        Args:
            hook: returns what is assigned to the value, or None to leave it. With `dir="bwd"` it is given the
                gradient, and what it returns (a tensor, or a tuple of one) takes its place.
            dir: `"fwd"` or `"bwd"`.
            is_permanent: whether only `including_permanent=True` removes it.
            level: the `context_level` that it belongs to. If a context of hooks is open at this level, the hook acts
                only where that does, and ends with it.
            prepend: whether it acts before all that is there, not after.
            alias_names: calls the hook once for each of these names, as if they were the place's own.

        Returns:
            It, as `fwd_hooks` and `bwd_hooks` list it.

        Raises:
            ValueError: `dir` is neither.
        """
        item = Item(repr(self.name or ""), [self], checked(hook), checked_direction(dir), False)
        aliases = () if alias_names is None else alias_names
        hooks = LensHooks(self._root(), [item], level=level, is_permanent=is_permanent, first=prepend, aliases=aliases)
        (added,) = add(hooks)
        return handle_of(added)

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> None:
        """Adds a hook that only `including_permanent=True` removes."""
        self.add_hook(hook, dir=dir, is_permanent=True)

    # what is there

    @property
    def fwd_hooks(self) -> list[LensHandle]:
        """The hooks on the value that act here and now, in the order in which they act."""
        return self._handles("fwd")

    @property
    def bwd_hooks(self) -> list[LensHandle]:
        """The hooks on the gradient that act here and now, in the order in which they act."""
        return self._handles("bwd")

    def _handles(self, dir: Direction) -> list[LensHandle]:
        path = self._path("", dir)
        hooks = [] if path is None else hooks_on(self._tapped(), str(path), dir)
        return [handle_of(hook) for hook in hooks if self._is_of(hook)]

    def _is_of(self, hook: Hook) -> bool:
        """Whether `hook`, which acts on this value, belongs to this place: a value may have several names."""
        return True

    def has_hooks(self, dir: Directions = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether there are such hooks here and now.

        Args:
            dir: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: whether permanent ones count.
            level: counts those of this level alone.
        """
        return bool(self.chosen_hooks(dir, including_permanent, level))

    def chosen_hooks(self, dir: Directions, including_permanent: bool, level: int | None) -> list[Hook]:
        """Those of the hooks that act here and now which `has_hooks` asks for."""
        return [
            handle.hook
            for one in directions(dir)
            for handle in self._handles(one)
            if (including_permanent or not handle.is_permanent) and level in (None, handle.context_level)
        ]

    # removing

    def remove_hooks(
        self, dir: Directions = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Removes the hooks that act here and now.

        Args:
            dir: `"fwd"`, `"bwd"` or `"both"`.
            including_permanent: whether to remove permanent ones, too.
            level: removes those of this level alone.
        """
        remove_all(self.chosen_hooks(dir, including_permanent, level))

    def clear_context(self) -> None:
        """Empties `ctx`."""
        self.ctx = {}

    # what hooks are told

    def layer(self) -> int:
        """The layer that the name says: 3 for `blocks.3.hook_resid_pre`.

        Raises:
            ValueError: there is no number in the name.
        """
        numbers = [part for part in (self.name or "").split(".") if part.isdecimal()]
        if not numbers:
            raise ValueError(f"the name {self.name!r} of this hook point has no number of a layer in it")
        return int(numbers[0])

    def way_in(self, value: Any) -> Chain:
        """The steps from `value` to the part of it that hooks are given."""
        return ()

    def part(self, subscripts: str) -> Any:
        """What a hook is told for the part of the value at `subscripts`; None for one that hooks are not given."""
        return self.called(f"{self.name}{subscripts}") if subscripts else self

    def called(self, name: str) -> HookPlace:
        """The same place, with the same `ctx`, under another name."""
        return HookPlace(self._root(), self._module(), name, self._key, self.ctx)


class HookPoint(HookMethods, nn.Module):
    """An identity module: what passes through it can be seen and replaced by hooks `fn(value, hook=point)`.

    >>> import torch
    >>> from nicehooks.hookpoints import HookPoint
    >>> point = HookPoint()
    >>> _ = point.add_hook(lambda value, hook: hook.ctx.update(seen=value.sum().item()))
    >>> point(torch.ones(2)), point.ctx
    (tensor([1., 1.]), {'seen': 2.0})

    Attributes:
        name: its name in the model, once the model's `setup()` has run.
        ctx: a dict for the hooks of this point.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ctx = {}
        self.name = None

    def forward(self, x: Any) -> Any:
        return x

    def __repr__(self) -> str:
        """Its name, and how many hooks act on it, as far as there are any."""
        shown = [] if self.name is None else [f"name={self.name!r}"]
        counts = [(len(self._handles(dir)), dir) for dir in directions("both")]
        return f"HookPoint({', '.join(shown + [f'{count} {dir}' for count, dir in counts if count])})"

    def _root(self) -> nn.Module:
        return self

    def _module(self) -> nn.Module:
        return self


class Within:
    """A place in a model, which it does not keep alive.

    Attributes:
        name: of the place.
    """

    name: Any
    _of: tuple[weakref.ref[nn.Module], weakref.ref[nn.Module]]

    def _root(self) -> nn.Module:
        return self._alive(0)

    def _module(self) -> nn.Module:
        return self._alive(1)

    def _alive(self, which: int) -> nn.Module:
        module = self._of[which]()
        if module is None:
            raise SiteNotFound(MODEL_GONE.format(name=self.name))
        return module


class HookPlace(Within, HookMethods):
    """A place of an unmodified model, with the methods of a `HookPoint`: whatever has a path, under a name of its own.

    >>> from torch import nn, ones
    >>> from nicehooks.hookpoints import hooked
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> place = hooked(model).hook_dict["0"]
    >>> _ = place.add_hook(lambda value, hook: value * 0)
    >>> model(ones(2, 4)).any().item(), place.has_hooks()
    (False, True)
    >>> place.remove_hooks()

    Attributes:
        name: the name in the model, for a parameter `module@weight`; the name of a part; or a path.
        ctx: a dict for the hooks of this place.
    """

    def __init__(
        self, model: nn.Module, module: nn.Module, name: str, key: str = "", ctx: dict[str, Any] | None = None
    ) -> None:
        self.name: str | None = name
        self.ctx = {} if ctx is None else ctx
        self._key = key
        self._of = weakref.ref(model), weakref.ref(module)

    def __repr__(self) -> str:
        return f"HookPlace({self.name!r})"

    @property
    def key(self) -> str:
        """What its path has after the name of the module."""
        return self._key

    def is_at(self, module: nn.Module, key: str) -> bool:
        """Whether this is the place of this very module that `key` leads to."""
        return self._of[1]() is module and self._key == key

    def _is_of(self, hook: Hook) -> bool:
        return hook.point is None or isinstance(hook.point, nn.Module) or hook.point.name == self.name

    def _tapped(self) -> nn.Module:
        module: Any = self._module()
        name = self._key.removeprefix("@")
        return module.parametrizations[name] if name in getattr(module, "parametrizations", {}) else module


MODEL_GONE = "the model of the hook point {name!r} no longer exists: nothing else has it. Give the model a name first."

NO_PARAMETER_GRADIENT = (
    "{name!r} is a parameter, which has no gradient of one call: read its .grad after backward, or use functional()."
)

NO_CALL_GRADIENT = (
    "{name!r} is the value of a call inside a module, whose gradient is no place that a path leads to: take the "
    "gradient of what goes into the module, or of what comes out of it."
)


def adds_itself(point: Any) -> bool:
    """Whether the class of `point` has an `add_hook` of its own, which is to be called then."""
    return type(point).add_hook is not HookMethods.add_hook


def checked(hook: Any) -> HookFunction:
    """`hook`, if it can be one."""
    if not callable(hook):
        raise TypeError(f"a hook is a function fn(value, hook=point), not {type(hook).__name__}")
    return hook


def checked_direction(dir: Any) -> Direction:
    """`dir`, if it is a direction."""
    if dir not in ("fwd", "bwd"):
        raise ValueError(f"dir={dir!r}: it is 'fwd' (the value) or 'bwd' (the gradient)")
    return dir


def directions(dir: Any) -> tuple[Direction, ...]:
    """The directions that `dir` means."""
    if dir not in ("fwd", "bwd", "both"):
        raise ValueError(f"dir={dir!r}: it is 'fwd' (the value), 'bwd' (the gradient) or 'both'")
    return ("fwd", "bwd") if dir == "both" else (dir,)
