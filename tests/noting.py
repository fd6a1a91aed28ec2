"""A plugin of pytest: coverage notes for each line which tests run it. `make mutants` asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    import_module("coverage").Coverage.current().switch_context(item.nodeid)
    yield
