"""Models with hook points: `HookedRootModule`, which has its own, and `hooked`, for any model as it is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from nicehooks.compat.transformer_lens.hooked_methods import HookedMethods
from nicehooks.compat.transformer_lens.points import HookPoint, Place
from nicehooks.core.calling import has_forward
from nicehooks.core.census import Census, parameter_names, unwrap
from nicehooks.paths.names import escape


class HookedRootModule(HookedMethods, nn.Module):
    """A model that shows its values at `HookPoint`s.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks.hookpoints import HookedRootModule, HookPoint
    >>> class Model(HookedRootModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.hook_up = nn.Linear(4, 8), HookPoint()
    ...         self.setup()
    ...     def forward(self, x):
    ...         return self.hook_up(self.up(x)).relu()
    >>> model, x = Model(), torch.ones(2, 4)
    >>> output, cache = model.run_with_cache(x)
    >>> cache
    ActivationCache: 1 site, 64 bytes
      hook_up  Tensor[2, 8] float32
    >>> model.run_with_hooks(x, fwd_hooks=[("hook_up", lambda value, hook: value * 0)]).any().item()
    False

    Attributes:
        hook_dict: the `HookPoint`s by name.
        mod_dict: all modules by name.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.mod_dict = {}
        self.hook_dict = {}

    def setup(self) -> None:
        """Gives each module its `name`, and fills `mod_dict` and `hook_dict`: call it at the end of `__init__`."""
        self.mod_dict = {}
        self.hook_dict = {}
        for name, module in self.named_modules():
            if not name:
                continue
            module.name = name  # type: ignore[assignment]
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                self.hook_dict[name] = module

    def _hooked_model(self) -> nn.Module:
        return self


class HookedModule(HookedMethods):
    """A view of an unmodified model with the methods of a `HookedRootModule`; see `hooked`.

    Attributes:
        model: the model itself.
        hook_dict: a place for each module that can be called, and for each parameter and buffer (`module@weight`).
        mod_dict: all modules by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mod_dict = dict(unwrapped(model))
        self.hook_dict = {str(place.name): place for place in places(model)}

    def __repr__(self) -> str:
        return f"hooked({type(unwrap(self.model)).__name__}: {len(self.hook_dict)} hook points)"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.model(*args, **kwargs)

    def _hooked_model(self) -> nn.Module:
        return self.model

    def _cached_by_default(self) -> list[str]:
        return self._with_gradients(list(self.hook_dict))

    def _with_gradients(self, names: list[str]) -> list[str]:
        """The names of modules: a parameter has no gradient of one run."""
        return [name for name in names if self.hook_dict[name].is_module]


def hooked(model: nn.Module) -> HookedModule:
    """The methods of a `HookedRootModule` for any model: every module is a hook point under its own name.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks.hookpoints import hooked
    >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(5, 4)
    >>> output, cache = hooked(model).run_with_cache(x, names_filter=["0", "0@bias"])
    >>> list(cache)
    ['0@bias', '0']
    >>> hooked(model).run_with_hooks(x, fwd_hooks=[("0", lambda value, hook: value * 0)]).any().item()
    False

    The model is not changed. Hooks that were added to one view of it are seen, and removed, through any other.

    Args:
        model: any module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hooked(model) takes a torch.nn.Module, not {type(model).__name__}")
    return HookedModule(model)


_places: weakref.WeakKeyDictionary[nn.Module, dict[str, Place]] = weakref.WeakKeyDictionary()
"""The places of each model that `hooked` was asked for, so that all views share their `ctx`."""


def unwrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The first name of each module, with the module."""
    census = Census(model)
    return ((name, module) for name, module in census.unwrapped() if census.first[id(module)] == name)


def places(model: nn.Module) -> Iterator[Place]:
    """The place of each module that can be called, and of each parameter and buffer."""
    known = _places.setdefault(model, {})
    for name, module in unwrapped(model):
        keys = [""] if has_forward(module) else []
        for key in [*keys, *(f"@{parameter}" for parameter in parameter_names(module))]:
            text = escape(name) + key
            if text not in known or not known[text].belongs_to(module):
                known[text] = Place(model, module, text, key)
            yield known[text]
