"""`score_attribution`: the terms add up to the score, and each is what its two parts make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bodies import body
from by_hooks import one_thread
from gallery.architectures import tokens
from torch import Tensor

from nicehooks import (
    ActivationCache,
    NotCaptured,
    SiteNotFound,
    TreeMismatch,
    UnsupportedModule,
    anatomy,
    capture,
    patch,
    score_attribution,
)

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)


def seen(model: Any, ids: Tensor, **kwargs: Any) -> ActivationCache:
    parts = anatomy(model)
    with (
        torch.no_grad(),
        capture(model, parts.resid_pre, parts.z, parts.mlp_out, parts.scores, parts.q, parts.k) as acts,
    ):
        model(ids, **kwargs)
    return acts


FAMILIES = [
    ("gpt2", "eager"),
    ("gpt2", "sdpa"),
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen3", "sdpa"),
    ("qwen3", "eager"),
    ("gpt_neox_parallel", "sdpa"),
    ("opt", "sdpa"),
    ("gemma3", "sdpa"),
]


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_the_terms_add_up_to_the_score(family: str, attention: str) -> None:
    model, ids = body(family, attention), tokens(0, batch=2)
    parts, cache = anatomy(model), seen(model, ids)
    for layer, head, query, key in ((0, 1, 6, 2), (1, 3, 5, 5), (2, 0, -1, 0), (2, 2, 4, 3)):
        terms = score_attribution(model, cache, parts.scores[layer].head(head), query, key)
        expected = cache[parts.scores[layer]][:, head, query, key]
        total = terms.examples.sum((0, 1)) + terms.baseline
        assert torch.allclose(total, expected, atol=1e-4 * max(1.0, expected.abs().max().item())), (layer, head)
        assert torch.equal(total, terms.score)
        assert terms.examples.abs().max() > 1e-2


def test_a_term_is_what_two_parts_make_of_the_score() -> None:
    """Taken out of the stream at the query, with the norm as it was, a part takes its row with it."""
    model, ids = body("gpt2"), tokens(0, batch=2)
    parts, cache = anatomy(model), seen(model, ids)
    terms = score_attribution(model, cache, parts.scores[2].head(1), query=5, key=3)
    names = list(terms.axes[0].labels)
    norm = model.transformer.h[2].ln_1
    stream = cache[parts.resid_pre[2]][:, 5]
    scale = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    for name, written in (
        ("mlp_out[0]", cache[parts.mlp_out[0]][:, 5]),
        ("resid_pre[0]", cache[parts.resid_pre[0]][:, 5]),
    ):
        moved = (written - written.mean(-1, keepdim=True)) / scale * norm.weight
        out = moved @ model.transformer.h[2].attn.c_attn.weight[:, 8:16]  # the query of head 1
        new = cache[parts.q[2]].clone()
        new[:, 5, 1] -= out
        with torch.no_grad(), patch(model, parts.q[2], new), capture(model, parts.scores[2]) as changed:
            model(ids)
        less = cache[parts.scores[2]][:, 1, 5, 3] - changed[parts.scores[2]][:, 1, 5, 3]
        assert torch.allclose(terms.examples[names.index(name)].sum(0), less, atol=1e-4)


def test_heads_of_other_parts_are_the_same_head() -> None:
    model, ids = body("llama"), tokens(0, batch=2)
    parts, cache = anatomy(model), seen(model, ids)
    one = score_attribution(model, cache, parts.scores[-1].head(-1), 4, 2)
    other = score_attribution(model, cache, parts.z[2].head(3), 4, 2)
    assert torch.equal(one.values, other.values)
    assert one.axes[0].labels[-2:] == ("bias", "rest") and one.axes[0].name == "query part"


def test_what_an_intervention_put_into_the_stream_is_in_the_rest() -> None:
    model, ids = body("llama"), tokens(0, batch=2)
    parts = anatomy(model)
    with patch(model, parts.resid_post[0], torch.randn(2, 7, 32)):
        cache = seen(model, ids)
    terms = score_attribution(model, cache, parts.scores[1].head(0), 4, 2)
    assert terms.values[-1].abs().max() > 0.1
    clean = score_attribution(model, seen(model, ids), parts.scores[1].head(0), 4, 2)
    assert clean.values[-1].abs().max() < 1e-4


def test_what_is_refused() -> None:
    model, ids = body("llama"), tokens(0, batch=2)
    parts, cache = anatomy(model), seen(model, ids)
    with pytest.raises(SiteNotFound, match="query 2 does not see key 4 in layer 1"):
        score_attribution(model, cache, parts.scores[1].head(0), 2, 4)
    with pytest.raises(SiteNotFound, match="is no head of a layer"):
        score_attribution(model, cache, parts.scores[1], 4, 2)
    with pytest.raises(SiteNotFound, match="key=9: the run in the cache has 7 positions"):
        score_attribution(model, cache, parts.scores[1].head(0), 4, 9)
    with pytest.raises(NotCaptured, match=r"lacks|not in this cache: z\[0\]"):
        score_attribution(
            model, dict(cache.select([str(part) for part in parts.resid_pre])), parts.scores[1].head(0), 4, 2
        )
    strange = seen(model, ids, position_ids=torch.tensor([[0, 5, 9, 11, 30, 31, 40]]))
    with pytest.raises(TreeMismatch, match=r"the positions of that run were not 0, 1, 2, …"):
        score_attribution(model, strange, parts.scores[1].head(0), 4, 2)
    with pytest.raises(UnsupportedModule, match="has its norms on the residual stream"):
        score_attribution(body("bert"), {}, anatomy(body("bert")).scores[1].head(0), 4, 2)
    with pytest.raises(UnsupportedModule, match="is no product of a query and a key"):
        capped = body("gemma2", "eager")
        score_attribution(capped, seen(capped, ids), anatomy(capped).scores[1].head(0), 4, 2)
