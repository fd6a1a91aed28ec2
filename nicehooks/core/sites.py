"""A site: one place in one model where a value can be seen or replaced."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nicehooks.errors import SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape


class Site:
    """One place in one model where a value can be seen or replaced.

    >>> from torch import nn
    >>> from nicehooks import select
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> [str(site) for site in select(model, "*")]
    ['0', '1']

    Attributes:
        name: the name of the module in the model.
        path: the `ModulePath` that selects just this site; `str(site)` is the same as text.
        key: the same for two sites that are one place: a module under two names is one module.
    """

    __slots__ = ("_encoders", "_model", "_module", "_text", "key", "name", "path")

    def __init__(self, name: str, module: nn.Module, path: ModulePath, model: nn.Module, encoders: Any = ()) -> None:
        self.name = name
        self.path = path
        self._module = _reference(module)
        self._model = _reference(model)
        self._encoders = tuple([_reference(encoder) for encoder in encoders])
        self._text = str(path)
        self.key = (id(module), self._text[len(escape(name)) :])

    @property
    def module(self) -> nn.Module:
        """The module; a site does not keep it alive."""
        module = self._module()
        if module is None:
            raise SiteNotFound(f"the module of site {self._text!r} no longer exists: select, or enter, again")
        return module

    @property
    def encoders(self) -> list[nn.Module]:
        """The `nn.TransformerEncoder`s and their layers around the module: a fused kernel of theirs may hide it."""
        return [encoder for reference in self._encoders if (encoder := reference()) is not None]

    def at(self, path: ModulePath) -> Site:
        """The site of the same module at `path`."""
        model: Any = self._model()
        return Site(self.name, self.module, path, model, self.encoders)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether this site was selected in this very model."""
        return self._model() is model and self._module() is not None

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Site({self._text!r})"

    def __eq__(self, other: object) -> bool:
        """A site equals another one of the same module, and its own text: both find a cache's entry."""
        if not isinstance(other, Site):
            return self._text == other if isinstance(other, str) else NotImplemented
        return self._text == other._text and self._module() is other._module()

    def __hash__(self) -> int:
        return hash(self._text)


def _reference(module: nn.Module) -> Callable[[], nn.Module | None]:
    """A weak reference; in code that is being traced, which makes none, one that is as short-lived as the site."""
    return (lambda: module) if torch.compiler.is_compiling() else weakref.ref(module)
