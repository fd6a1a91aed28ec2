"""A context that cannot be entered as it is, or was left too early."""

from __future__ import annotations

from typing import Any

from nicehooks.errors import UnsupportedModule


def active_already(verb: str) -> str:
    """One object was entered twice."""
    return (
        f"this {verb}(…) is active already: one object is one intervention.\n"
        f"  To have it twice, make a second one: with {verb}(…), {verb}(…):\n"
        "  To use it again, leave it first."
    )


def empty(verb: str) -> str:
    """There is no site to act at."""
    return f"{verb}(model, …) was given an empty list of sites, perhaps by a filter. To select none, write False."


def checkpointed(context: Any) -> str:
    """Backward will run a region again in which the context acted."""
    return (
        f"{context} acted inside an activation-checkpointed region. Backward runs the forward of such a region again, "
        "and the intervention has to act there too: run backward inside the context."
    )


def recomputed(key: str) -> UnsupportedModule:
    """Backward runs a part of the model again, and nobody can tell which call of it this is."""
    return UnsupportedModule(
        f"{key!r}: activation checkpointing runs a part of the model again in backward, where it cannot be told which "
        "of several steps or calls this is. Turn checkpointing off, or choose all of them."
    )
