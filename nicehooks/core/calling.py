"""Whether a module is ever called: whether it has a forward, and whether calling it runs that."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from nicehooks import torch_private


def has_forward(module: nn.Module) -> bool:
    """Whether `module` can be called at all; a `ModuleList` cannot."""
    if torch_private.is_scripted(module):
        return True
    return type(module).forward is not torch_private.no_forward or "forward" in vars(module)


def own_call(module: nn.Module) -> str | None:
    """The class whose `__call__` runs when `module` is called, and never gets to `forward`; None where it may.

    A `__call__` may get there if it names `forward`, or what PyTorch calls on the way, or `super`: itself, or in a
    function that it calls by name. What is no plain function may do anything, so nothing is said of it.
    """
    kind = type(module)
    owner = next(base for base in kind.__mro__ if "__call__" in vars(base))
    if owner is nn.Module:
        return None
    return None if _may_get_to_forward(vars(owner)["__call__"], module, set()) else owner.__name__


ON_THE_WAY = frozenset(("forward", "super", "__call__", *torch_private.CALLS_OF_MODULE))


def _may_get_to_forward(function: Any, module: nn.Module, seen: set[CodeType]) -> bool:
    if not isinstance(function, FunctionType):
        return True
    if function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = set(_names_in(function.__code__))
    if names & ON_THE_WAY:
        return True
    called = [*inspect.getclosurevars(function).nonlocals.values(), *(_called(n, function, module) for n in names)]
    return any([_may_get_to_forward(other, module, seen) for other in called if _is_function(other)])


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | nn.Module)


def _names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in `code`, and in the functions that are made in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str):  # getattr(self, "forward")
            yield constant


def _called(name: str, function: FunctionType, module: nn.Module) -> Any:
    """What `name` in `function` may call with the module at hand: a method, an attribute, a function; or None."""
    if name in vars(module):
        return vars(module)[name]
    for base in type(module).__mro__:
        if base is not nn.Module and name in vars(base):
            return vars(base)[name]
    return function.__globals__.get(name)
