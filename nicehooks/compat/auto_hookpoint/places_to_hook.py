"""The hook points that `auto_hook` gives a model: for each module, and for each parameter that a forward uses itself.

NOTE [Which parameters have a hook point]
A module that PyTorch ships uses its parameters in kernels, and its output is what there is to see. A module that
somebody wrote has a forward of its own, in which its parameters enter operations: each of them has a hook point, for
the results of these operations. So the rule looks at the class that defines `forward`: it is not one of torch's. What a
`ParameterList` or `ParameterDict` holds belongs to the module around it. A parameter with two names in one module has
its hook point under the first one.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from nicehooks import torch_private
from nicehooks.compat.transformer_lens.hook_point import HookPoint, Within
from nicehooks.compat.transformer_lens.hooks import Direction
from nicehooks.core.calling import has_forward
from nicehooks.core.census import Census
from nicehooks.core.selection import Site
from nicehooks.core.tap import tap_of
from nicehooks.errors import SiteNotFound
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape
from nicehooks.paths.ports import Port
from nicehooks.ports.uses import parametrizations_of, users_of
from nicehooks.values.trees import Chain

SUFFIX = "hook_point"


class AutoPoint(Within, HookPoint):
    """A hook point that is no part of the model: it knows its module, and what it sees there.

    Attributes:
        name: as in `hook_dict`.
        ctx: a dict for the hooks of this point.
    """

    def __init__(self, model: nn.Module, module: nn.Module, name: str, key: str) -> None:
        super().__init__()
        self.name = name
        self._key = key
        self._of = weakref.ref(model), weakref.ref(module)

    def __repr__(self) -> str:
        return "HookPoint()"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of the model has its own points, without hooks."""
        return AutoPoint, (self._root(), self._module(), self.name, self._key)

    def way_in(self, value: Any) -> Chain:
        """To the first item of what a module returns, where that is a tuple: the rest is its own business."""
        return (0,) if isinstance(value, tuple | list) and value and not self._key else ()

    def part(self, subscripts: str) -> Any:
        """Of a tuple, hooks are given the gradient of the first item alone."""
        if self._key or not re.match(r"\[\d+\]", subscripts):
            return super().part(subscripts)
        return super().part(subscripts.removeprefix("[0]")) if subscripts.startswith("[0]") else None

    @property
    def is_of_parameter(self) -> bool:
        """Whether the values are what a parameter enters, and not what a module returns."""
        return bool(self._key)

    def is_at(self, module: nn.Module) -> bool:
        """Whether the point is of this very module."""
        return self._of[1]() is module

    def site_in(self, model: nn.Module, census: Census, dir: Direction) -> Site:
        module = self._module()
        name = census.first.get(id(module))
        if name is None:
            raise SiteNotFound(f"the hook point {self.name!r} is no part of this {type(model).__name__} (any more).")
        path = self._path(name, dir)
        return Site(name, module, path, model, census.encoders_around(name))

    def _path(self, module: str, dir: Direction) -> ModulePath:
        path = ModulePath.parse(escape(module) + self._key)
        gradient = Port("use.grad", path.port.name) if self._key else Port("grad")
        return replace(path, port=gradient) if dir == "bwd" else path

    def _tapped(self) -> nn.Module:
        return next(users_of(self._module(), self._root())) if self._key else self._module()


def points_of(model: nn.Module, known: dict[str, HookPoint]) -> dict[str, HookPoint]:
    """The hook points that `model` has by now; one in `known` whose module is still there stays the same object.

    A hook point that was written by hand is a module of the model, and has the name that it has there.
    """
    points: dict[str, HookPoint] = {}
    for name, module, key in places_of(model):
        if isinstance(module, HookPoint):
            module.name = name
            points[name] = module
            continue
        point = known.get(name)
        stays = isinstance(point, AutoPoint) and point.is_at(module)
        points[name] = point if stays and point is not None else AutoPoint(model, module, name, key)
    return points


def places_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name of each hook point, with its module and what the path of its site has after the module's name.

    In the order of `named_modules`: each module, and then its own parameters.
    """
    census = Census(model)
    for name, module in census.unwrapped():
        if census.first[id(module)] != name or torch_private.is_scripted(module):
            continue
        if isinstance(module, HookPoint):
            yield name, module, ""
        elif has_forward(module):
            yield _dotted(name, SUFFIX), module, ""
        for parameter in used_parameters(module, census.root):
            yield _dotted(name, parameter, SUFFIX), module, f"@{parameter}.uses()"


def used_parameters(module: nn.Module, root: nn.Module) -> list[str]:
    """The parameters of `module` that a forward uses itself; see NOTE [Which parameters have a hook point]."""
    if not any([is_written(user) for user in users_of(module, root)]):
        return []
    first: dict[int, str] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None and re.fullmatch(r"\w+", name):
            first.setdefault(id(parameter), name)
    return [*first.values(), *parametrizations_of(module)]


def is_written(module: nn.Module) -> bool:
    """Whether the forward of `module` is not one of torch's own."""
    tap, forward = tap_of(module), vars(module).get("forward")
    if tap is not None and forward is tap.forward:
        forward = tap.previous
    if forward is not None:
        return True
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0] != "torch"


def _dotted(*parts: Any) -> str:
    return ".".join([part for part in parts if part])
