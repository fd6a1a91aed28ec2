"""The parameters of any function, also of one in C: by which names a path finds the arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_testing_overrides

from nicehooks import torch_private, torch_private_tensors
from nicehooks.core.tap import parameters_of
from nicehooks.torch_private_tensors import REQUIRED, Parameter

Parameters = tuple[tuple[str, ...], dict[str, Any]]
"""The names that can be passed by position, in order, and the defaults of all."""


def parameters_in_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parameters:
    """The parameters of `function`, of the overload that takes `args` and `kwargs` if there are several.

    >>> import torch
    >>> parameters_in_call(torch.matmul, (torch.ones(2), torch.ones(2)), {})
    (('input', 'other'), {})

    The tensor that a method belongs to is `input`, as in the function of the same name.
    """
    if isinstance(function, partial):  # a method, in code that is being traced
        names, defaults = parameters_in_call(function.func, (*function.args, *args), kwargs)
        return names[len(function.args) :], defaults
    if torch.compiler.is_dynamo_compiling():
        named = {name: _shown(value) for name, value in kwargs.items()}
        return _parameters_while_tracing(inspect.unwrap(function), [_shown(value) for value in args], named)
    if isinstance(function, MethodType | nn.Module):  # not remembered itself: it keeps its object alive
        plain: Any = function.__func__ if isinstance(function, MethodType) else type(function).forward
        names, defaults = _of_signature(plain) or ((), {})
        return names[1:], defaults
    function = inspect.unwrap(function)
    return _of_signature(function) or _of_schema(function, args, kwargs) or _of_overrides(function) or ((), {})


def _shown(value: Any) -> Any:
    """What Dynamo knows of an argument while it traces: constants, and the kind of the rest."""
    if isinstance(value, Tensor):
        return Tensor
    return value if value is None or isinstance(value, bool | int | float | str) else object


@torch_private.evaluated_while_tracing
def _parameters_while_tracing(function: Any, args: list[Any], kwargs: dict[str, Any]) -> Parameters:
    """`parameters_in_call`, told only where the tensors are."""
    tensor = torch.empty(0)
    given = tuple([tensor if value is Tensor else value for value in args])
    return parameters_in_call(function, given, {k: tensor if v is Tensor else v for k, v in kwargs.items()})


@lru_cache(maxsize=1024)
def _of_signature(function: Any) -> Parameters | None:
    try:
        return _named(inspect.signature(function))
    except (TypeError, ValueError):  # a function in C
        return None


@lru_cache(maxsize=1024)
def _of_overrides(function: Any) -> Parameters | None:
    """As torch's own table of what can be overridden says: for operators, which have no schema (and take no `out`)."""
    try:
        example = get_testing_overrides().get(function)
    except TypeError:  # cannot be looked up
        return None
    if example is None:
        return None
    names, defaults = _named(inspect.signature(example))
    return tuple([name for name in names if name != "out"]), {k: v for k, v in defaults.items() if k != "out"}


def _named(signature: inspect.Signature) -> Parameters:
    names, defaults = parameters_of(signature)
    return tuple(["input" if name == "self" else name for name in names]), defaults


def _of_schema(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parameters | None:
    found = _overloads(getattr(function, "__name__", ""), inspect.ismethoddescriptor(function))
    fitting = next((parameters for parameters in found if _fits(parameters, args, kwargs)), None)
    if fitting is None:
        return None
    by_position = [parameter for parameter in fitting if not parameter.by_name]
    spread = [i for i, p in enumerate(by_position) if len(args) > i + 1 and _is_spread(p, args[i])]
    names = [parameter.name for parameter in by_position[: spread[0] if spread else None]]
    return tuple(names), {p.name: p.default for p in fitting if p.default is not REQUIRED}


@lru_cache(maxsize=1024)
def _overloads(name: str, method: bool) -> list[list[Parameter]]:
    """The overloads of a function; a method has its tensor first: `x.where(condition, other)`."""
    found = torch_private_tensors.overloads(name)
    return [sorted(parameters, key=lambda p: p.name != "input") for parameters in found] if method else found


def _fits(parameters: Sequence[Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an overload with `parameters` takes these arguments."""
    by_position = [parameter for parameter in parameters if not parameter.by_name]
    given = dict(zip([parameter.name for parameter in by_position], args, strict=False)) | kwargs
    known = {parameter.name: parameter for parameter in parameters}
    missing = any(p.default is REQUIRED and p.name not in given for p in parameters)
    if missing or not given.keys() <= known.keys():
        return False
    spread = any(_is_spread(parameter, given[parameter.name]) for parameter in by_position if parameter.name in given)
    return (spread or len(args) <= len(by_position)) and all(_takes(known[name], given[name]) for name in given)


def _takes(parameter: Parameter, value: Any) -> bool:
    if isinstance(value, Tensor):
        return parameter.kind in ("Tensor", "Optional[Tensor]", "number")
    return parameter.kind != "Tensor" and (value is not None or parameter.kind.startswith("Optional"))


def _is_spread(parameter: Parameter, value: Any) -> bool:
    """Whether a list is passed as so many arguments: `x.view(2, 3)`."""
    return "List[" in parameter.kind and isinstance(value, int)
