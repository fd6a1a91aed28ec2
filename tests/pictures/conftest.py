"""One browser for all tests of pages of a process."""

from __future__ import annotations

from collections.abc import Iterator

import browser as chromium
import pytest


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if not chromium.installed():
        pytest.skip(chromium.NO_BROWSER)
    with chromium.started(tmp_path_factory.mktemp("profile")) as started:
        yield started
