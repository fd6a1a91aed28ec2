"""The other spellings of a site: the names of its module, and the position and the name of an argument."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from nicehooks.core.census import Census
from nicehooks.core.tap import tap_of
from nicehooks.paths.grammar import ModulePath
from nicehooks.values.trees import Chain


class Names:
    """Asks the model, if there is one and it still exists, under which other names it knows a module."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self, name: str) -> list[str]:
        model = self.model()
        return [] if model is None else Census(model).other_names(name)


NO_NAMES = Names()


def spellings_of(path: ModulePath, names: Names) -> Iterator[ModulePath]:
    """The other paths of the one site that `path` means, as far as the model can tell them.

    `@input[0]` is `@input['x']` where `x` is the first parameter of the module's forward.
    """
    each_name = [path, *(path.on(other) for other in names(path.plain_name))]
    yield from each_name[1:]
    parameters = _parameters(path, names)
    for one in each_name if parameters else ():
        chain = _respelled(one.chain, parameters)
        if chain is not None:
            yield replace(one, chain=chain)


def _parameters(path: ModulePath, names: Names) -> tuple[str, ...]:
    """The names of what the module of `path` can be passed by position, where the port of `path` is its arguments."""
    model = names.model() if path.port.is_of_arguments and path.chain else None
    module = None if model is None else Census(model).names.get(path.plain_name)
    tap = None if module is None else tap_of(module)
    return () if tap is None or not tap.parameters else tap.parameters[0]


def _respelled(chain: Chain, parameters: tuple[str, ...]) -> Chain | None:
    """`chain` with the name of an argument for its position, or the position for the name."""
    first, *rest = chain
    if isinstance(first, str):
        return (parameters.index(first), *rest) if first in parameters else None
    known = type(first) is int and 0 <= first < len(parameters)
    return (parameters[first], *rest) if known else None
