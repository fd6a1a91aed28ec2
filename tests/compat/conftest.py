"""What the tests of hooks and of hook points start from."""

from __future__ import annotations

import pytest
import torch
from hookpoint_models import inputs, toy
from nice_hooks_models import Net


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def model():
    return toy()


@pytest.fixture
def clean(model):
    return model(inputs())
