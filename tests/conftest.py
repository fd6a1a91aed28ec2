"""What all tests share: small models, and the worlds in which a law has to hold."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
