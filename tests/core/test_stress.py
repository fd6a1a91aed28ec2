"""All laws at once: random stacks of interventions, in any order and thread, against the one in `reference.py`."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings
from stress import Stress

LONG = int(os.environ.get("NICEHOOKS_STRESS", "1"))
"""How many times as many examples, of twice as many steps: `NICEHOOKS_STRESS=50 pytest tests/core/test_stress.py`."""


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Each example collects garbage: what was there before is left out."""
    gc.collect()
    gc.freeze()  # for good, as in conftest.py: `unfreeze` would be of all that was ever frozen


TestStress = Stress.TestCase
TestStress.settings = settings(
    max_examples=40 * LONG,
    stateful_step_count=25 if LONG == 1 else 60,
    derandomize=LONG == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
