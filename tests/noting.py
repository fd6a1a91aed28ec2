"""A plugin of pytest: coverage notes for each line which tests run it. `make mutants` asks for it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from importlib import import_module

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    import_module("coverage").Coverage.current().switch_context(item.nodeid)
    tracer = sys.gettrace()
    done = yield
    if sys.gettrace() is not tracer:
        pytest.exit(f"{item.nodeid} has ended coverage: it sets a tracer, and does not set this one again", 1)
    return done
