"""torchao: quantised weights are tensors of a kind of their own, whose numbers an intervention sees dequantised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from nicehooks import ablate, capture, describe, edit, patch

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU())
    quantize_(model, Int8WeightOnlyConfig())
    return model


def test_values(model):
    clean = model(X)
    with capture(model, "**") as acts:
        assert torch.equal(model(X), clean)
    with ablate(model, "1[:, 3]"):
        assert not model(X)[:, 3].any()
    assert list(acts) == ["0", "1", "2", ""] and torch.equal(model(X), clean) and not describe(model)


def by_hand(model, weight):
    return functional.linear(model[0](X), weight, model[1].bias).relu()


def test_a_weight_is_changed_in_its_dequantised_numbers(model):
    clean, original = model(X), model[1].weight
    weight = original.dequantize()
    with patch(model, "1@weight", torch.zeros(16, 16)):
        assert torch.allclose(model(X), by_hand(model, torch.zeros(16, 16)), atol=1e-5)
    with ablate(model, "1@weight[3]"):
        assert torch.allclose(model(X)[:, 3], model[1].bias[3].relu().expand(3), atol=1e-5)
    with edit(model, "1@weight", lambda value: value * 2):
        assert torch.allclose(model(X), by_hand(model, weight * 2), atol=1e-5)
    with capture(model, "1@weight") as acts:
        model(X)
    assert acts["1@weight"] is original and model[1].weight is original and torch.equal(model(X), clean)
