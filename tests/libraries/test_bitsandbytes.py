"""bitsandbytes: what a quantised layer computes is a value like others; its packed weight is not."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from nicehooks import UnsupportedModule, ablate, capture, describe, edit, patch

LAYERS = {
    "8 bit": lambda: bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False),
    "4 bit": lambda: bnb.nn.Linear4bit(16, 16, compute_dtype=torch.float32),
}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LAYERS)
def model(request):
    torch.manual_seed(0)
    full = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), LAYERS[request.param](), nn.ReLU())
    model[1].load_state_dict(full.state_dict())
    model.to("cpu")(X)  # packed with the first call
    return model


def test_values_and_gradients(model):
    clean = model(X)
    with capture(model, "**") as acts:
        assert torch.equal(model(X), clean)
    assert list(acts) == ["0", "1", "2", ""]
    with ablate(model, "1[:, 3]"):
        assert not model(X)[:, 3].any()
    with patch(model, "1@input[0]", torch.zeros(16)):
        assert torch.allclose(model(X), model[1].bias.relu().to(clean.dtype).expand(3, 16), atol=1e-2)
    with capture(model, "1@grad", "0@grad") as acts:
        model(X.clone().requires_grad_()).sum().backward()
    assert acts["0@grad"].any()
    with patch(model, "1@bias", 0.0):
        assert not torch.equal(model(X), clean)
    assert torch.equal(model(X), clean) and not describe(model)


@pytest.mark.parametrize("verb", ["patch", "edit", "ablate"])
def test_a_packed_weight_is_refused_and_stays(model, verb):
    clean, before = model(X), {name: value.clone() for name, value in model.state_dict().items()}
    context = {
        "patch": lambda: patch(model, "1@weight", torch.zeros(16, 16)),
        "edit": lambda: edit(model, "1@weight", lambda weight: weight * 0),
        "ablate": lambda: ablate(model, "1@weight"),
    }[verb]()
    with pytest.raises(UnsupportedModule, match=r"'1@weight' is a .* packed in a form of its own"):
        with context:
            model(X)
    assert torch.equal(model(X), clean) and not describe(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
