"""The lock that is held while a context is entered or left, and what an interrupt leaves of it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, suppress
from typing import Any

from nicehooks import torch_private


class _Holding(threading.local):
    """The locks that this thread holds, or is about to."""

    def __init__(self) -> None:
        self.held: list[Any] = []


_here = _Holding()
_lock = threading.RLock()


class Exclusive(AbstractContextManager[None]):
    """Held by one thread while a context is entered or left; never while a model, or a function of the user, runs.

    NOTE [Interrupts]
    An interrupt may come between any two lines, and also behind the body of a `with`, where Python no longer calls
    `__exit__`. So a thread writes down what it is about to hold, and gives free what is left over when it next enters
    or leaves a context. Everything else that is undone is undone by whose it is, and not by counting: to undo it twice
    does no harm.

    Args:
        tracing: whether Dynamo must trace nothing meanwhile: what comes or goes would be half there for it.
    """

    __slots__ = ("locks",)

    def __init__(self, tracing: bool = False) -> None:
        self.locks: list[Any] = [*torch_private.tracing_lock(), _lock] if tracing else [_lock]

    def __enter__(self) -> None:
        for lock in self.locks:
            _here.held.append(lock)
            lock.acquire()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self.locks):
            lock.release()
            _here.held.pop()


def free_left_over() -> None:
    """Gives free what an interrupt has left this thread holding; see NOTE [Interrupts]."""
    while _here.held:
        with suppress(RuntimeError):  # it was not held yet, or no more
            _here.held.pop().release()
