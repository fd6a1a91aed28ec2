"""What the tests of hooks and of hook points start from."""

from __future__ import annotations

import pytest
import torch
from gallery.calling import CallsTwo
from gallery.toy import inputs, toy


@pytest.fixture
def net():
    torch.manual_seed(0)
    return CallsTwo()


@pytest.fixture
def model():
    return toy()


@pytest.fixture
def clean(model):
    return model(inputs())
