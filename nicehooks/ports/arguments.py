"""The port `@input`: the arguments of a module, however the caller passed them."""

from __future__ import annotations

from typing import Any

from torch import nn

from nicehooks.core.frames import Frame
from nicehooks.core.register import Pairs, PortKind, register_port
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.paths.ports import Port, Words
from nicehooks.values.trees import Chain, is_same


class InputRule(SiteRule):
    """The arguments of a module, as an `Arguments`."""

    __slots__ = ()
    reusable = True

    def before(self, frame: Frame) -> None:
        self.number(frame)
        names, defaults = frame.tap.parameters
        arguments = arguments_of(names, frame.args, frame.kwargs)
        complete(arguments, self.chain, names, defaults)
        changed = self.through(frame, arguments, by_name(self.chain, names))
        if not is_same(changed, arguments):
            frame.args, frame.kwargs = written_back(names, frame.args, frame.kwargs, arguments, changed)

    def after(self, frame: Frame) -> None:
        pass


class Arguments(dict[Any, Any]):
    """The arguments of a call by parameter name, in the order of the signature; `arguments[0]` is the first.

    What the signature does not name (`*args`) is known by its position.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key not in self:
            return list(self.values())[key]
        return super().__getitem__(key)


def arguments_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call of a function whose parameters have `names`."""
    given: dict[Any, Any] = {names[i] if i < len(names) else i: value for i, value in enumerate(args)}
    given.update((name, kwargs[name]) for name in names if name in kwargs)
    given.update((name, value) for name, value in kwargs.items() if name not in given)
    return Arguments(given)


def by_name(chain: Chain, names: tuple[str, ...]) -> Chain:
    """`chain`, with the name of the parameter for its position."""
    first = chain[0] if chain else None
    return (names[first], *chain[1:]) if isinstance(first, int) and 0 <= first < len(names) else chain


def complete(arguments: Arguments, chain: Chain, names: tuple[str, ...], defaults: dict[str, Any]) -> None:
    """Adds the default of the argument that `chain` names, where the caller did not pass it."""
    name = by_name(chain, names)[0] if chain else None
    if isinstance(name, str) and name not in arguments and name in defaults:
        arguments[name] = defaults[name]


def written_back(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], old: Arguments, new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments, with what has changed put where the caller had put the old ones."""
    positional = list(args)
    by_name: dict[Any, Any] = dict(kwargs)
    for name, value in new.items():
        position = name if isinstance(name, int) else names.index(name) if name in names else len(args)
        if name in by_name or position >= len(args):
            if name not in old or not is_same(value, old[name]) or name in by_name:
                by_name[name] = value
        else:
            positional[position] = value
    return tuple(positional), by_name


class InputPort(PortKind):
    """`@input`: the arguments of a module."""

    kind = shown = "input"
    is_of_arguments = True

    def read(self, words: Words) -> Port | None:
        return Port(self.kind) if words.name == self.kind and not words.has_brackets else None

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        return [(site.module, InputRule(site, action, when))]


register_port(InputPort())
INPUT = Port(InputPort.kind)
