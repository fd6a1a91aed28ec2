"""The port `@name()`: calls of torch functions and of methods in a module's own forward."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional
from worlds import inputs, same, state, total

from nicehooks import PathError, SiteNotReached, ablate, capture, edit, fused_attention_as_steps, patch


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = Projection()
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.project(x)
        pattern = functional.softmax(self._scores(q, k), dim=-1)
        return self.out(pattern @ v) + 1.0

    def _scores(self, q, k):
        return torch.matmul(q, k.transpose(-1, -2)) * 0.5


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12))

    def forward(self, x):
        return torch.softmax(torch.matmul(x, self.weight), dim=-1).chunk(3, dim=-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def by_hand(model, x, scores=lambda s: s, pattern=lambda p: p):
    q, k, v = model.attention.project(x)
    s = scores(torch.matmul(q, k.transpose(-1, -2)) * 0.5)
    p = pattern(functional.softmax(s, dim=-1))
    return s, p, model.attention.out(p @ v) + 1.0


def test_captured_in_the_own_forward_alone(model):
    s, p, out = by_hand(model, inputs())
    before = state(model)
    with capture(
        model,
        "attention@softmax()",
        "attention@softmax().input[0]",
        "attention@_scores()",
        "attention@_scores().input['k']",
        "attention@matmul#*()",
        "attention@__add__()",
        "attention.project@softmax()",
        keep="all",
    ) as acts:
        assert torch.equal(model(inputs()), out)
    assert {key: len(values) for key, values in acts.items()} == dict.fromkeys(acts, 1)
    assert len(acts) == 8 and "attention@matmul#1()" in list(acts)
    assert torch.equal(acts["attention@softmax()"][0], p)
    assert torch.equal(acts["attention@softmax().input[0]"][0], s)
    assert torch.equal(acts["attention@_scores()"][0], s)
    assert torch.equal(acts["attention@__add__()"][0], out)
    assert state(model) == before


@pytest.mark.parametrize("path", ["attention@softmax()", "attention@softmax#0()"])
def test_changed(model, path):
    _, _, expected = by_hand(model, inputs(), pattern=lambda p: p * 0)
    with ablate(model, path):
        assert torch.equal(model(inputs()), expected)
    _, _, expected = by_hand(model, inputs(), scores=lambda s: s + 1 - s)
    for where in ("attention@softmax().input[0]", "attention@_scores()", "attention@softmax().input['input']"):
        with edit(model, where, lambda s: s + 1 - s):
            assert torch.equal(model(inputs()), expected)


def test_order_holds_for_results_and_arguments(model):
    with (
        edit(model, "attention@softmax().input[0]", lambda s: s + 1),
        edit(model, "attention@softmax().input[0]", lambda s: s * 2),
        edit(model, "attention@softmax()", lambda p: p + 1),
        edit(model, "attention@softmax()", lambda p: p * 2),
    ):
        out = model(inputs())
    _, _, expected = by_hand(model, inputs(), scores=lambda s: (s + 1) * 2, pattern=lambda p: (p + 1) * 2)
    assert torch.equal(out, expected)


def test_under_vmap_and_grad(model):
    xs = torch.stack([inputs(), inputs() + 1])

    def inside(x):
        with capture(model, "attention@softmax()") as acts, patch(model, "attention@_scores()[0]", 0.0):
            out = model(x)
        return out, acts["attention@softmax()"]

    out, patterns = vmap(inside)(xs)
    for row, pattern, x in zip(out, patterns, xs, strict=True):
        expected, seen = inside(x)
        assert torch.allclose(row, expected, atol=1e-6) and torch.allclose(pattern, seen, atol=1e-6)
    with capture(model, "attention@softmax()") as acts:
        vmap(model)(xs)
    assert torch.allclose(acts["attention@softmax()"][1], by_hand(model, xs[1])[1], atol=1e-6)
    x = inputs().requires_grad_()
    with edit(model, "attention@softmax()", lambda p: p * 2):
        found = grad(lambda x: total(model(x)))(inputs())
        (expected,) = torch.autograd.grad(total(model(x)), x)
    assert torch.allclose(found, expected, atol=1e-6)


def test_what_is_never_called_is_said(model):
    for path in ("attention@sigmoid()", "attention@linear()", "attention@softmax#1()", "@matmul()"):
        with pytest.raises(SiteNotReached, match="calls no function"), capture(model, path):
            model(inputs())


@pytest.mark.parametrize("case", ["plain", "causal", "boolean", "additive", "grouped", "scaled", "empty row"])
def test_fused_attention_equals_its_steps(case):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    keyed = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.rand(5, 5) > 0.3},
        "additive": {"attn_mask": torch.randn(2, 1, 5, 5)},
        "grouped": {"enable_gqa": True},
        "scaled": {"scale": 0.3},
        "empty row": {"attn_mask": torch.tensor([[False] * 5] + [[True] * 5] * 4)},
    }[case]
    if case == "grouped":
        k, v = k[:, :2], v[:, :2]
    expected = functional.scaled_dot_product_attention(q, k, v, **keyed)
    with fused_attention_as_steps():
        found = functional.scaled_dot_product_attention(q, k, v, **keyed)
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)


class Fused(nn.Module):
    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_the_pattern_of_fused_attention_by_one_path():
    model, x = nn.Sequential(Fused()), torch.randn(1, 2, 3, 4)
    clean = model(x)
    with capture(model, "0@scaled_dot_product_attention()") as acts:
        assert torch.equal(model(x), clean)
    assert torch.equal(acts["0@scaled_dot_product_attention()"], clean)
    with fused_attention_as_steps(), capture(model, "0@softmax()", "0@softmax()[:, 1]") as acts:
        assert torch.allclose(model(x), clean, atol=1e-5)
    assert torch.allclose(acts["0@softmax()"].sum(-1), torch.ones(1, 2, 3))
    assert torch.allclose(acts["0@softmax()"] @ x, clean, atol=1e-5)
    with fused_attention_as_steps(), patch(model, "0@softmax()[:, 1]", 0.0):
        out = model(x)
    assert not out[:, 1].any() and torch.allclose(out[:, 0], clean[:, 0], atol=1e-5)
    fused = "0@scaled_dot_product_attention()"
    for context in (nullcontext(), fused_attention_as_steps()):  # its steps have names of their own, in both
        with context, capture(model, fused + ".pattern", fused + ".scores", fused + ".input['query']", fused) as acts:
            assert torch.allclose(model(x), clean, atol=1e-5)
        assert torch.equal(acts[fused + ".pattern"], acts[fused + ".scores"].softmax(-1))
        assert torch.allclose(acts[fused + ".pattern"] @ x, acts[fused], atol=1e-5)
        assert torch.equal(acts[fused + ".input['query']"], x)
    with edit(model, fused + ".scores", lambda scores: scores * 2), capture(model, fused + ".pattern[0, 1]") as acts:
        doubled = model(x)
    scores = torch.full((3, 3), -torch.inf).triu(1) + x[0, 1] @ x[0, 1].T  # 2 / sqrt(4) is 1
    assert torch.allclose(acts[fused + ".pattern[0, 1]"], scores.softmax(-1), atol=1e-5)
    assert torch.allclose(doubled[0, 1], scores.softmax(-1) @ x[0, 1], atol=1e-5)
    with pytest.raises(PathError, match="scores and pattern are steps of"):
        capture(model, "0@softmax().pattern").__enter__()
    with fused_attention_as_steps(), pytest.raises(SiteNotReached), capture(model, "0@dropout()"):
        model(x)
    assert same(model(x), clean)
