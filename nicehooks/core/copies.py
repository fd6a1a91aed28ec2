"""Copies of a tapped module, which are clean models.

NOTE [Copies of a tapped module]
`copy.deepcopy` and `pickle` ask the instance for `__reduce_ex__` before they ask its class, and `DataParallel` asks for
a replica likewise. A tapped module answers with what its class says, less the tap's own entries. Who has wrapped the
tap's forward may put it back when the tap is over, so where somebody has, these answers stay for as long as the tap is
held by anybody. `HANDLES` is a list of the attached hooks that nobody else holds: it is in the model itself, to end
with it.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import Any

from torch import nn

from nicehooks.core.tap import COPYING

HANDLES = "__nicehooks__"
"""The entry of a tapped module for handles that live as long as it does; see NOTE [Copies of a tapped module]."""


class Copying:
    """Answers in the place of a method of a tapped module that copies it; see NOTE [Copies of a tapped module]."""

    __slots__ = ("module", "previous", "tap")
    name = ""

    def __init__(self, tap: Any) -> None:
        self.module: weakref.ref[nn.Module] = tap.module
        self.tap = weakref.ref(tap, partial(_take_out, self.module, self.name))
        self.previous: Any = None  # one that stood in the instance's __dict__ before

    def come(self, names: dict[str, Any]) -> None:
        """Goes into the entries `names` of the module, next."""
        found = names.get(self.name)
        self.previous = None if found is self else found

    def leave(self, names: dict[str, Any]) -> None:
        """Goes out of them, unless its tap is over and somebody else has its forward."""
        tap: Any = self.tap()
        if names.get(self.name) is not self or not (tap.alive or sys.getrefcount(tap.forward) <= HELD_BY_TAP):
            return
        self.go(names)

    def go(self, names: dict[str, Any]) -> None:
        """Goes out of them, where it is: what stood there before stands there again."""
        if self.previous is None:
            del names[self.name]
        else:
            names[self.name] = self.previous
            self.previous = None

    def of_model(self, *args: Any) -> Any:
        """What the module answers without us."""
        module: Any = self.module()
        return getattr(type(module), self.name)(module, *args) if self.previous is None else self.previous(*args)

    def clean(self, state: dict[str, Any]) -> dict[str, Any]:
        """The entries of the module without ours, and with the forward in whose place ours stands."""
        tap: Any = self.tap()
        state = {name: value for name, value in state.items() if name not in ENTRIES and name != HANDLES}
        if tap is not None and state.get("forward") is tap.forward:
            del state["forward"]
            state |= {} if tap.previous is None else {"forward": tap.previous}
        # that may be of a tap which somebody has taken away and put back when it was over
        return self.previous.clean(state) if isinstance(self.previous, Copying) else state


HELD_BY_TAP = 3
"""How often a forward that nobody else has is referred to: in two entries of its tap, and by whoever counts."""


def _take_out(module: weakref.ref[nn.Module], name: str, tap: weakref.ref[Any]) -> None:
    """Takes what answers under `name` out of the module: its tap is no more."""
    names = getattr(module(), "__dict__", {})
    found = names.get(name)
    if isinstance(found, Copying) and found.tap is tap:
        found.go(names)


class Reduce(Copying):
    """For `copy` and `pickle`."""

    __slots__ = ()
    name = "__reduce_ex__"

    def __call__(self, protocol: Any) -> Any:
        reduced = self.of_model(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        return (*reduced[:2], self.clean(reduced[2]), *reduced[3:])


class Replicate(Copying):
    """For `DataParallel`, whose replicas have the entries of the module."""

    __slots__ = ()
    name = "_replicate_for_data_parallel"

    def __call__(self) -> Any:
        replica = self.of_model()
        replica.__dict__ = self.clean(replica.__dict__)
        return replica


COPYING.extend([Reduce, Replicate])
ENTRIES = frozenset([Reduce.name, Replicate.name])
"""What a tap puts into the `__dict__` of its module, beside its `forward`."""
