"""Parameters that have another value, in one thread or task, while the model runs.

NOTE [A table that two threads read differently]
While a parameter port of a module is in use, the module's `_parameters` (or `_buffers`) is replaced by a dict with the
same entries, which shows the overrides that are open in the thread or task that reads: those of a forward that runs
there. So whatever a forward reads of its parameters, `self.weight`, `self.parameters()` or `self.state_dict()`, it
reads the other value; who asks outside of it, as optimizers and `to()` do, sees and changes the real tensors, and so do
copies (`dict(table)`). Nothing is swapped in the model, so nothing can be left behind or be seen by another thread.
What a module keeps beside its tables, in its `__dict__` (the list of weights of an `nn.LSTM`, the weight that
`torch.nn.utils.weight_norm` computes), is handed to its own forward on a stand-in for the module.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.core.exclusive import Exclusive
from nicehooks.core.sessions import Session

TABLES = ("_parameters", "_buffers")
_MISSING: Any = object()
_overrides: ContextVar[dict[tuple[int, str], tuple[Session, Any]]] = ContextVar("nicehooks.overrides", default={})  # noqa: B039
_open_owners: ContextVar[frozenset[Any]] = ContextVar("nicehooks.open_overrides", default=frozenset())


class Table(dict[str, Any]):
    """A module's `_parameters` or `_buffers`; see NOTE [A table that two threads read differently]."""

    users: set[int]
    original: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if torch.compiler.is_compiling():
            return super().__getitem__(name)
        found = _overrides.get().get((id(self), name))
        # what an interrupt left open ends with its session
        return super().__getitem__(name) if found is None or found[0].ended else found[1]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def items(self) -> Any:
        # a new dict also in traced code: a view of this one would be made there by calling this method again
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return dict(self.items()).values()

    def __setitem__(self, name: str, value: Any) -> None:
        """What a forward assigns where another value stands goes with that: the model's own is not touched."""
        overrides = {} if torch.compiler.is_compiling() else _overrides.get()
        found = overrides.get((id(self), name))
        if found is None or found[0].ended:
            super().__setitem__(name, value)
        else:
            _overrides.set({**overrides, (id(self), name): (found[0], value)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (type(self.original), (), None, None, iter(list(super().items())))


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
                    own.update(table)
                module.__dict__[kind] = own


def _same(own: dict[str, Any], table: dict[str, Any]) -> bool:
    return list(own) == list(table) and all(a is b for a, b in zip(own.values(), dict(table).values(), strict=True))


class Override(AbstractContextManager[None]):
    """While it is entered, `places` hold `value` in this thread or task.

    Args:
        owner: whoever opens it; see `is_open`.
        places: modules and names of one tensor.
        value: the tensor that stands there instead; None leaves the places as they are.
    """

    def __init__(self, owner: Any, places: list[tuple[nn.Module, str]], value: Tensor | None) -> None:
        self.owner = owner
        self.places = [] if value is None else places
        self.value: Any = value

    @staticmethod
    def is_open(owner: Any) -> bool:
        """Whether `owner` has an override open around this line."""
        if torch.compiler.is_dynamo_compiling():
            return owner.is_swapped
        return (owner.session.number, owner.index) in _open_owners.get()

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            self.owner.is_swapped = True
            tables = [(module, kind) for module in self._modules() for kind in TABLES]
            self.attributes = Attributes(
                tables, [self._changed(module.__dict__[kind], module) for module, kind in tables]
            )
            self.attributes.__enter__()
            return
        self.before = (_overrides.get(), _open_owners.get())
        session = self.owner.session
        entries = {(id(table), name): (session, self.value) for place in self.places for table, name in _held(*place)}
        _overrides.set({**_overrides.get(), **entries})
        _open_owners.set(_open_owners.get() | {(session.number, self.owner.index)})
        self.marked = any([name in module._parameters for module, name in self.places]) and _takes_marks(self.value)
        if self.marked:
            self.value._is_param = True

    def _modules(self) -> list[nn.Module]:
        return list({id(module): module for module, _ in self.places}.values())

    def _changed(self, table: dict[str, Any], module: nn.Module) -> dict[str, Any]:
        """The entries of one of the tables of `module`, with the value."""
        names = [name for holder, name in self.places if holder is module and name in table]
        return {**dict(table.items()), **dict.fromkeys(names, self.value)}

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            self.owner.is_swapped = False
            self.attributes.__exit__()
            return
        if self.marked:
            del self.value._is_param
        overrides, owners = self.before
        _overrides.set(overrides)
        _open_owners.set(owners)


def _takes_marks(value: Any) -> bool:
    """Whether `isinstance` can be told to take it for an `nn.Parameter`, as who replaces one in torch does."""
    return type(value) is Tensor and not hasattr(value, "_is_param")


def is_held(module: nn.Module, name: str) -> bool:
    """Whether `module` has a parameter or buffer called `name` now."""
    return bool(_held(module, name))


def _held(module: nn.Module, name: str) -> list[tuple[Any, str]]:
    """The tables of `module` that have `name`, with it."""
    return [(table, name) for kind in TABLES if name in (table := module.__dict__[kind])]


class Attributes(AbstractContextManager[None]):
    """While traced code has it entered, each module in `places` has a value as a plain attribute of that name.

    What traced code does to attributes, and undoes, is its own: nothing of it is done when the code that was traced
    runs. Of a dict that it changes, and changes back, all entries would be written anew.
    """

    def __init__(self, places: list[tuple[nn.Module, str]], values: list[Any]) -> None:
        self.places = places
        self.values = values

    def __enter__(self) -> None:
        self.old = [module.__dict__.get(name, _MISSING) for module, name in self.places]
        for (module, name), value in zip(self.places, self.values, strict=True):
            module.__dict__[name] = value

    def __exit__(self, *_: object) -> None:
        for (module, name), old in zip(self.places, self.old, strict=True):
            if old is _MISSING:
                del module.__dict__[name]
            else:
                module.__dict__[name] = old


class StandIn(AbstractContextManager[nn.Module]):
    """A module like `module`, with `changes` in its `__dict__`, to run its forward on.

    What that forward assigns to its `self`, besides the attributes named `private`, goes to the real module when it is
    over.
    """

    def __init__(self, module: nn.Module, changes: dict[str, Any], private: tuple[str, ...] = ()) -> None:
        self.module = module
        self.changes = changes
        self.private = private

    def __enter__(self) -> nn.Module:
        if torch.compiler.is_dynamo_compiling():
            self.attributes = Attributes([(self.module, name) for name in self.changes], list(self.changes.values()))
            self.attributes.__enter__()
            return self.module
        self.other: nn.Module = object.__new__(type(self.module))
        self.standing = {**self.module.__dict__, **self.changes}
        self.other.__dict__.update(self.standing)
        return self.other

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            self.attributes.__exit__()
            return
        for name, value in self.other.__dict__.items():
            if value is not self.standing.get(name, _MISSING) and name not in self.private:
                self.module.__dict__[name] = value
