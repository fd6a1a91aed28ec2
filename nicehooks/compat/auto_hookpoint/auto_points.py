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
from nicehooks.compat.transformer_lens.hooks import Direction, LensHandle, hooks_on
from nicehooks.compat.transformer_lens.points import HookPoint, Within
from nicehooks.core.selection import Census, Site, has_forward
from nicehooks.core.tap import tap_of
from nicehooks.errors import SiteNotFound
from nicehooks.paths.grammar import ModulePath, escape
from nicehooks.paths.ports import Port
from nicehooks.ports.uses import parametrizations_of, users_of

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
        path = ModulePath.parse(escape(name) + self._key)
        if dir == "bwd":
            path = replace(path, port=Port("use.grad", path.port.name) if self._key else Port("grad"))
        return Site(name, module, path, model, census.encoders_around(name))

    def _tapped(self) -> nn.Module:
        return next(users_of(self._module(), self._root())) if self._key else self._module()

    def _handles(self, dir: Direction) -> list[LensHandle]:
        key = f"{self._key}.grad" if dir == "bwd" and self._key else "@grad" if dir == "bwd" else self._key
        return [LensHandle(hook, hook.is_permanent, hook.level) for hook in hooks_on(self._tapped(), key, dir)]


def points_of(model: nn.Module, known: dict[str, AutoPoint]) -> dict[str, AutoPoint]:
    """The hook points that `model` has by now; one in `known` whose module is still there stays the same object."""
    points: dict[str, AutoPoint] = {}
    for name, module, key in places_of(model):
        point = known.get(name)
        points[name] = point if point is not None and point.is_at(module) else AutoPoint(model, module, name, key)
    return points


def places_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name of each hook point, with its module and what the path of its site has after the module's name.

    In the order of `named_modules`: each module, and then its own parameters.
    """
    census = Census(model)
    for name, module in census.unwrapped():
        if census.first[id(module)] != name or torch_private.is_scripted(module):
            continue
        if has_forward(module):
            yield _joined(name, SUFFIX), module, ""
        for parameter in used_parameters(module, census.root):
            yield _joined(name, parameter, SUFFIX), module, f"@{parameter}.uses()"


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


def _joined(*parts: Any) -> str:
    return ".".join([part for part in parts if part])
