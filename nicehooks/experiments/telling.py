"""How far an experiment is, told while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Telling = bool | Callable[[int, int], None]
"""Whether to show how far an experiment is on stderr; or a function of what is done and of how much there is."""

Tell = Callable[[int, int], None]


def teller(progress: Telling, what: str) -> Tell:
    """What is told how much is done, and how much there is."""
    return _shown_on_stderr(what) if progress is True else progress or _not_shown


def _not_shown(done: int, count: int) -> None:
    pass


def _shown_on_stderr(what: str) -> Tell:
    start = time.perf_counter()

    def show(done: int, count: int) -> None:
        rate = done / max(time.perf_counter() - start, 1e-9)
        end = "\n" if done == count else ""
        print(f"\r{what}: {done} of {count}, {rate:.3g}/s", end=end, file=sys.stderr, flush=True)

    return show
