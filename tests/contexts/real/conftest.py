"""A small random model of each architecture."""

from __future__ import annotations

from typing import Any

import pytest
from by_hooks import one_thread
from gallery.architectures import ARCHITECTURES, Architecture

threads = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(params=ARCHITECTURES)
def arch(request: Any) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def model(arch: Architecture) -> Any:
    return arch.build()
