"""Hooks for hook points, and the hooks that a model has, point by point."""

from __future__ import annotations

from typing import NamedTuple


class Record(NamedTuple):
    """One hook of a model, beside the name of its hook point."""

    name: str
    dir: str
    hook: object
    is_permanent: bool
    level: int | None


def records(model, *args, **options):
    """The hooks of a model, point by point."""
    return [
        Record(name, handle.dir, handle.user_hook, handle.is_permanent, handle.context_level)
        for name, handles in model.list_hooks(*args, **options).items()
        for handle in handles
    ]


# --- hooks ---


def double(value, hook):
    return value * 2


def zero(value, hook):
    return value * 0


def look(value, hook):
    return None


def names_of(point):
    return [handle.hook.hook.__name__ for handle in point.fwd_hooks]
