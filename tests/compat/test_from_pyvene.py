"""The rows of docs/from_pyvene.md: each beside the same by PyTorch's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hooks import arguments_by_hooks, changed_by_hook, outputs_by_hooks, put
from gallery.families import small
from generating import stepwise_hook
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from nicehooks import (
    ActivationCache,
    SiteNotFound,
    SiteNotReached,
    ablate,
    anatomy,
    capture,
    captured,
    edit,
    patch,
    select,
    steer,
)

BASE, SOURCE = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[2, 7, 1, 8, 2, 8]])
BLOCK = "transformer.h.1"
WIDTH, HEADS = 16, 4


def scores(model: nn.Module, ids: Tensor = BASE) -> Tensor:
    return model(ids).logits


def by_hook(name: str, fn: Callable[[Any], Any], where: str = "output") -> Tensor:
    with torch.no_grad(), changed_by_hook(small(), name, fn, where):
        return scores(small())


def taken(path: Any, ids: Tensor = SOURCE) -> Tensor:
    with torch.no_grad(), capture(small(), path) as acts:
        small()(ids)
    return acts[path]


def test_components_have_names() -> None:
    model = small()
    parts = anatomy(model)
    _, outputs = outputs_by_hooks(model, lambda: model(BASE))
    given = {name: calls[0].args for name, calls in arguments_by_hooks(model, lambda: model(BASE)).items()}
    q, k, v = outputs[f"{BLOCK}.attn.c_attn"][0].split(WIDTH, -1)
    z = given[f"{BLOCK}.attn.c_proj"][0].unflatten(-1, (HEADS, -1))
    expected = {
        parts.resid_post[1]: outputs[BLOCK][0],
        parts.resid_pre[1]: given[BLOCK][0],
        parts.mlp_out[1]: outputs[f"{BLOCK}.mlp"][0],
        parts.mlp_post[1]: given[f"{BLOCK}.mlp.c_proj"][0],
        parts.attn_out[1]: outputs[f"{BLOCK}.attn"][0][0],
        parts.z[1]: z,
        parts.z[1].head(2): z[:, :, 2],
        parts.q[1]: q.unflatten(-1, (HEADS, -1)),
        parts.k[1]: k.unflatten(-1, (HEADS, -1)),
        parts.v[1]: v.unflatten(-1, (HEADS, -1)),
        parts.q[1].head(2): q.unflatten(-1, (HEADS, -1))[:, :, 2],
    }
    for site, value in expected.items():
        assert torch.equal(taken(site, BASE), value), site
    assert str(parts.resid_post[1]) == BLOCK


def test_any_module_is_a_component_by_its_path() -> None:
    model = small()
    with capture(model, "transformer.h.*.attn", f"{BLOCK}@input[0]", f"{BLOCK}.mlp.c_fc@bias") as acts:
        model(BASE)
    attention = [f"transformer.h.{i}.attn" for i in range(2)]
    assert set(acts) == {*attention, f"{BLOCK}@input[0]", f"{BLOCK}.mlp.c_fc@bias"}
    assert acts[f"{BLOCK}.mlp.c_fc@bias"] is model.transformer.h[1].mlp.c_fc.bias


def test_an_interchange_is_a_capture_and_a_patch() -> None:
    """At the same position, at different ones of source and base, at several, and of one head."""
    model, head = small(), anatomy(small()).z[1].head(2)
    value, clean = taken(BLOCK), scores(model)
    for base, source in (([3], [3]), ([5], [2]), ([1, 4], [0, 2])):
        expected = by_hook(BLOCK, lambda old, to=base, of=source: put(old, (slice(None), to), value[:, of]))
        with torch.no_grad(), patch(model, f"{BLOCK}[:, {base}]", value[:, source]):
            assert torch.equal(scores(model), expected)
    with torch.no_grad(), patch(model, f"{BLOCK}[:, 2:5]", value[:, 2:5]):
        assert torch.equal(scores(model)[:, :2], clean[:, :2]) and not torch.equal(scores(model)[:, 2:], clean[:, 2:])
    z = taken(head)
    columns = (slice(None), 5, slice(8, 12))
    expected = by_hook(f"{BLOCK}.attn.c_proj", lambda old: put(old, columns, z[:, 2]), "input")
    with torch.no_grad(), patch(model, head[:, 5], z[:, 2]):
        assert torch.equal(scores(model), expected)


def test_what_a_source_run_gave_is_a_cache_that_is_patched() -> None:
    model, site = small(), f"{BLOCK}[:, 3]"
    with torch.no_grad():
        with capture(model, site) as acts:
            model(SOURCE)
        with patch(model, acts):
            out = scores(model)
    value = taken(BLOCK)
    assert torch.equal(out, by_hook(BLOCK, lambda old: put(old, (slice(None), 3), value[:, 3])))


def test_zeros_sums_and_noise() -> None:
    model, vector = small(), torch.arange(float(WIDTH))

    def noisy(value: Tensor) -> Tensor:
        return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(3))

    for context, hook in (
        (ablate(model, BLOCK), lambda value: value * 0),
        (ablate(model, BLOCK, value=2.0), lambda value: value * 0 + 2),
        (steer(model, BLOCK, vector), lambda value: value + vector),
        (steer(model, BLOCK, vector, scale=-3.0), lambda value: value - 3 * vector),
        (edit(model, BLOCK, noisy), noisy),
        (patch(model, BLOCK, vector), lambda value: vector.expand_as(value)),
    ):
        expected = by_hook(BLOCK, hook)
        with torch.no_grad(), context:
            assert torch.equal(scores(model), expected), context


def test_a_function_closes_over_what_it_needs() -> None:
    model, one, two = small(), taken(BLOCK), taken(BLOCK, SOURCE.flip(-1))
    for fn in (lambda base: base + one, lambda base: (base + one + two) / 3, torch.tanh):
        expected = by_hook(BLOCK, fn)
        with torch.no_grad(), edit(model, BLOCK, fn):
            assert torch.equal(scores(model), expected)


def test_collected_values_are_those_of_hooks() -> None:
    model = small()
    _, seen = outputs_by_hooks(model, lambda: model(BASE))
    with capture(model, "transformer.h.*[:, 3]") as acts:
        model(BASE)
    assert list(acts) == [f"transformer.h.{i}[:, 3]" for i in range(2)]
    assert all(torch.equal(value, seen[key.partition("[")[0]][0][:, 3]) for key, value in acts.items())


def test_a_rotation_is_learned_and_some_of_its_columns_are_used() -> None:
    torch.manual_seed(0)
    model, rotation, site = small(), orthogonal(nn.Linear(4, WIDTH, bias=False)), f"{BLOCK}[:, -1]"
    other = taken(BLOCK)[:, -1]

    def interchange(columns: slice) -> Tensor:
        basis = rotation.weight[:, columns]
        with edit(model, site, lambda value: value + (other - value) @ basis @ basis.T):
            return scores(model)

    def by_hand(value: Tensor, basis: Tensor) -> Tensor:
        return put(value, (slice(None), -1), value[:, -1] + (other - value[:, -1]) @ basis @ basis.T)

    every, first = slice(None), slice(0, 2)
    for columns in (every, first):
        basis = rotation.weight[:, columns].detach()
        expected = by_hook(BLOCK, lambda value, basis=basis: by_hand(value, basis))
        assert torch.allclose(interchange(columns), expected, atol=1e-5)
        with torch.no_grad(), patch(model, site, other, subspace=basis):
            assert torch.allclose(scores(model), expected, atol=1e-5)
    interchange(every)[:, -1].logsumexp(-1).sum().backward()
    model.zero_grad()
    assert all(parameter.grad.any() for parameter in rotation.parameters() if parameter.requires_grad)


def test_a_subspace_of_neurons_is_a_subscript() -> None:
    model, value = small(), taken(BLOCK)
    where = (slice(None), -1, slice(0, 6))
    expected = by_hook(BLOCK, lambda old: put(old, where, value[where]))
    with torch.no_grad(), patch(model, f"{BLOCK}[:, -1, 0:6]", value[where]):
        assert torch.equal(scores(model), expected)


def test_several_sources_parallel_and_serial() -> None:
    model, one, two = small(), taken(BLOCK), taken(BLOCK, SOURCE.flip(-1))
    first, last = (slice(None), 0), (slice(None), -1)
    expected = by_hook(BLOCK, lambda old: put(put(old, first, one[first]), last, two[last]))
    with torch.no_grad(), patch(model, f"{BLOCK}[:, 0]", one[first]), patch(model, f"{BLOCK}[:, -1]", two[last]):
        assert torch.equal(scores(model), expected)
    lower = taken("transformer.h.0")
    with torch.no_grad():
        with patch(model, "transformer.h.0[:, 2]", lower[:, 2]), capture(model, BLOCK) as between:
            model(SOURCE.flip(-1))  # the first source changes the run that is the second
        with patch(model, f"{BLOCK}[:, -1]", between[f"{BLOCK}[:, -1]"]):
            serial = scores(model)
        with changed_by_hook(model, "transformer.h.0", lambda old: put(old, (slice(None), 2), lower[:, 2])):
            value = outputs_by_hooks(model, lambda: model(SOURCE.flip(-1)))[1][BLOCK][0]
    assert torch.equal(serial, by_hook(BLOCK, lambda old: put(old, last, value[last])))


def test_generation_on_the_prompt_and_on_the_rest() -> None:
    model = small()
    how: dict[str, Any] = {"attention_mask": torch.ones_like(BASE), "max_new_tokens": 4, "min_new_tokens": 4}

    def generated() -> Tensor:
        return model.generate(BASE, do_sample=False, **how)

    plain, every = generated(), range(4)
    for steps, acting in (
        (0, [0]),
        (slice(1, None), [1, 2, 3]),
        (lambda step: step == 2, [2]),
        ([1, 3], [1, 3]),
        (None, every),
    ):
        with stepwise_hook(model, BLOCK, lambda value, step, acting=acting: value * -3 if step in acting else value):
            expected = generated()
        with edit(model, BLOCK, lambda value: value * -3, steps=steps):
            assert torch.equal(generated(), expected)
        assert not torch.equal(expected, plain)


def test_values_are_saved_and_descriptions_are_code(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "acts.safetensors"
    with capture(model, BLOCK) as acts:
        model(SOURCE)
    acts.save(file)
    read = ActivationCache.load(file)
    expected = by_hook(BLOCK, lambda old: acts[BLOCK].detach())
    with torch.no_grad(), patch(model, read):
        assert torch.equal(scores(model), expected)
    assert not hasattr(edit(model, BLOCK, torch.tanh), "save") and not hasattr(patch, "load")


# --- what is different on purpose -------------------------------------------------------------------------------------


def test_the_model_is_called_itself_and_returns_what_it_returns() -> None:
    model = small()
    plain = model(BASE)
    with ablate(model, BLOCK):
        out = model(BASE)
        assert model is small() and type(out) is type(plain) and out.keys() == plain.keys()
    assert not torch.equal(out.logits, plain.logits) and torch.equal(model(BASE).logits, plain.logits)


def test_a_wrong_place_is_an_error_that_names_the_nearest() -> None:
    model = small()
    with pytest.raises(SiteNotFound, match=r"nearest names: transformer.h.0"), ablate(model, "transformer.h.7"):
        pass
    with pytest.raises(SiteNotReached, match=BLOCK), ablate(model, f"{BLOCK}#1"):
        model(BASE)


def test_gradients_are_not_switched() -> None:
    model = small()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    _, acts = captured(model, BLOCK)(BASE)
    assert acts[BLOCK].grad_fn is not None and flags == [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad(), capture(model, BLOCK) as acts:
        model(BASE)
        assert not torch.is_grad_enabled()
    assert acts[BLOCK].grad_fn is None


def test_any_module_has_paths() -> None:
    model = nn.GRU(4, 3)
    with capture(model, "") as acts:
        out = model(torch.ones(2, 1, 4))
    assert torch.equal(acts[""][0], out[0]) and [str(site) for site in select(model, "**")] == [""]
