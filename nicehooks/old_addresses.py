"""Where pickles of before look for what they hold: the modules in which it was defined when they were written."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

MOVED: dict[str, dict[str, str]] = {
    "nicehooks.activations": {"ActivationCache": "nicehooks.caches.cache"},
    "nicehooks.seen": {"Calls": "nicehooks.caches.watching"},
    "nicehooks.arguments": {"Arguments": "nicehooks.ports.arguments"},
    "nicehooks.regions": dict.fromkeys(("STAR", "Heads", "Rows"), "nicehooks.values.regions"),
    "nicehooks.trees": {"KEEP": "nicehooks.values.trees"},
}
"""What has moved out of each module that is no more, and where to."""


class _Moved(ModuleType):
    """Stands for a module that is no more, and knows where its names are now."""

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(importlib.import_module(MOVED[self.__name__][name]), name)
        except KeyError:
            raise AttributeError(f"{self.__name__} is no module any more, and had no {name!r} that is kept") from None


def keep_old_addresses() -> None:
    """Lets pickles of before find what they hold; nobody else needs to look there."""
    for name in MOVED:
        sys.modules.setdefault(name, _Moved(name))
