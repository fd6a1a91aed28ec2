"""Parts of the anatomy, read from a cache that is to have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nicehooks.anatomies.body import Anatomy
from nicehooks.anatomies.parts import Part
from nicehooks.caches.cache import ActivationCache
from nicehooks.errors import NotCaptured, TreeMismatch
from nicehooks.values.trees import structure_of


def reader_of(body: Anatomy, cache: Mapping[Any, Any], who: str, parts: Sequence[Part]) -> Callable[[Part], Tensor]:
    """A function that reads a part from `cache`, which has all `parts`."""
    acts = cache if isinstance(cache, ActivationCache) else ActivationCache({str(key): cache[key] for key in cache})
    missing = [part.what for part in parts if part not in acts]
    if missing:
        shown = ", ".join(missing[:3]) + (f", … {len(missing) - 3} more" if len(missing) > 3 else "")
        raise NotCaptured(MISSING.format(who=who, shown=shown, line=_capture_line(body, parts)))

    def read(part: Part) -> Tensor:
        value = acts[part]
        if not isinstance(value, Tensor):
            raise TreeMismatch(
                f"{who} takes one tensor per part, but {part.what} is {structure_of(value)} in this cache."
            )
        return value

    return read


def _capture_line(body: Anatomy, parts: Sequence[Part]) -> str:
    """What to write into `capture(model, …)` to have `parts`."""
    layers: dict[str, list[str]] = {}
    for part in parts:
        layers.setdefault(part.what.partition("[")[0], []).append(part.what)
    shown = [[what] if len(each) == body.n_layers else each for what, each in layers.items()]
    return ", ".join(f"parts.{what}" for each in shown for what in each)


MISSING = (
    "{who} reads what is not in this cache: {shown}. Capture it in the same run:\n"
    "    parts = anatomy(model)\n"
    "    with capture(model, {line}) as cache:\n"
    "        model(…)"
)
