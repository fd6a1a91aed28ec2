"""A module's parameters and buffers, which can be others in one thread or task while the model runs.

NOTE [A table that two threads read differently]
While a parameter port of a module is in use, the module's `_parameters` (or `_buffers`) is replaced by a dict with the
same entries, which shows the overrides that are open in the thread or task that reads: those of a forward that runs
there. So whatever a forward reads of its parameters, `self.weight`, `self.parameters()` or `self.state_dict()`, it
reads the other value; who asks outside of it, as optimizers and `to()` do, sees and changes the real tensors, and so
does `deepcopy`. Nothing is swapped in the model, so nothing can be left behind or be seen by another thread.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from nicehooks import torch_private_tensors
from nicehooks.core.exclusive import Exclusive
from nicehooks.core.sessions import Session

TABLES = ("_parameters", "_buffers")
_GONE: Any = object()
"""Stands for what a forward has taken out of a table."""


class Standing:
    """What stands in the place of one entry of a table for a session; a forward may put something else there."""

    __slots__ = ("session", "value")

    def __init__(self, session: Session, value: Any) -> None:
        self.session = session
        self.value = value


overrides_here: ContextVar[dict[int, dict[str, Standing]]] = ContextVar("nicehooks.overrides", default={})  # noqa: B039
"""What stands in each table, by its `id`, in the place of the entries of these names."""
NONE_OPEN: dict[str, Standing] = {}


@torch_private_tensors.traced_within_others_only
class Table(MutableMapping[str, Any], dict[str, Any]):  # pyright: ignore[reportGeneralTypeIssues]
    """A module's `_parameters` or `_buffers`; see NOTE [A table that two threads read differently].

    Everything that a dict can be asked, or told, comes down to the methods here. What a forward assigns or deletes
    where another value stands is done to that: the model's own is not touched, and is there again when it is over.
    """

    users: set[int]
    original: dict[str, Any]

    def _standing(self, name: Any) -> Standing | None:
        """What stands in the place of the entry called `name` here, if anything does."""
        overrides = NONE_OPEN if torch.compiler.is_compiling() else overrides_here.get().get(id(self), NONE_OPEN)
        found = overrides.get(name)
        return None if found is None or found.session.ended else found  # an interrupt may have left it open

    def __getitem__(self, name: str) -> Any:
        found = self._standing(name)
        if found is None:
            return dict.__getitem__(self, name)
        if found.value is _GONE:
            raise KeyError(name)
        return found.value

    def __contains__(self, name: object) -> bool:
        found = self._standing(name)
        return dict.__contains__(self, name) if found is None else found.value is not _GONE

    def __setitem__(self, name: str, value: Any) -> None:
        found = self._standing(name)
        if found is None:
            dict.__setitem__(self, name, value)
        else:
            found.value = value

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        found = self._standing(name)
        if found is None:
            dict.__delitem__(self, name)
        else:
            found.value = _GONE

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in dict.keys(self) if name in self])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def copy(self) -> dict[str, Any]:
        """What stands here, in a dict of its own; a view of the table would, in traced code, ask for itself again."""
        return {name: self[name] for name in self}

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def keys(self) -> Any:
        return self.copy().keys()

    def items(self) -> Any:
        return self.copy().items()

    def values(self) -> Any:
        return self.copy().values()

    def popitem(self) -> tuple[str, Any]:
        name = next(reversed(self), None)
        if name is None:
            raise KeyError("popitem(): dictionary is empty")
        return name, self.pop(name)

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Table:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (type(self.original), (), None, None, iter(list(dict.items(self))))


def stand_in(module: nn.Module, session: Session) -> None:
    """Puts tables in the place of the module's own, while `session` or another one uses them."""
    with Exclusive():
        for kind in TABLES:
            own = module.__dict__[kind]
            if not isinstance(own, Table):
                table = Table(own)
                table.users, table.original = set(), own
                module.__dict__[kind] = own = table
            own.users.add(session.number)


def step_back(module: nn.Module, session: Session) -> None:
    """Undoes `stand_in`; the last one puts the module's own tables back, with what was changed meanwhile."""
    with Exclusive():
        for kind in TABLES:
            table = module.__dict__[kind]
            if not isinstance(table, Table):
                continue
            table.users.discard(session.number)
            if not table.users:
                own = table.original
                if not _same(own, table):
                    own.clear()
                    own.update(dict.items(table))
                module.__dict__[kind] = own


def _same(own: dict[str, Any], table: dict[str, Any]) -> bool:
    pairs = zip(own.items(), dict.items(table), strict=True)
    return len(own) == dict.__len__(table) and all(a == b and old is new for (a, old), (b, new) in pairs)


def own_entries(module: nn.Module) -> dict[str, Any]:
    """The parameters and buffers of `module` itself, whatever stands in their place here."""
    tables = [module.__dict__[kind] for kind in TABLES]
    entries = [dict.items(table) if isinstance(table, Table) else table.items() for table in tables]
    return {name: value for items in entries for name, value in items}


def is_held(module: nn.Module, name: str) -> bool:
    """Whether `module` has a parameter or buffer called `name` now."""
    return any([table[name] is not None for table, name in held_in(module, name)])


def held_in(module: nn.Module, name: str) -> list[tuple[Any, str]]:
    """The tables of `module` that have `name`, with it."""
    return [(table, name) for kind in TABLES if name in (table := module.__dict__[kind])]
