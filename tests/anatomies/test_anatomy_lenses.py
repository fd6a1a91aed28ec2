"""Logit lens, direct logit attribution and results of heads, against what the models themselves compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bodies import BODIES, LAYER, body, padded
from by_hooks import one_thread
from gallery.architectures import VOCABULARY, tokens
from gallery.decoders import AttentionOnly
from gallery.trained import smollm2
from torch import Tensor, nn

from nicehooks import (
    ActivationCache,
    NotCaptured,
    SiteNotFound,
    TreeMismatch,
    UnsupportedModule,
    ablate,
    anatomy,
    capture,
    direct_logit_attribution,
    head_results,
    logit_lens,
    patch,
    register_anatomy,
    steer,
)
from nicehooks.anatomies.anatomy import FAMILIES, Family, Lacks

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

each_body = pytest.mark.parametrize(("family", "attention"), BODIES)
POST_NORM = ("bert", "opt_post_norm")
each_sum = pytest.mark.parametrize(("family", "attention"), [pair for pair in BODIES if pair[0] not in POST_NORM])

NORMED_INPUT = ("gemma2", "gemma3")
"""The families whose attention has a second norm behind it."""


def run(model: nn.Module, *where: Any) -> tuple[Tensor, ActivationCache]:
    """The logits, and all that the functions read, in a run on a batch with padding."""
    parts = anatomy(model)
    every = where or (parts.resid_pre, parts.attn_out, parts.z, parts.mlp_out, parts.resid_post)
    ends = () if where or parts.lacks("final_norm") else (parts.final_norm,)
    with capture(model, *every, *ends) as acts:
        logits = model(**padded(model)).logits
    return logits, acts


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=atol)


# --- logit lens -------------------------------------------------------------------------------------------------------


@each_body
def test_the_lens_of_the_last_layer_is_the_logits(family: str, attention: str) -> None:
    model = body(family, attention)
    logits, cache = run(model)
    lens = logit_lens(model, cache)
    assert lens.shape == (3, 2, 7, VOCABULARY)
    assert close(lens[-1], logits)
    before = logit_lens(model, cache, "resid_pre")
    assert close(before[1:], lens[:-1])
    assert not close(before[0], lens[0])


@each_body
def test_a_lens_is_the_model_that_stops_there(family: str, attention: str) -> None:
    """The same as making the later layers do nothing."""
    model = body(family, attention)
    parts = anatomy(model)
    if parts.family.post_norm:
        return
    _, cache = run(model)
    with ablate(model, parts.attn_out[1:], parts.mlp_out[1:]):
        stopped = model(**padded(model)).logits
    assert close(logit_lens(model, cache)[0], stopped)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bert"])
def test_a_lens_of_some_layers_and_positions(family: str) -> None:
    model = body(family, "eager")
    _, cache = run(model)
    whole = logit_lens(model, cache)
    assert torch.equal(logit_lens(model, cache, layers=slice(1, None)), whole[1:])
    assert torch.equal(logit_lens(model, cache, layers=[2, 0]), whole[[2, 0]])
    assert close(logit_lens(model, cache, position=-1), whole[:, :, -1], 1e-5)
    assert close(logit_lens(model, cache, position=slice(2, 4)), whole[:, :, 2:4], 1e-5)
    each = logit_lens(model, cache, position=torch.tensor([3, 6]))
    assert close(each, torch.stack([whole[:, 0, 3], whole[:, 1, 6]], 1), 1e-5)


def test_a_lens_looks_through_the_clean_model_and_sees_the_changed_stream() -> None:
    model = body("gpt2")
    parts = anatomy(model)
    _, clean = run(model, parts.resid_post)
    with (
        steer(model, parts.resid_post[0], torch.ones(32)),
        ablate(model, parts.logits),
        capture(model, parts.final_norm),
    ):
        with capture(model, parts.resid_post) as cache:
            model(**padded(model))
        lens = logit_lens(model, cache)
    assert close(lens[0], logit_lens(model, {**clean, parts.resid_post[0]: clean[parts.resid_post[0]] + 1})[0])
    assert lens[0].any()


def test_resid_mid_has_a_lens_too() -> None:
    for family in ("llama", "bert"):
        model = body(family)
        parts = anatomy(model)
        _, cache = run(model, parts.resid_mid)
        norm = parts.module("final_norm") if family == "llama" else parts.module("attn_norm", LAYER)
        expected = parts.module("unembed")(norm(cache[parts.resid_mid[LAYER]]))
        assert close(logit_lens(model, cache, "resid_mid")[LAYER], expected)


# --- direct logit attribution -----------------------------------------------------------------------------------------


@each_sum
@pytest.mark.parametrize("per_head", [False, True])
def test_terms_sum_to_the_logit_and_to_the_difference(family: str, attention: str, per_head: bool) -> None:
    model = body(family, attention)
    logits, cache = run(model)
    softcap = anatomy(model).softcap
    if softcap is not None:
        logits = softcap * torch.atanh(logits / softcap)
    terms = direct_logit_attribution(model, cache, 7, against=5, per_head=per_head)
    assert close(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5])
    assert terms["rest"].abs().max() < 1e-4
    chosen, other = torch.tensor([11, 30]), [40, 7]
    terms = direct_logit_attribution(model, cache, chosen, other, position=3, per_head=per_head)
    rows = torch.arange(2)
    assert close(sum(terms.values()), logits[rows, 3, chosen] - logits[rows, 3, other])
    at = torch.tensor([6, 4])
    terms = direct_logit_attribution(model, cache, 20, position=at, per_head=per_head)
    assert close(sum(terms.values()), logits[rows, at, 20])


@each_sum
def test_the_terms_of_heads_sum_to_that_of_their_layer(family: str, attention: str) -> None:
    model = body(family, attention)
    _, cache = run(model)
    whole = direct_logit_attribution(model, cache, 7, against=5)
    heads = direct_logit_attribution(model, cache, 7, against=5, per_head=True)
    for layer in range(3):
        own = [value for what, value in heads.items() if what.startswith((f"z[{layer}]", f"attn_out[{layer}]"))]
        assert len(own) in (4, 5)
        assert close(sum(own), whole[f"attn_out[{layer}]"])
    for what in ("resid_pre[0]", "mlp_out[2]", "final_norm bias", "logits bias"):
        assert torch.equal(heads[what], whole[what])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_a_term_is_what_the_logit_loses_without_it_at_the_same_scale(family: str) -> None:
    """By the definition, with the norm rewritten by hand."""
    model = body(family)
    parts = anatomy(model)
    _, cache = run(model)
    last, term = cache[parts.resid_post[-1]][:, -1], cache[parts.mlp_out[1]][:, -1]
    norm = parts.module("final_norm")
    if family == "gpt2":
        centred, scale = (
            term - term.mean(-1, keepdim=True),
            (last.var(-1, correction=0, keepdim=True) + norm.eps).sqrt(),
        )
        normed = centred / scale * norm.weight
    else:
        eps = norm.variance_epsilon if family == "llama" else norm.eps
        gain = norm.weight + (family == "gemma")
        normed = term / (last.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain
    weight = model.lm_head.weight
    expected = normed @ (weight[7] - weight[5])
    assert close(direct_logit_attribution(model, cache, 7, against=5)["mlp_out[1]"], expected)


def test_the_names_of_the_terms_are_the_parts_in_order() -> None:
    model = body("gpt2")
    _, cache = run(model)
    terms = direct_logit_attribution(model, cache, 7)
    branches = [f"{what}[{layer}]" for layer in range(3) for what in ("attn_out", "mlp_out")]
    assert list(terms) == ["resid_pre[0]", *branches, "final_norm bias", "logits bias", "rest"]
    heads = list(direct_logit_attribution(model, cache, 7, per_head=True))
    assert heads[1:7] == [*[f"z[0].head({i})" for i in range(4)], "attn_out[0] bias", "mlp_out[0]"]
    assert "attn_out[0] bias" not in direct_logit_attribution(body("llama"), run(body("llama"))[1], 7, per_head=True)


def test_what_an_intervention_puts_into_the_stream_is_the_rest() -> None:
    model = body("gpt2")
    parts = anatomy(model)
    with steer(model, parts.resid_post[0], torch.ones(32).cumsum(0)):
        logits, cache = run(model)
    terms = direct_logit_attribution(model, cache, 7, against=5)
    assert close(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5])
    assert terms["rest"].abs().min() > 0.01


def test_what_an_intervention_makes_of_the_final_norm_is_in_the_rest() -> None:
    for family in ("gpt2", "llama"):
        model = body(family)
        for act in (steer(model, anatomy(model).final_norm, torch.ones(32)), ablate(model, anatomy(model).final_norm)):
            with act:
                logits, cache = run(model)
            terms = direct_logit_attribution(model, cache, 7, against=5)
            assert close(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5])
            assert terms["rest"].abs().min() > 0.001


@pytest.mark.parametrize("per_head", [False, True])
def test_a_model_without_norms_and_mlps_has_a_lens_and_an_attribution(per_head: bool) -> None:
    no_mlp = dict.fromkeys(("resid_mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out"), Lacks("it is all attention"))
    table = Family(
        blocks="blocks",
        attn="",
        attn_proj="out",
        token_embedding="embedding",
        final_norm=Lacks("it has no norms"),
        unembed=("unembedding",),
        n_heads=2,
        d_model=8,
        parts={**no_mlp, "attn_in": "@input[0]", "attn_out": "out"},
    )
    torch.manual_seed(0)
    model, ids = AttentionOnly(), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    register_anatomy(AttentionOnly, table)
    try:
        parts = anatomy(model)
        with capture(model, parts.resid_pre[0], parts.attn_out, parts.z, parts.resid_post) as cache:
            logits = model(ids)
        lens = logit_lens(model, cache)
        terms = direct_logit_attribution(model, cache, 7, against=5, per_head=per_head)
    finally:
        del FAMILIES[AttentionOnly]
    assert close(lens[-1], logits)
    assert close(lens[0], model.unembedding(cache[parts.resid_post[0]]))
    assert close(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5])
    assert terms["rest"].abs().max() < 1e-5
    branches = ["z[0].head(0)", "z[0].head(1)", "attn_out[0] bias"] if per_head else ["attn_out[0]", "attn_out[1]"]
    assert list(terms)[1 : 1 + len(branches)] == branches


def test_low_precision_sums_up_too() -> None:
    model = body("llama").to(torch.bfloat16)
    try:
        logits, cache = run(model)
        terms = direct_logit_attribution(model, cache, 7, against=5, per_head=True)
    finally:
        body.cache_clear()
    assert sum(terms.values()).dtype == torch.float32
    assert close(sum(terms.values()), (logits[:, -1, 7] - logits[:, -1, 5]).float(), atol=0.05)


def test_a_bias_of_the_unembedding_is_a_term() -> None:
    model = body("gpt2")
    parts = anatomy(model)
    head = nn.Linear(32, VOCABULARY).requires_grad_(False)
    plain, model.lm_head = model.lm_head, head
    try:
        logits, cache = run(model)
        terms = direct_logit_attribution(model, cache, [7, 8], against=5)
    finally:
        model.lm_head = plain
    assert parts.n_layers == 3
    assert torch.equal(terms["logits bias"], head.bias[[7, 8]] - head.bias[5])
    assert close(sum(terms.values()), logits[[0, 1], -1, [7, 8]] - logits[:, -1, 5])


# --- results of heads -------------------------------------------------------------------------------------------------


@each_body
def test_results_of_heads_are_what_ablating_them_takes_away(family: str, attention: str) -> None:
    model = body(family, attention)
    parts = anatomy(model)
    _, cache = run(model)
    results = head_results(model, cache, LAYER)
    assert results.shape == (2, 7, 4, 32)
    assert torch.equal(head_results(model, cache)[LAYER], results)
    if family in NORMED_INPUT:  # the norm behind takes another scale without the head
        assert close(results.sum(2), cache[parts.attn_out[LAYER]], 1e-5)
        return
    with ablate(model, parts.z[LAYER].head(2)), capture(model, parts.attn_out[LAYER]) as without:
        model(**padded(model))
    lost = cache[parts.attn_out[LAYER]] - without[parts.attn_out[LAYER]]
    assert close(results[:, :, 2], lost, 1e-5)
    bias = parts.module("attn_proj", LAYER).bias
    assert close(results.sum(2) + (0 if bias is None else bias), cache[parts.attn_out[LAYER]], 1e-5)


def test_results_of_one_layer_need_that_layer_alone() -> None:
    model = body("gpt2")
    _, cache = run(model, anatomy(model).z[2])
    assert head_results(model, cache, 2).shape == head_results(model, cache, -1).shape == (2, 7, 4, 32)
    assert head_results(model, dict(cache), 2).shape == (2, 7, 4, 32)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_what_is_not_captured_is_said_with_the_line_that_captures_it() -> None:
    model = body("gpt2")
    _, cache = run(model, anatomy(model).mlp_out, anatomy(model).resid_post[1:])
    for call, says in [
        (
            lambda: direct_logit_attribution(model, cache, 7),
            "direct_logit_attribution reads what is not in this cache: resid_pre[0], attn_out[0], attn_out[1], … 2 more"
            ". Capture it in the same run:\n"
            "    parts = anatomy(model)\n"
            "    with capture(model, parts.resid_pre[0], parts.attn_out, parts.mlp_out, parts.resid_post[2], "
            "parts.final_norm) as cache:\n"
            "        model(…)",
        ),
        (
            lambda: head_results(model, cache, 1),
            "head_results reads what is not in this cache: z[1]. Capture it in the same run:\n"
            "    parts = anatomy(model)\n"
            "    with capture(model, parts.z[1]) as cache:\n"
            "        model(…)",
        ),
        (
            lambda: logit_lens(model, cache),
            "logit_lens reads what is not in this cache: resid_post[0]. Capture it in the same run:\n"
            "    parts = anatomy(model)\n"
            "    with capture(model, parts.resid_post) as cache:\n"
            "        model(…)",
        ),
    ]:
        with pytest.raises(NotCaptured) as raised:
            call()
        assert str(raised.value) == says


@pytest.mark.parametrize("family", POST_NORM)
def test_no_attribution_where_norms_stand_on_the_stream(family: str) -> None:
    model = body(family)
    with pytest.raises(
        UnsupportedModule, match=r"has its norms on the residual stream.*logit_lens\(model, cache\) works"
    ):
        direct_logit_attribution(model, run(model)[1], 7)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tokens": VOCABULARY}, TreeMismatch, f"token {VOCABULARY} is not among the {VOCABULARY} of this model."),
        ({"tokens": [1, 2, 3]}, TreeMismatch, "3 tokens came for a batch of 2."),
        ({"tokens": " Paris"}, TreeMismatch, "tokens are given by their ids, one or one per example, not ' Paris'."),
        (
            {"tokens": 1.5},
            TreeMismatch,
            "tokens are given by their ids, one or one per example, not as Tensor[] float32.",
        ),
        ({"tokens": 1, "against": -1}, TreeMismatch, f"token -1 is not among the {VOCABULARY} of this model."),
        ({"tokens": 1, "position": 7}, TreeMismatch, "position=7 is no position of Tensor[2, 7, 32] float32"),
        (
            {"tokens": 1, "position": slice(0, 2)},
            TreeMismatch,
            "position=slice(0, 2, None): the logits of one position",
        ),
    ],
)
def test_bad_input_of_an_attribution(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = body("gpt2")
    with pytest.raises(error) as raised:
        direct_logit_attribution(model, run(model)[1], **options)
    assert str(raised.value).startswith(says)


def test_bad_input_of_a_lens() -> None:
    model = body("gpt2")
    _, cache = run(model)
    with pytest.raises(
        UnsupportedModule, match="reads the residual stream, resid_pre, resid_mid or resid_post, and not 'z'"
    ):
        logit_lens(model, cache, "z")
    with pytest.raises(SiteNotFound, match=r"layers=\[3\]: a slice or a list of layers, 0 … 2\."):
        logit_lens(model, cache, layers=[3])
    with pytest.raises(SiteNotFound, match="layers=1: a slice or a list"):
        logit_lens(model, cache, layers=1)  # type: ignore[arg-type]
    bare = model.transformer
    with capture(bare, anatomy(bare).resid_post) as own:
        bare(**padded(model))
    with pytest.raises(UnsupportedModule, match="GPT2Model has no unembedding"):
        logit_lens(bare, own)


def test_parts_of_two_runs_or_of_all_calls_are_refused() -> None:
    model = body("gpt2")
    parts = anatomy(model)
    _, cache = run(model)
    with pytest.raises(
        TreeMismatch, match=r"mlp_out\[1\] is Tensor\[2, 3, 32\] float32, but the stream is .*: two runs\?"
    ):
        direct_logit_attribution(model, {**cache, parts.mlp_out[1]: torch.ones(2, 3, 32)}, 7)
    with capture(model, parts.z, keep="all") as every:
        model(**padded(model))
    with pytest.raises(TreeMismatch, match=r"head_results takes one tensor per part, but z\[0\] is"):
        head_results(model, every)


def test_what_the_norms_add_to_their_weights_is_found_and_not_said() -> None:
    """Gemma's gain is 1 + weight, Llama's the weight; nothing says which."""
    for family in ("gemma", "llama"):
        model = copy.deepcopy(body(family))
        nn.init.normal_(anatomy(model).module("final_norm").weight)
        logits, cache = run(model)
        terms = direct_logit_attribution(model, cache, 7)
        assert close(sum(terms.values()), logits[:, -1, 7]) and terms["rest"].abs().max() < 1e-3


def test_a_norm_that_is_none_is_refused() -> None:
    model = copy.deepcopy(body("gemma"))
    norm = anatomy(model).module("final_norm")
    norm.forward = lambda x: x.tanh() * norm.weight
    with pytest.raises(UnsupportedModule, match=r"GemmaRMSNorm is no LayerNorm or RMSNorm with gain weight or 1 \+ w"):
        direct_logit_attribution(model, run(model)[1], 7)


# --- a trained model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_llama() -> None:
    """SmolLM2: grouped queries, fused attention, thirty layers."""
    model = smollm2()
    parts = anatomy(model)
    ids = tokens(1, batch=2, length=9) + 100
    with (
        torch.no_grad(),
        capture(
            model, parts.resid_pre, parts.attn_out, parts.z, parts.mlp_out, parts.resid_post, parts.final_norm
        ) as acts,
    ):
        logits = model(ids).logits
    with torch.no_grad(), capture(model, parts.pattern[9].head(6), parts.v[9]) as attention:
        model(ids)
    pattern = attention[parts.pattern[9].head(6)]
    assert pattern.shape == (2, 9, 9) and torch.allclose(pattern.sum(-1), torch.ones(2, 9), atol=1e-5)
    z = pattern @ attention[parts.v[9].head(6 // (parts.n_heads // parts.n_kv_heads))]
    assert torch.allclose(z, acts[parts.z[9].head(6)], atol=1e-5)
    with torch.no_grad():
        lens = logit_lens(model, acts, position=-1)
        assert lens.shape == (30, 2, logits.shape[-1]) and close(lens[-1], logits[:, -1], 1e-3)
        best = logits[:, -1].argmax(-1)
        for per_head in (False, True):
            terms = direct_logit_attribution(model, acts, best, against=100, per_head=per_head)
            assert len(terms) == (304 if per_head else 64)
            total = sum(terms.values())
            assert close(total, logits[[0, 1], -1, best] - logits[:, -1, 100])
            assert terms["rest"].abs().max() < 1e-3
        with patch(model, parts.pattern[9].head(6), 0.0), capture(model, parts.attn_out[9]) as without:
            model(ids)
        lost = acts[parts.attn_out[9]] - without[parts.attn_out[9]]
        assert close(head_results(model, acts, 9)[:, :, 6], lost, 1e-4)
