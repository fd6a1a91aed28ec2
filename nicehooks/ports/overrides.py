"""What stands in the place of parameters, and of what a module keeps beside them, while it runs.

For parameters see NOTE [A table that two threads read differently]. What a module keeps beside its tables, in its
`__dict__` (the list of weights of an `nn.LSTM`, the weight that `torch.nn.utils.weight_norm` computes), is handed to
its own forward on a stand-in for the module.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.ports.tables import NONE_OPEN, TABLES, Standing, held_in, overrides_here

_NO_ENTRY: Any = object()
_open_owners: ContextVar[frozenset[Any]] = ContextVar("nicehooks.open_overrides", default=frozenset())


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
        self.free = [(module, name) for module, name in self.places if name not in module.__dict__]
        if torch.compiler.is_dynamo_compiling():
            self.owner.is_swapped = True
            self.tables = self._tables()
            places = [(module, kind) for module, kind, _ in self.tables]
            self.attributes = Attributes(places, [other for _, _, other in self.tables])
            self.attributes.__enter__()
            return
        self.before = (overrides_here.get(), _open_owners.get())
        session = self.owner.session
        opened = dict(overrides_here.get())
        for table, name in [held for place in self.places for held in held_in(*place)]:
            opened[id(table)] = {**opened.get(id(table), NONE_OPEN), name: Standing(session, self.value)}
        overrides_here.set(opened)
        _open_owners.set(_open_owners.get() | {(session.number, self.owner.index)})
        self.marked = any([name in module._parameters for module, name in self.places]) and _takes_marks(self.value)
        if self.marked:
            self.value._is_param = True

    def _tables(self) -> list[tuple[nn.Module, str, dict[str, Any]]]:
        """In traced code: the modules that hold it, in which of their tables, and its entries with the value."""
        found: list[tuple[nn.Module, str, dict[str, Any]]] = []
        for module in {id(module): module for module, _ in self.places}.values():
            for kind in TABLES:
                table = module.__dict__[kind]
                names = [name for holder, name in self.places if holder is module and name in table]
                if names:
                    found.append((module, kind, {**table.copy(), **dict.fromkeys(names, self.value)}))
        return found

    def _keep_the_rest(self, module: nn.Module, own: dict[str, Any], other: dict[str, Any]) -> None:
        """What traced code has done to the other entries of `other`, which stood for the table `own`, is done there."""
        names = [name for holder, name in self.places if holder is module]
        for name in [name for name in own if name not in other and name not in names]:
            del own[name]
        for name, value in other.items():
            if name not in names and own.get(name, _NO_ENTRY) is not value:
                own[name] = value

    def __exit__(self, *_: object) -> None:
        for module, name in self.free:  # where it was no parameter to `isinstance`, and the forward assigned it
            if name in module.__dict__:
                del module.__dict__[name]
        if torch.compiler.is_dynamo_compiling():
            self.owner.is_swapped = False
            self.attributes.__exit__()
            for module, kind, other in self.tables:
                self._keep_the_rest(module, module.__dict__[kind], other)
            return
        if self.marked:
            del self.value._is_param
        overrides, owners = self.before
        overrides_here.set(overrides)
        _open_owners.set(owners)


def _takes_marks(value: Any) -> bool:
    """Whether `isinstance` can be told to take it for an `nn.Parameter`, as who replaces one in torch does."""
    return type(value) is Tensor and not hasattr(value, "_is_param")


class Attributes(AbstractContextManager[None]):
    """While traced code has it entered, each module in `places` has a value as a plain attribute of that name.

    What traced code does to attributes, and undoes, is its own: nothing of it is done when the code that was traced
    runs. Of a dict that it changes, and changes back, all entries would be written anew.
    """

    def __init__(self, places: list[tuple[nn.Module, str]], values: list[Any]) -> None:
        self.places = places
        self.values = values

    def __enter__(self) -> None:
        self.old = [module.__dict__.get(name, _NO_ENTRY) for module, name in self.places]
        for (module, name), value in zip(self.places, self.values, strict=True):
            module.__dict__[name] = value

    def __exit__(self, *_: object) -> None:
        for (module, name), old in zip(self.places, self.old, strict=True):
            if old is _NO_ENTRY:
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
            if value is not self.standing.get(name, _NO_ENTRY) and name not in self.private:
                self.module.__dict__[name] = value
