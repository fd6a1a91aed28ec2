"""What all tests share: small models, and the worlds in which a law has to hold."""

from __future__ import annotations

import gc
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process per core already; read when torch is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

# No test times anything: a busy machine is no failure.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

with warnings.catch_warnings():  # torch's own module for jvp uses its own deprecated torch.jit.script when it is loaded
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp  # noqa: F401


@pytest.fixture
def fresh_dynamo():
    """Nothing is compiled yet, and no graph is counted."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def pytest_collection_finish() -> None:
    """What is imported by then is not looked through again and again for garbage."""
    gc.collect()
    gc.freeze()
