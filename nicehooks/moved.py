"""What is found under a name that no longer is, or never was, that of its file.

NOTE [Names in old pickles]
A pickle names the module and the name of each class and function in it. What is public says that it belongs to
`nicehooks`, `nicehooks.hookpoints` or `nicehooks.hooktrees`, so that pickles do not know of our files. Those that were
written before it did so name files that have moved since. Under each old name lies a module in `compat/old_names`,
where `nicehooks.__path__` leads Python after all others; what is asked of it is looked for in the files that there are.
Four of the old names are rooms now, which answer likewise. That is a file for each name, because Python asks a folder
for a file: one table of them would need a finder in `sys.meta_path`, or entries of its own in `sys.modules`, and to
import nicehooks touches neither.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

HOUSE = Path(__file__).parent


def belong_to(module: str, things: Iterable[Any]) -> None:
    """Makes our classes and functions say that they are of `module`; all errors are of `nicehooks.errors`."""
    for thing in things:
        ours = isinstance(thing, type | FunctionType) and thing.__module__.startswith("nicehooks.")
        if ours and thing.__module__ != "nicehooks.errors":
            thing.__module__ = module


def finder(old: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module called `old`: finds what the file of that name once held."""

    def find(name: str) -> Any:
        if not name.startswith("__") and not (HOUSE / old.rpartition(".")[2] / f"{name}.py").exists():
            for place, now in _places_of_old(old, name):
                found = getattr(importlib.import_module(place), now, find)
                if found is not find:
                    return found
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


def _places_of_old(old: str, name: str) -> Iterator[tuple[str, str]]:
    """The modules that may have what `old` called `name`, and what it is called there."""
    if (old, name) in RENAMED:
        module, _, now = RENAMED[old, name].rpartition(".")
        yield module, now
        return
    for pattern in (rf"^(class|def) {name}\b", rf"^{name}(:.*)? = "):
        for file in sorted(HOUSE.rglob("*.py")):
            if file.name != "__init__.py" and re.search(pattern, file.read_text("utf-8"), re.MULTILINE):
                yield ".".join(("nicehooks", *file.relative_to(HOUSE).with_suffix("").parts)), name


RENAMED = {
    ("nicehooks.listing", "describe"): "nicehooks.contexts.listing.describe",
    ("nicehooks.points", "Place"): "nicehooks.compat.transformer_lens.hook_point.HookPlace",
}
"""What has another name today, or whose name several files have."""
