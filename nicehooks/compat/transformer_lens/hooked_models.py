"""Models with hook points: `HookedRootModule`, which has its own, and `hooked`, for any model as it is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from nicehooks.anatomies.tables import PARTS as PARTS_OF_LAYERS
from nicehooks.compat.transformer_lens.canonical_names import CanonicalNames, canonical_names
from nicehooks.compat.transformer_lens.hook_point import HookPlace, HookPoint
from nicehooks.compat.transformer_lens.hooked_methods import HookedMethods
from nicehooks.compat.transformer_lens.hooks_by_name import one_wildcard
from nicehooks.core.calling import has_forward
from nicehooks.core.census import Census, parameter_names
from nicehooks.core.children import unwrap
from nicehooks.core.selection import Site, select
from nicehooks.errors import PathError, SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape

PART_NAMES = ("embed", *PARTS_OF_LAYERS, "final_norm", "logits")
"""The names that `anatomy` has for parts."""


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
        hook_dict: a place for each name of TransformerLens, where the anatomy of the model is known; for each module
            that can be called; and for each parameter and buffer (`module@weight`).
        mod_dict: all modules by name.
        canonical: what the model has under the names of TransformerLens; None where its anatomy is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mod_dict = dict(first_names(model))
        self.canonical = canonical_names(model)
        known = _known_places.setdefault(model, {})
        named = [] if self.canonical is None else canonical_places(model, self.canonical)
        found = {name: (module, key) for name, module, key in [*named, *module_places(model)]}
        self.hook_dict = {name: place_at(known, model, name, *where) for name, where in found.items()}
        self._by_path = _known_paths.setdefault(model, {})

    def __repr__(self) -> str:
        return f"hooked({type(unwrap(self.model)).__name__}: {len(self.hook_dict)} hook points)"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.model(*args, **kwargs)

    def _hooked_model(self) -> nn.Module:
        return self.model

    def hook_points(self) -> list[HookPlace]:
        return [self._point(name) for name in self._every_name()]

    def _cached_by_default(self) -> list[str]:
        """The names of TransformerLens, and modules: no parameter."""
        parts = {} if self.canonical is None else self.canonical.paths
        return [name for name, place in self.hook_dict.items() if name in parts or not place.key]

    def _with_gradients(self, names: list[str]) -> list[str]:
        """The names of what has a gradient of one run, which a parameter does not."""
        return [name for name in names if self._point(name).has_gradient]

    # names

    def _every_name(self) -> list[str]:
        return [*self.hook_dict, *(name for name, place in list(self._by_path.items()) if place.has_hooks())]

    def _point(self, name: Any) -> HookPlace:
        place = self.hook_dict.get(name) or self._by_path.get(name)
        if place is None:
            super()._point(name)
            raise AssertionError("unreachable")
        return place

    def _no_point(self, name: str) -> str:
        why = None if self.canonical is None else self.canonical.lacking.get(name)
        return super()._no_point(name) if why is None else f"no hook point {name!r}: {why}"

    def _names_of(self, name: Any) -> list[str]:
        """Beside names and predicates over them: the name of a part (`"resid_post"`), for all layers, and any path."""
        if isinstance(name, tuple | list):
            return [one for each in name for one in self._names_of(each)]
        text = str(name) if isinstance(name, ModulePath | Site) else name
        if not isinstance(text, str) or text in self.hook_dict:
            return super()._names_of(text)
        parts = None if self.canonical is None else self.canonical.parts
        if parts is not None and text in PART_NAMES:
            part = getattr(parts, text)
            return self._names_of(list(part) if isinstance(part, tuple) else part)
        return self._names_at(text)

    def _names_at(self, path: str) -> list[str]:
        """The names of the places at a path, which are their own paths; of a wildcard, some may not be reached."""
        try:
            wild = ModulePath.parse(path).is_wild
            found = select(self.model, path)
        except (PathError, SiteNotFound):
            raise SiteNotFound(self._no_point(path)) from None
        for site in found:
            key = str(site)[len(escape(site.name)) :]
            place_at(self._by_path, self.model, str(site), site.module, key)
        names = [str(site) for site in found]
        return one_wildcard(names, repr(path)) if wild else names


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

    Where `anatomy(model)` knows the model, the names of TransformerLens are hook points too, with values of its shapes;
    and so are, for all models, paths, and the names of parts for all layers at once:

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=50)).eval()
    >>> ids = torch.arange(3)[None]
    >>> _, cache = hooked(gpt2).run_with_cache(ids)
    >>> cache["pattern", 0].shape, cache["blocks.1.attn.hook_z"].shape, cache["resid_post", -1].shape
    (torch.Size([1, 4, 3, 3]), torch.Size([1, 3, 4, 4]), torch.Size([1, 3, 16]))
    >>> out = hooked(gpt2).run_with_hooks(ids, fwd_hooks=[("mlp_out", lambda value, hook: value * 0)])

    The model is not changed. Hooks that were added to one view of it are seen, and removed, through any other.

    Args:
        model: any module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hooked(model) takes a torch.nn.Module, not {type(model).__name__}")
    return HookedModule(model)


_known_places: weakref.WeakKeyDictionary[nn.Module, dict[str, HookPlace]] = weakref.WeakKeyDictionary()
"""The places of each model that `hooked` was asked for, so that all views share their `ctx`."""

_known_paths: weakref.WeakKeyDictionary[nn.Module, dict[str, HookPlace]] = weakref.WeakKeyDictionary()
"""The places that were asked for by a path, likewise."""


def first_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The first name of each module, with the module."""
    census = Census(model)
    return ((name, module) for name, module in census.unwrapped() if census.first[id(module)] == name)


def module_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name, module and key of each module that can be called, and of each parameter and buffer."""
    for name, module in first_names(model):
        keys = [""] if has_forward(module) else []
        for key in [*keys, *(f"@{parameter}" for parameter in parameter_names(module))]:
            yield escape(name) + key, module, key


def canonical_places(model: nn.Module, names: CanonicalNames) -> Iterator[tuple[str, nn.Module, str]]:
    """The same of each hook point that TransformerLens has a name for."""
    modules = Census(model).names
    for name, path in names.paths.items():
        yield name, modules[path.plain_name], str(path)[len(path.name) :]


def place_at(known: dict[str, HookPlace], model: nn.Module, name: str, module: nn.Module, key: str) -> HookPlace:
    """The place of this name: that which is known, as long as it is still the place of the same value."""
    if name not in known or not known[name].is_at(module, key):
        known[name] = HookPlace(model, module, name, key)
    return known[name]
