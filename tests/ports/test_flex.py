"""Flexible attention in its steps, `@flex_attention().pattern`: compiled or not, on a CPU, and gone when it is over."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from gallery.attention import Flexible
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nicehooks import PathError, SiteNotReached, ablate, capture, edit, fused_attention_as_steps, patch
from nicehooks.ports.flex import flex_attention_in_steps

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.:DeprecationWarning"
)  # inductor itself uses what is deprecated

FLEX = "@flex_attention()"
BIAS = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(5))
LENGTHS = torch.tensor([5, 3])

compiled = pytest.mark.parametrize("flex", ["plain", "compiled"], indirect=True)


@pytest.fixture
def flex(request):
    return flex_attention if request.param == "plain" else torch.compile(flex_attention)


def biased(score, batch, head, query, key):
    return torch.tanh(score) + BIAS[head, query, key]


def looks_back(batch, head, query, key):
    return (query >= key) & (query < LENGTHS[batch])


def queries(heads=4):
    torch.manual_seed(1)
    return torch.randn(2, 4, 5, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 8)


def by_hand(q, k, v, scale=8**-0.5):
    """The scores, the pattern and the sums of values, where a query without keys has zeros."""
    k, v = (one.repeat_interleave(4 // one.shape[1], 1) for one in (k, v))
    row, blind = torch.arange(5), torch.arange(5) >= LENGTHS[:, None]
    seen = ((row[:, None] >= row) & ~blind[:, :, None])[:, None]
    scores = (torch.tanh(q @ k.mT * scale) + BIAS).masked_fill(~seen, -torch.inf)
    pattern = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return scores, pattern, pattern @ v


def masked(flex, **options):
    mask = create_block_mask(looks_back, 2, None, 5, 5, device="cpu")
    return Flexible(flex, biased, mask, **options)


@compiled
@pytest.mark.parametrize(("heads", "scale"), [(4, None), (2, 0.3)])
def test_scores_and_pattern_are_those_of_the_formula(flex, heads, scale):
    model, given = masked(flex, enable_gqa=heads < 4, scale=scale), queries(heads)
    with capture(model, FLEX + ".scores", FLEX + ".pattern", FLEX + "[0]", FLEX + ".input['query']") as acts:
        out = model(*given)
    scores, pattern, z = by_hand(*given, **({} if scale is None else {"scale": scale}))
    assert torch.allclose(acts[FLEX + ".scores"], scores, atol=1e-5)
    assert torch.allclose(acts[FLEX + ".pattern"], pattern, atol=1e-5)
    assert torch.allclose(out, z, atol=1e-5) and torch.equal(acts[FLEX + "[0]"], out)
    assert torch.equal(acts[FLEX + ".input['query']"], given[0])


@compiled
def test_it_is_patched_and_edited(flex):
    model, (q, k, v) = masked(flex), queries()
    scores, _, z = by_hand(q, k, v)
    with ablate(model, FLEX + ".pattern[:, 1]"):
        out = model(q, k, v)
    assert not out[:, 1].any() and torch.allclose(out[:, 2], z[:, 2], atol=1e-5)
    with patch(model, FLEX + ".pattern", torch.eye(5).expand(2, 4, 5, 5)):
        assert torch.allclose(model(q, k, v), v, atol=1e-6)
    with edit(model, FLEX + ".scores", lambda scores: scores * 2), capture(model, FLEX + ".pattern") as acts:
        model(q, k, v)
    assert torch.allclose(acts[FLEX + ".pattern"][0], (scores * 2).softmax(-1)[0], atol=1e-5)


@compiled
def test_gradients_are_those_of_the_formula_where_the_kernel_has_none(flex):
    model, given = masked(flex), [one.requires_grad_() for one in queries()]
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(*given)
    with capture(model, FLEX + ".pattern.grad", FLEX + ".scores.grad") as acts:
        (model(*given) ** 2).sum().backward()
    pattern, z = by_hand(*given)[1:]
    (expected,) = torch.autograd.grad((z**2).sum(), pattern, retain_graph=True)
    assert torch.allclose(acts[FLEX + ".pattern.grad"], expected, atol=1e-4)
    assert acts[FLEX + ".scores.grad"].isfinite().all()
    blind_apart = [torch.autograd.grad((by_hand(*given)[2][0] ** 2).sum(), one)[0][0] for one in given]
    assert all(torch.allclose(one.grad[0], there, atol=1e-4) for one, there in zip(given, blind_apart, strict=True))
    assert all(one.grad.isfinite().all() for one in given)  # a row that sees nothing gives no NaN


@compiled
def test_as_steps_a_softmax_is_there_and_nothing_of_the_functions_inside(flex):
    model, given = masked(flex), queries()
    with fused_attention_as_steps(), capture(model, "@softmax()", "@matmul#*()") as acts:
        out = model(*given)
    assert list(acts) == ["@matmul#0()", "@softmax()", "@matmul#1()"]
    assert torch.allclose(acts["@softmax()"][0], by_hand(*given)[1][0], atol=1e-5) and torch.equal(
        acts["@matmul#1()"], out
    )
    with fused_attention_as_steps(), pytest.raises(SiteNotReached), capture(model, "@tanh()"):
        model(*given)


def test_the_sums_beside_the_values_are_those_of_the_formula():
    """To the base 2, as the operator gives them: on a CPU torch returns neither to the caller."""
    q, k, v = queries(heads=2)
    mask = create_block_mask(looks_back, 2, None, 5, 5, device="cpu").as_tuple()
    z, log_of_sum, largest = flex_attention_in_steps(q, k, v, biased, mask, 8**-0.5, {"BACKEND": "AUTO"})
    scores, _, expected = by_hand(q, k, v)
    assert torch.allclose(z, expected, atol=1e-5)
    assert torch.allclose(log_of_sum * math.log(2), scores.logsumexp(-1), atol=1e-5)
    assert torch.allclose(largest * math.log(2), scores.amax(-1), atol=1e-5)


def test_without_functions_and_in_half_precision():
    model, given = Flexible(flex_attention), [one.bfloat16() for one in queries()]
    with capture(model, FLEX + ".scores", FLEX + ".pattern") as acts:
        out = model(*given)
    q, k, v = (one.float() for one in given)
    assert acts[FLEX + ".scores"].dtype == torch.float32
    assert acts[FLEX + ".pattern"].dtype == out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), ((q @ k.mT) * 8**-0.5).softmax(-1) @ v, atol=2e-2)


def test_nothing_is_left_when_the_module_has_run():
    import torch.nn.attention.flex_attention as home
    from torch._dynamo import eval_frame

    def settings():
        return home._validate_device, eval_frame._stance, set(home._WARNINGS_SHOWN)

    before, model = settings(), masked(flex_attention)
    with capture(model, FLEX + ".pattern"):
        model(*queries())
    with pytest.raises(ZeroDivisionError), edit(model, FLEX + ".pattern", lambda pattern: 1 // 0):
        model(*queries())
    assert settings() == before


def test_another_thread_keeps_the_kernel_that_it_had():
    """While a module shows its steps in one thread, torch still refuses gradients in the other."""
    model, other, said = masked(flex_attention), masked(flex_attention), []

    def elsewhere():
        try:
            other(*(one.requires_grad_() for one in queries()))
        except NotImplementedError as error:
            said.append(str(error))

    def meanwhile(pattern):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return pattern

    with edit(model, FLEX + ".pattern", meanwhile):
        model(*queries())
    assert len(said) == 1 and "does not support backward on CPU" in said[0]


def test_steps_of_another_call_are_none():
    with pytest.raises(
        PathError, match="scores and pattern are steps of @scaled_dot_product_attention\\(\\) and @flex_at"
    ):
        capture(Flexible(flex_attention), "@softmax().pattern").__enter__()
