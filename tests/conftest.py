"""What all tests share: small models, and the worlds in which a law has to hold."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

with warnings.catch_warnings():  # torch's own module for jvp uses its own deprecated torch.jit.script when it is loaded
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp  # noqa: F401


@pytest.fixture
def fresh_dynamo():
    """Nothing is compiled yet, and no graph is counted."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def pytest_collection_modifyitems(items):
    """Slow tests are in the same run, but last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
