"""Law 5 as a product: every transform × every intervention × models of every kind; see `transform_product.py`."""

from __future__ import annotations

import functools
from contextlib import ExitStack

import pytest
import torch
from transform_product import (
    BATCH,
    EXAMPLES,
    INTERVENTIONS,
    TRANSFORMS,
    combinations,
    leaving,
    reference,
    subject,
)

from nicehooks import ActivationCache, SiteNotReached, capture
from nicehooks.torch_private_tensors import is_wrapped


def close(a, b, name="mlp"):
    """Models are in double precision, but Llama norms in single."""
    if isinstance(a, tuple):
        return all(close(x, y, name) for x, y in zip(a, b, strict=True))
    tolerance = 1e-4 if name == "llama" else 1e-8
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("transform", "intervention", "name", "caller"), combinations(INTERVENTIONS))
def test_equals_examples_and_plain_autograd(transform, intervention, name, caller):
    program = INTERVENTIONS[intervention](subject(name), caller)
    expected = TRANSFORMS[transform].by_hand(reference(name, intervention, caller))
    with program.around():
        found = TRANSFORMS[transform].of(program.of)
    assert close(found, expected, name)
    assert all("forward" not in vars(module) for module in subject(name).model.modules())


@functools.cache
def by_example(name, caller):
    """The outputs of all examples, and at each seen site the values and the Jacobians of the output."""
    s = subject(name)
    outputs, values, jacobians = [], {path: [] for path in s.paths}, {path: [] for path in s.paths}
    for z in EXAMPLES:
        with ExitStack() as stack:
            for module, way, _ in s.seen:
                stack.enter_context(leaving(s, module, way))
            acts = stack.enter_context(capture(s.model, *[module for module, _, _ in s.seen]))
            y = s.run(s.caller(caller), s.moved(z.clone().requires_grad_()))
        outputs.append(y.detach())
        for (module, way, region), path in zip(s.seen, s.paths, strict=True):
            whole = acts[module + way]
            rows = [torch.autograd.grad(one, whole, retain_graph=True)[0] for one in y]
            values[path].append(acts[path].detach())
            jacobians[path].append(torch.stack([ActivationCache({"x": row})["x" + region] for row in rows]))
    stacked = [{path: torch.stack(found) for path, found in each.items()} for each in (values, jacobians)]
    return torch.stack(outputs), *stacked


@pytest.mark.parametrize(("transform", "name", "caller"), combinations())
def test_a_cache_entered_outside_gets_the_full_batch(transform, name, caller):
    program = INTERVENTIONS["capture outside"](subject(name), caller)
    with program.around() as acts:
        TRANSFORMS[transform].of(program.of)
    lead = TRANSFORMS[transform].lead
    assert set(acts) == set(subject(name).paths)
    for path, values in by_example(name, caller)[1].items():
        shape = (*lead, *values.shape[1:])
        mapped = {(BATCH,): values[:BATCH], (BATCH, BATCH): values}.get(lead, values[0].expand(shape))
        assert not is_wrapped(acts[path])
        assert close(acts[path], mapped.reshape(shape), name)


@pytest.mark.parametrize(("transform", "name", "caller"), combinations())
def test_gradients_for_a_cache_entered_outside(transform, name, caller):
    s, run = subject(name), INTERVENTIONS["capture outside"](subject(name), caller).of
    ports = {path: gradient_port(*parts) for path, parts in zip(s.paths, s.seen, strict=True)}
    by_hand = TRANSFORMS[transform].gradients
    if by_hand is None:  # nothing runs backward
        with pytest.raises(SiteNotReached, match="no gradient came by"), capture(s.model, *ports.values()):
            TRANSFORMS[transform].of(run)
        return
    with capture(s.model, *ports.values()) as acts:
        TRANSFORMS[transform].of(run)
    outputs, _, jacobians = by_example(name, caller)
    for path, port in ports.items():
        assert not is_wrapped(acts[port])
        assert close(acts[port], by_hand(jacobians[path], outputs), name)


def gradient_port(module, way, region):
    return f"{module}.grad{way}{region}" if module.endswith("@input") else f"{module}@grad{way}{region}"
