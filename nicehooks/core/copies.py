"""Copies of a tapped module, which are clean models.

NOTE [Copies of a tapped module]
`copy.deepcopy` and `pickle` ask the instance for `__reduce_ex__` before they ask its class, and `DataParallel` asks for
a replica likewise. A tapped module answers with what its class says, less the tap's own entries. One of these,
`HANDLES`, is a list of the attached hooks that nobody else holds: it is in the model itself, to end with it.
"""

from __future__ import annotations

import weakref
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
        self.tap = weakref.ref(tap)
        self.previous: Any = None  # one that stood in the instance's __dict__ before

    def of_model(self, *args: Any) -> Any:
        """What the module answers without us."""
        module: Any = self.module()
        return getattr(type(module), self.name)(module, *args) if self.previous is None else self.previous(*args)

    def clean(self, state: dict[str, Any]) -> dict[str, Any]:
        """The entries of the module without ours, and with the forward in whose place ours stands."""
        tap: Any = self.tap()
        state = {name: value for name, value in state.items() if name not in ENTRIES and name != HANDLES}
        return state if tap is None or tap.previous is None else {**state, "forward": tap.previous}


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
ENTRIES = frozenset([Reduce.name, Replicate.name, "forward"])
"""What a tap puts into the `__dict__` of its module."""
