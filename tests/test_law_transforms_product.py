"""Law 5 as a product: every transform × every intervention × models of every kind; see `transform_product.py`."""

from __future__ import annotations

import pytest
import torch
from transform_product import (
    BATCH,
    CALLERS,
    EXAMPLES,
    INTERVENTIONS,
    SUBJECTS,
    TRANSFORMS,
    reference,
    subject,
)

from nicehooks import capture


def close(a, b, name="mlp"):
    """Models are in double precision, but Llama norms in single."""
    if isinstance(a, tuple):
        return all(close(x, y, name) for x, y in zip(a, b, strict=True))
    tolerance = 1e-4 if name == "llama" else 1e-8
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_examples_and_plain_autograd(transform, intervention, name, caller):
    program = INTERVENTIONS[intervention](subject(name), caller)
    expected = TRANSFORMS[transform].by_hand(reference(name, intervention, caller))
    with program.around():
        found = TRANSFORMS[transform].of(program.of)
    assert close(found, expected, name)
    assert all("forward" not in vars(module) for module in subject(name).model.modules())
