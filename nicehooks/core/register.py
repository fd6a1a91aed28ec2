"""The register of ports: what the core asks of a kind of port, whichever it is.

A port is one file in the room of ports. It says how the port is written (`Spelling`), which modules have it, and which
rules reach it; a rule says what it needs for as long as its session lasts (`Companion`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from nicehooks.paths.ports import Port, Spelling, add_spelling, all_spellings, spelling_of

if TYPE_CHECKING:
    from nicehooks.core.rules import Action
    from nicehooks.core.selection import Site
    from nicehooks.core.sessions import Session
    from nicehooks.core.when import When

Pairs = list[tuple[nn.Module, Any]]
"""Rules, each with the module whose tap it belongs to."""


class PortKind(Spelling):
    """One kind of port: how it is written, which modules have it, and which rules reach it.

    Attributes:
        needs_forward: whether only a module that can be called has such a port.
    """

    needs_forward = True

    def is_on(self, module: nn.Module, port: Port) -> bool:
        """Whether `module` has the port, beside a forward if that is needed."""
        return True

    def missing(self, name: str, module: nn.Module, port: Port) -> str | None:
        """Why the module called `name` does not have the port; None if it is only that nothing calls it."""
        return None

    def listed(self, module: nn.Module) -> list[Port]:
        """The ports of this kind that a list of what `module` has should name."""
        return []

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        """The rules that bring the values at `site` to `action`."""
        raise NotImplementedError  # abstract: every kind has its own

    def rules_for_all(self, site: Site, action: Action) -> Pairs:
        """The rules for all values of this kind in the module of `site`, each under a key of its own; for listing."""
        return []


class Companion:
    """What some rules need for as long as their session lasts; one object for all rules of a plan that name its class.

    Ending undoes as much as was begun, and may be done twice: an interrupt may come at any line.
    """

    def __init__(self, rules: list[Any]) -> None:
        self.rules = rules

    def begin(self, session: Session) -> None:
        """Before the rules act."""

    def end(self, session: Session) -> None:
        """After they acted last."""

    def moved(self) -> list[Any]:
        """Those of its rules whose place in the model is another one than when they were made."""
        return []


Around = Callable[[list[Any], nn.Module, bool], Pairs]
"""From the sites of an intervention, its root model, and whether steps or calls matter, to rules around the sites."""

_around: list[Around] = []


def add_around(rules: Around) -> None:
    """Adds what finds rules that stand around sites: they note or prevent something, and bring no value anywhere."""
    _around.append(rules)


def rules_around(sites: list[Any], root: nn.Module, counting: bool) -> Pairs:
    """The rules that stand around `sites`."""
    return [pair for rules in _around for pair in rules(sites, root, counting)]


def register_port(kind: PortKind) -> None:
    """Puts a kind of port into the register."""
    add_spelling(kind)


def kind_of(port: Port) -> PortKind:
    """The entry of the register for `port`."""
    return spelling_of(port)


def every_kind() -> list[PortKind]:
    """All kinds of ports."""
    return all_spellings()
