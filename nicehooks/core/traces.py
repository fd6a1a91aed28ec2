"""What a selection has looked at in a model, so that it need not be made again while that is as it was.

NOTE [Selections are remembered]
Selecting costs microseconds for each module, and most contexts are entered again and again on the same paths. So what
some paths have selected is kept beside the model, with a trace: every module that the walk has met, by a weak
reference, with its type, the children that it was asked for, and whether it had the ports that were wanted. To look
whether all of that still holds is cheap, and it is looked at every time: nobody has to say that a model has changed.
Nothing here keeps a module, a type or a value alive. What a function of the user's chooses is not remembered, nor what
is selected while methods are modules or while code is being traced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nicehooks.core.calling import has_forward, has_forward_by_type
from nicehooks.core.children import has_further
from nicehooks.core.register import PortKind, kind_of
from nicehooks.paths.ports import Port

Reference = Callable[[], Any]
MOST = 50_000
"""How many modules all traces of one model may have met together."""


class Trace:
    """What a selection has looked at."""

    def __init__(self) -> None:
        self._looked: list[tuple[Reference, Reference, Mapping[str, Reference | None], bool]] = []
        self._ports: list[tuple[Reference, Port, bool]] = []

    def __len__(self) -> int:
        return len(self._looked)

    def looked_at(self, module: nn.Module, *keys: str) -> None:
        """The module was there, of its type, and the children with these `keys` were looked up."""
        self._note(module, keys, whole=False)

    def looked_at_all(self, module: nn.Module) -> None:
        """The module was there, of its type, and all its children were looked at."""
        self._note(module, tuple(module._modules), whole=True)

    def _note(self, module: nn.Module, keys: tuple[str, ...], whole: bool) -> None:
        found = [(key, module._modules.get(key)) for key in keys]
        children = {key: child if child is None else weakref.ref(child) for key, child in found}
        self._looked.append((weakref.ref(module), weakref.ref(type(module)), children, whole))

    def asked(self, module: nn.Module, port: Port, answer: bool) -> None:
        """It was asked whether `module` has `port`; what its type alone has answered stays so."""
        kind = kind_of(port)
        by_type = kind.needs_forward and type(kind).is_on is PortKind.is_on and has_forward_by_type(module)
        if not by_type:
            self._ports.append((weakref.ref(module), port, answer))

    def holds(self) -> bool:
        """Whether all of it would be found again."""
        for reference, kind, children, whole in self._looked:
            module = reference()
            if type(module) is not kind():  # nor is that of None
                return False
            table = module.__dict__["_modules"]
            if whole and table and list(table) != list(children):
                return False
            for key, child in children.items():
                if table.get(key) is not (child and child()):
                    return False
        return all([has_port(reference(), port) is answer for reference, port, answer in self._ports])


NOTHING_LOOKED_AT = Trace()


def has_port(module: nn.Module | None, port: Port) -> bool:
    """Whether a site of `port` can be on `module`, if that is still there."""
    kind = kind_of(port)
    return module is not None and (has_forward(module) or not kind.needs_forward) and kind.is_on(module, port)


class _Memory:
    """The selections in one model, by what was written."""

    def __init__(self, model: nn.Module) -> None:
        number = id(model)
        self.model = weakref.ref(model, lambda _: _memories.pop(number, None))
        self.selections: dict[Any, tuple[Any, Trace]] = {}
        self.size = 0


_memories: dict[int, _Memory] = {}
"""By the `id` of the model, which need not be hashable."""


def is_remembering() -> bool:
    """Whether selections can be remembered now; see NOTE [Selections are remembered]."""
    return not torch.compiler.is_compiling() and not has_further()


def remembered(model: nn.Module, key: Any) -> Any:
    """What was selected in `model` under `key`, if it would be selected again; otherwise None."""
    memory = _memories.get(id(model))
    found = None if memory is None or memory.model() is not model else memory.selections.get(key)
    return found[0] if found is not None and found[1].holds() else None


def remember(model: nn.Module, key: Any, selected: Any, trace: Trace) -> None:
    """Keeps what was selected under `key`, until the model is another."""
    memory = _memories.get(id(model))
    if memory is None or memory.model() is not model:
        memory = _memories[id(model)] = _Memory(model)
    memory.size += len(trace) + 1
    if memory.size > MOST:
        memory.selections, memory.size = {}, len(trace) + 1
    memory.selections[key] = (selected, trace)
