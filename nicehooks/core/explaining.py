"""What is said where something is refused or did nothing: the core knows that it is so, the room of teaching why."""

from __future__ import annotations

import importlib
from typing import Any

_TEACHING = "nicehooks.teaching"


def explained(topic: str, *about: Any) -> Any:
    """What the function `topic`, as in `"nearest.nothing_matches"`, of the room of teaching has to say.

    That room is imported when it is first asked. It knows the core, so the core cannot import it.
    """
    file, _, function = topic.partition(".")
    return getattr(importlib.import_module(f"{_TEACHING}.{file}"), function)(*about)
