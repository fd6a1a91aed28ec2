"""Models that people write themselves: what is handed out of them holds, what does not is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from gallery.own_transformers import (
    HEADS,
    WIDTH,
    BranchAlone,
    BranchAndStream,
    InDicts,
    InEinsums,
    Inline,
    OfTensors,
    OwnTransformer,
    SideBySide,
    Weighed,
    WithoutSoftmax,
)
from torch import nn

from nicehooks import UnsupportedModule, ablate, anatomy, capture, direct_logit_attribution, logit_lens

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
STREAM = ("resid_pre", "attn_out", "mlp_out", "resid_post")
HEADED = ("q", "k", "v", "pattern", "z")


def own(block: type[nn.Module], **settings: Any) -> OwnTransformer:
    torch.manual_seed(0)
    return OwnTransformer(block, **settings).eval().requires_grad_(False)


@pytest.mark.parametrize("block", [Inline, InEinsums, OfTensors, InDicts])
def test_attention_in_the_forward_of_a_layer_has_its_heads(block: type[nn.Module]) -> None:
    model = own(block)
    parts = anatomy(model)
    with capture(model, *(parts[part] for part in (*STREAM, *HEADED))) as acts:
        model(IDS)
    for layer in range(2):
        stream = [acts[parts[part, layer]] for part in STREAM]
        assert torch.allclose(sum(stream[:-1]), stream[-1], atol=1e-5)
        q, k, v, pattern, z = (acts[parts[part, layer]] for part in HEADED)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        assert q.shape == (2, 5, HEADS, 8) and torch.allclose(scores.softmax(-1), pattern, atol=1e-5)
        assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5)
    with ablate(model, parts.q[1].head(2)), capture(model, parts.pattern[1]) as without:
        model(IDS)
    changed = (without[parts.pattern[1]] - acts[parts.pattern[1]]).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False]


def test_what_mixes_positions_in_the_forward_of_a_layer_is_no_mlp() -> None:
    parts = anatomy(own(WithoutSoftmax))
    assert [str(parts.mixer_out[0]), str(parts.mlp_out[0])] == ["pile.0.out", "pile.0.mlp"]
    with pytest.raises(UnsupportedModule, match="has no attn_out: the layer has no attention"):
        _ = parts.attn_out


@pytest.mark.parametrize("norm", [None, lambda: nn.LayerNorm(WIDTH)])
def test_a_table_that_unembeds_too_gives_lens_and_attribution(norm: Any) -> None:
    model = own(Inline) if norm is None else own(Inline, norm=norm)
    parts = anatomy(model)
    assert parts.name("unembed") == "table" and parts.layout.passed["logits"] == "unembed(final_norm)"
    ends = parts.resid_pre[0], parts.resid_post, parts.final_norm
    with capture(model, parts.attn_out, parts.mlp_out, *ends) as cache:
        logits = model(IDS)
    assert torch.allclose(logit_lens(model, cache)[-1], logits, atol=1e-4)
    terms = direct_logit_attribution(model, cache, 7, against=5)
    assert torch.allclose(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5], atol=1e-4)
    assert terms["rest"].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (BranchAlone, r"nothing shows that it is the stream: .* it is not what the next layer reads"),
        (BranchAndStream, r"several values of one shape, and nothing shows which of them is the stream"),
    ],
)
def test_what_nothing_shows_to_be_the_stream_is_refused(block: type[nn.Module], why: str) -> None:
    parts = anatomy(own(block))
    for part in ("resid_pre", "resid_post"):
        with pytest.raises(UnsupportedModule, match=f"OwnTransformer has no {part}: .*{why}"):
            _ = parts[part]
    assert parts.pattern.layers == (0, 1)


def test_what_is_multiplied_as_it_is_added_is_refused_and_so_is_what_was_then_not_compared() -> None:
    parts = anatomy(own(Weighed))
    with pytest.raises(UnsupportedModule, match=r"resid_pre \+ attn_out is not the stream behind it"):
        _ = parts.attn_out
    with pytest.raises(UnsupportedModule, match=r"what is added before it was checked .* nothing shows that this is"):
        _ = parts.mlp_out


@pytest.mark.parametrize("make", [lambda: own(SideBySide), lambda: tiny("CohereForCausalLM")], ids=["own", "Cohere"])
def test_between_two_additions_of_branches_side_by_side_is_no_stream(make: Any) -> None:
    """The sum is there, but no branch reads it: an edit of it would not be one of what the MLP reads."""
    parts = anatomy(make())
    with pytest.raises(
        UnsupportedModule, match="no resid_mid: the branch that is added last reads what was there before"
    ):
        parts.resid_mid  # noqa: B018
    assert len(parts.attn_out) == len(parts.mlp_out) == len(parts.mlp_post) == parts.n_layers


def test_between_two_branches_one_after_the_other_is_the_stream() -> None:
    model = own(Inline)
    parts = anatomy(model)
    with capture(model, parts.resid_pre, parts.attn_out, parts.resid_mid) as acts:
        model(IDS)
    assert torch.allclose(acts[parts.resid_mid[0]], acts[parts.resid_pre[0]] + acts[parts.attn_out[0]], atol=1e-5)
