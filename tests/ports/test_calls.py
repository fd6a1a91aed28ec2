"""The port `@name()`: calls of torch functions and of methods in a module's own forward."""

from __future__ import annotations

import gc
import inspect
import weakref
from contextlib import nullcontext

import pytest
import torch
from gallery.attention import AroundProjected, FusedCausal, Projected
from gallery.methods import Methods
from gallery.returning import Gives
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional
from worlds import inputs, same, state, total

from nicehooks import (
    PathError,
    SiteNotFound,
    SiteNotReached,
    TreeMismatch,
    ablate,
    capture,
    edit,
    fused_attention_as_steps,
    patch,
    select,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AroundProjected()


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


def test_the_pattern_of_fused_attention_by_one_path():
    model, x = nn.Sequential(FusedCausal()), torch.randn(1, 2, 3, 4)
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


# --- arguments by name ------------------------------------------------------------------------------------------------


Q = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
OTHER = torch.randn(4, 3, generator=torch.Generator().manual_seed(4))
MASK = torch.ones(2, 3, 4, dtype=torch.bool)
attend = functional.scaled_dot_product_attention

ARGUMENTS = {
    # a forward, and paths with what stands there
    "by position": (lambda x: attend(x, x + 1, x), {"['query']": Q, "['key']": Q + 1, "[1]": Q + 1}),
    "by name": (lambda x: attend(value=x, key=x + 1, query=x), {"['query']": Q, "['key']": Q + 1, "[1]": Q + 1}),
    "defaults": (lambda x: attend(x, x, x), {"['is_causal']": False, "['scale']": None, "[5]": False, "[3]": None}),
    "skipped": (lambda x: attend(x, x, x, is_causal=True), {"['is_causal']": True, "[5]": True, "[3]": None}),
    "function": (lambda x: torch.matmul(x, OTHER), {"['input']": Q, "['other']": OTHER, "[1]": OTHER}),
    "method": (lambda x: x.matmul(OTHER), {"['input']": Q, "['other']": OTHER, "[1]": OTHER}),
    "operator": (lambda x: x @ OTHER, {"['input']": Q, "['other']": OTHER, "[1]": OTHER}),
    "reflected": (lambda x: 2 * x, {"['input']": Q, "['other']": 2}),
    "a number": (lambda x: torch.add(x, 2, alpha=3), {"['other']": 2, "['alpha']": 3}),
    "softmax": (lambda x: torch.softmax(x, dim=-1), {"['input']": Q, "[1]": -1, "['dim']": -1, "['dtype']": None}),
    "functional": (lambda x: functional.softmax(x, -1), {"['input']": Q, "[1]": -1, "['dim']": -1}),
    "linear": (lambda x: functional.linear(x, weight=OTHER.T), {"['weight']": OTHER.T, "[1]": OTHER.T}),
    "overloads": (lambda x: x.max(1, True)[0], {"['dim']": 1, "['keepdim']": True}),
    "another": (lambda x: x.max(other=Q), {"['other']": Q, "[1]": Q}),
    "order of a method": (lambda x: x.where(MASK, 0.0), {"['input']": Q, "['condition']": MASK, "['other']": 0.0}),
    "order of a function": (lambda x: torch.where(MASK, x, 0.0), {"['input']": Q, "['condition']": MASK}),
    "spread": (lambda x: x.permute(2, 0, 1), {"['input']": Q, "[1]": 2, "[3]": 1}),
    "as a list": (lambda x: x.view((6, 4)), {"['size']": (6, 4), "[1]": (6, 4)}),
    "written in Python": (lambda x: torch.functional.norm(x, dim=1), {"['input']": Q, "['dim']": 1}),
}
NAMES = dict.fromkeys(("by position", "by name", "defaults", "skipped"), "scaled_dot_product_attention") | {
    "function": "matmul",
    "method": "matmul",
    "operator": "matmul",
    "reflected": "mul",
    "a number": "add",
    "softmax": "softmax",
    "functional": "softmax",
    "linear": "linear",
    "overloads": "max",
    "another": "max",
    "order of a method": "where",
    "order of a function": "where",
    "spread": "permute",
    "as a list": "view",
    "written in Python": "norm",
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_name_and_position_find_an_argument_however_it_was_passed(case):
    forward, expected = ARGUMENTS[case]
    paths = {f"@{NAMES[case]}().input{part}": value for part, value in expected.items()}
    model = Gives(forward)
    with capture(model, *paths) as acts:
        assert same(model(Q), forward(Q))
    assert {path: same(acts[path], value) for path, value in paths.items()} == dict.fromkeys(paths, True)


@pytest.mark.parametrize(
    ("path", "value", "forward", "expected"),
    [
        ("@matmul().input['other']", 0.0, lambda x: x @ OTHER, lambda x: x @ (OTHER * 0)),
        ("@softmax().input['dim']", 0, lambda x: torch.softmax(x, dim=-1), lambda x: torch.softmax(x, 0)),
        ("@softmax().input[1]", 0, lambda x: x.softmax(dim=-1), lambda x: torch.softmax(x, 0)),
        (
            "@scaled_dot_product_attention().input['is_causal']",
            True,
            lambda x: attend(x, x, x),
            lambda x: attend(x, x, x, is_causal=True),
        ),
        ("@linear().input['weight']", 0.0, lambda x: functional.linear(x, OTHER.T), lambda x: x @ OTHER * 0),
        ("@add().input[1]", 5, lambda x: x + 1, lambda x: x + 5),
    ],
    ids=["other", "dim by name", "dim by position", "a default", "weight", "a number"],
)
def test_an_argument_is_replaced_by_name(path, value, forward, expected):
    model = Gives(forward)
    with edit(model, path, lambda old: value):
        assert torch.equal(model(Q), expected(Q))


def test_a_name_that_no_argument_has_is_said():
    model = Gives(lambda x: attend(x, x, x))
    with pytest.raises(TreeMismatch) as raised, capture(model, "@scaled_dot_product_attention().input['mask']"):
        model(Q)
    assert str(raised.value) == (
        "capture at \"@scaled_dot_product_attention().input['mask']\": scaled_dot_product_attention has no argument "
        "'mask', it has 'query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal', 'scale', 'enable_gqa'."
    )
    with pytest.raises(TreeMismatch, match=r"matmul\w* has no argument 'mat2', it has 'input', 'other'"):
        with ablate(Gives(lambda x: x @ OTHER), "@matmul().input['mat2']") as context:
            context.model(Q)


def test_arguments_of_attention_in_its_steps():
    model = Gives(lambda x: attend(x, x, x))
    with fused_attention_as_steps(), capture(model, "@scaled_dot_product_attention().input[1]", "@softmax()") as acts:
        model(Q)
    assert torch.equal(acts["@scaled_dot_product_attention().input[1]"], Q) and acts["@softmax()"].shape == (2, 3, 3)


def test_static_methods_and_those_of_the_class_are_methods_too():
    model = Methods()
    with capture(model, "@halved()", "@more()", "@halved().input['by']", "@more().input['x']") as acts:
        assert torch.equal(model(Q), Q / 2 / 2 + 1)
    assert torch.equal(acts["@halved()"], Q / 2) and torch.equal(acts["@more()"], Q / 2 / 2 + 1)
    assert acts["@halved().input['by']"] == 2 and torch.equal(acts["@more().input['x']"], Q / 2)


def test_an_operator_and_its_function_are_counted_together():
    model = Gives(lambda x: torch.add(x + 1, x))
    with capture(model, "@add#*()", "@add#1()") as acts:
        model(Q)
    assert list(acts) == ["@add#0()", "@add#1()"] and torch.equal(acts["@add#1()"], Q + 1 + Q)


def test_finding_arguments_keeps_no_module_alive():
    model = Projected()
    with capture(model, "@_scores().input['k']"):
        model(inputs())
    parts = [weakref.ref(part) for part in (model, model.out, model.out.weight)]
    del model
    gc.collect()
    assert [part() for part in parts] == [None, None, None]


def test_a_container_stays_one_while_calls_around_it_are_seen():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            return self.blocks[0](x).relu()

    model = Blocks()
    with capture(model, "@relu()"):
        with pytest.raises(SiteNotFound, match="never called itself"):
            select(model, "blocks")
        model(inputs())


def test_a_method_that_is_watched_keeps_its_signature():
    """Models look at the functions that they hand on, to see how many arguments those take."""

    class Chunked(nn.Module):
        def forward(self, x):
            return self.chunk(x) * len(inspect.signature(self.chunk).parameters)

        def chunk(self, part, by=2.0):
            return part * by

    model, x = nn.Sequential(Chunked()), torch.ones(3)
    with capture(model, "0@chunk()") as acts:
        assert torch.equal(model(x), x * 4)
    assert torch.equal(acts["0@chunk()"], x * 2)
