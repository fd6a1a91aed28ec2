"""What differs on an accelerator: autograd's own threads, other devices, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from gallery.checkpointed import Checkpointed
from worlds import inputs, make, total

from nicehooks import ablate, capture, edit, patch, steer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gradients(reentrant, context):
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant).cuda(), inputs().cuda().requires_grad_()
    with context(model) as acts:
        total(model(x)).backward()
    return x.grad, acts


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "context",
    [
        lambda model: edit(model, "inner.1", lambda value: value * 2),
        lambda model: edit(model, "inner.1@grad", lambda value: value * 2),
        lambda model: patch(model, {"inner.0[:, 0]": 1.0, "inner.2@bias": 2.0}),
        lambda model: ablate(model, "inner.0[:, 0]", steps=0, calls=0),
        lambda model: capture(model, "**", keep="all"),
    ],
)
def test_backward_in_a_thread_of_autograds_own(reentrant, context):
    """A checkpointed region runs again in another thread, in which nobody has entered anything."""
    found, acts = gradients(reentrant, context)
    expected, _ = gradients(None, context)
    assert torch.allclose(found, expected, atol=1e-6)
    if isinstance(acts, dict):
        assert all(len(calls) == 1 for calls in acts.values())


def test_values_cross_devices():
    model, x = make("Mlp").cuda(), inputs().cuda()
    with capture(model, "blocks.*", to="cpu") as acts:
        clean = model(x)
    assert {value.device.type for value in acts.values()} == {"cpu"}
    with patch(model, {"blocks.1[:, 0]": acts["blocks.1"][:, 0]}), steer(model, "embed", torch.zeros(6)):
        assert torch.allclose(model(x), clean, atol=1e-6)
    with patch(model, "head@bias", torch.zeros(2)):
        model(x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    model, x = make("Mlp").cuda(), inputs().cuda()
    run = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        clean = run(x).clone()
        for i in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            with (
                steer(model, "embed", torch.full((6,), float(i), device="cuda")),
                capture(model, "blocks.*", clone=True) as acts,
            ):
                out = run(x).clone()
                seen = {key: value.clone() for key, value in acts.items()}
                assert torch.allclose(out, model(x), atol=1e-5)
            assert all(torch.allclose(seen[key], acts[key], atol=1e-5) for key in acts)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.allclose(run(x), clean, atol=1e-6)
