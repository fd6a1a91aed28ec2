"""A module whose class has a `__call__` of its own, which never gets to its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from nicehooks import torch_private_tensors


def own_call(name: str, module: nn.Module) -> str | None:
    """That nothing can be done with `module` at a forward that its class never calls, if that is so."""
    owner = _owner_of_call(module)
    return None if owner is None else OWN_CALL.format(name=name, kind=type(module).__name__, owner=owner)


OWN_CALL = (
    "{name!r} is a {kind}, and calling it runs {owner}.__call__, which never gets to forward: nothing can be "
    "captured or changed there.\n"
    "  Rename {owner}.__call__ to forward, or select the modules in it."
)


def _owner_of_call(module: nn.Module) -> str | None:
    """The class whose `__call__` runs when `module` is called, and never gets to `forward`; None where it may.

    A `__call__` may get there if it names `forward`, or what PyTorch calls on the way, or `super`: itself, or in a
    function that it calls by name. What is no plain function may do anything, so nothing is said of it.
    """
    kind = type(module)
    owner = next(base for base in kind.__mro__ if "__call__" in vars(base))
    if owner is nn.Module:
        return None
    return None if _may_get_to_forward(vars(owner)["__call__"], module, set()) else owner.__name__


ON_THE_WAY = frozenset(("forward", "super", "__call__", *torch_private_tensors.CALLS_OF_MODULE))


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
