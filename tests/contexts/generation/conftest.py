"""The models, the ways and the prompts that generation is tried with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.architectures import ARCHITECTURES, gpt2, llama
from generating import PROMPTS, WAYS
from torch import Tensor

threads = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(params=["gpt2", "llama"])
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Any:
    torch.manual_seed(0)
    return {"gpt2": gpt2, "llama": llama}[name]().eval()


@pytest.fixture
def blocks(name: str) -> tuple[str, ...]:
    return ARCHITECTURES[name].blocks


@pytest.fixture(params=WAYS)
def way(request: Any) -> dict[str, Any]:
    return WAYS[request.param]


@pytest.fixture(params=PROMPTS)
def prompt(request: Any) -> dict[str, Tensor]:
    return PROMPTS[request.param]()
