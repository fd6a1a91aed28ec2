"""`score_attribution`: why a head attends there. An attention score as a sum over pairs of upstream parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.anatomy import Anatomy
from nicehooks.anatomies.linear import LinearPart, linear_part, results_of_heads
from nicehooks.anatomies.parts import Part
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.suspending import suspend
from nicehooks.errors import NotCaptured, SiteNotFound, TreeMismatch
from nicehooks.experiments.effects import Axis, Effects
from nicehooks.experiments.score_forms import ScoreForm, score_form
from nicehooks.experiments.wiring import Wiring
from nicehooks.values import trees


class ScoreTerms(Effects):
    """An attention score, taken apart: the baseline and all cells together are the score.

    Attributes:
        score: `[batch]`.
    """

    score: Tensor


def score_attribution(model: nn.Module, cache: Mapping[Any, Any], part: Part, query: int, key: int) -> ScoreTerms:
    """Why a head attends there: its score for one query and one key, as a sum over pairs of upstream parts.

    A score is a product of a query and a key, and each of these is linear in the residual stream at its position, with
    the norms at the scale that they had in this very run. The stream is the sum of what earlier parts have written. So
    the score is a sum over pairs: what this part at the query, and that part at the key, add to it.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50)).eval()
    >>> parts = anatomy(model)
    >>> with capture(model, parts.resid_pre, parts.z, parts.mlp_out, parts.scores) as cache:
    ...     _ = model(torch.tensor([[3, 1, 4, 1, 5]]))
    >>> terms = score_attribution(model, cache, parts.scores[1].head(0), query=-1, key=2)
    >>> terms.axes[0].labels
    ('resid_pre[0]', 'z[0].head(0)', 'z[0].head(1)', 'mlp_out[0]', 'bias', 'rest')
    >>> bool((terms.values.sum() - cache[parts.scores[1]][0, 0, -1, 2]).abs() < 1e-4)
    True

    Args:
        model: a model that `anatomy` knows, with its norms on the branches.
        cache: activations with `resid_pre[0]`, `z` and `mlp_out` of the layers before, and `resid_pre` of the layer;
            where it has the `scores`, too, the sum is compared with them.
        part: which head of which layer: `parts.scores[5].head(2)`; `pattern`, `q` and `z` mean the same head.
        query: the position that attends.
        key: the position that is attended to.

    Returns:
        `[query part, key part]`: the terms. `"bias"` is what the biases of norm and projection give; `"rest"` is
        rounding, and whatever an intervention has put into the stream. The baseline is what no part has to do with: a
        bias of positions.

    Raises:
        NotCaptured: the cache lacks a part; the message has the line that captures it.
        SiteNotFound: `part` is no head; the query does not see the key.
        UnsupportedModule: the norms stand on the stream; or the scores are no product of queries and keys.
        TreeMismatch: the terms do not add up to the score in the cache: its positions were not 0, 1, 2, …
    """
    wiring = Wiring(model)
    body = wiring.body
    layer, head = head_meant(body, part)
    read = _reading(wiring, cache, layer)
    length = read[str(body.resid_pre[layer])].shape[1]
    query, key = _position(query, length, "query"), _position(key, length, "key")
    form = score_form(wiring, layer, head, query, key)
    with suspend(model), torch.no_grad():
        names, queries = _terms_behind(wiring, read, layer, query, "q", form.query_norm)
        _, keys = _terms_behind(wiring, read, layer, key, "k", form.key_norm)
        own = keys[:, :, head // (body.n_heads // body.n_kv_heads)]
        each = torch.einsum("nbi,ij,mbj->nmb", queries[:, :, head].double(), form.matrix.double(), own.double())
    return _as_terms(body, names, each.float(), form, cache, (layer, head, query, key))


def head_meant(body: Anatomy, part: Part) -> tuple[int, int]:
    """The layer and the head that a part is of."""
    found = re.match(r"(scores|pattern|q|z)\[(\d+)\]\.head\((-?\d+)\)$", getattr(part, "what", str(part)))
    if found is None:
        shown = getattr(part, "what", part)
        raise SiteNotFound(f"{shown!r} is no head of a layer: score_attribution takes parts.scores[5].head(2).")
    return int(found[2]), int(found[3]) % body.n_heads


def _position(position: int, length: int, what: str) -> int:
    if not -length <= position < length:
        raise SiteNotFound(f"{what}={position}: the run in the cache has {length} positions, 0 … {length - 1}.")
    return position % length


def _reading(wiring: Wiring, cache: Mapping[Any, Any], layer: int) -> dict[str, Tensor]:
    """What is read of the cache, by path."""
    body = wiring.body
    acts = cache if isinstance(cache, ActivationCache) else ActivationCache({str(at): cache[at] for at in cache})
    branches = [part for i in range(layer) for part in (body.z[i], *((body.mlp_out[i],) if wiring.has_mlp else ()))]
    parts = [body.resid_pre[0], *branches, body.resid_pre[layer]]
    missing = [part.what for part in parts if part not in acts]
    if missing:
        mlp = ", parts.mlp_out" if wiring.has_mlp else ""
        raise NotCaptured(NOT_IN_CACHE.format(missing=", ".join(missing[:3]), mlp=mlp))
    return {str(part): acts[part] for part in parts}


NOT_IN_CACHE = (
    "score_attribution reads what is not in this cache: {missing}. Capture it in the same run:\n"
    "    parts = anatomy(model)\n"
    "    with capture(model, parts.resid_pre, parts.z{mlp}, parts.scores) as cache:\n"
    "        model(…)"
)


# --- terms ------------------------------------------------------------------------------------------------------------


def _terms_of_stream(wiring: Wiring, read: Mapping[str, Tensor], layer: int, position: int) -> dict[str, Tensor]:
    """What the parts before a layer have written at one position, `[batch, d_model]` each."""
    body = wiring.body
    terms = {"resid_pre[0]": read[str(body.resid_pre[0])][:, position]}
    for i in range(layer):
        results, bias = results_of_heads(body, i, read[str(body.z[i])][:, position])
        terms |= {f"z[{i}].head({head})": results[:, head] for head in range(body.n_heads)}
        terms |= {f"attn_out[{i}] bias": bias.expand_as(results[:, 0])} if bias.any() else {}
        if wiring.has_mlp:
            terms[f"mlp_out[{i}]"] = read[str(body.mlp_out[i])][:, position]
    return {name: term.float() for name, term in terms.items()}


def _terms_behind(
    wiring: Wiring, read: Mapping[str, Tensor], layer: int, position: int, what: str, norm: nn.Module | None
) -> tuple[list[str], Tensor]:
    """The terms as they are in the queries or keys, `[term, batch, head, d_head]`, and their names."""
    stream, terms = (
        read[str(wiring.body.resid_pre[layer])][:, position],
        _terms_of_stream(wiring, read, layer, position),
    )
    rest = stream.float() - torch.stack(list(terms.values())).sum(0)
    linear = _norm_of_stream(wiring.body, layer, stream)
    normed = linear.of(torch.stack([*terms.values(), rest]))
    bias = linear.bias.expand_as(normed[:1])
    every = torch.cat([normed, bias, torch.zeros_like(bias)]).to(stream.dtype)
    part: Part = getattr(wiring.body, what)[layer]
    made = trees.get(wiring.modules[part.plain_name](every), part.chain).float()
    of_terms, of_bias = made[:-2] - made[-1], made[-2:-1]
    names = [*terms, "bias", "rest"]
    found = torch.cat([of_terms[:-1], of_bias, of_terms[-1:]])
    return names, found if norm is None else _behind_norm(norm, found)


def _norm_of_stream(body: Anatomy, layer: int, stream: Tensor) -> LinearPart:
    if body.has("attn_norm", layer):
        return linear_part(body.module("attn_norm", layer), stream)
    return LinearPart(
        torch.ones_like(stream[..., :1], dtype=torch.float32), stream.new_zeros(stream.shape[-1]).float(), False
    )


def _behind_norm(norm: nn.Module, terms: Tensor) -> Tensor:
    """The terms behind a norm of the queries or keys, at the scale that it had; its bias is one of the bias."""
    weight: Any = getattr(norm, "weight", None)
    flat = weight is not None and weight.shape[-1] == terms.shape[-1] * terms.shape[-2] and terms.shape[-2] > 1
    laid = terms.flatten(-2) if flat else terms
    linear = linear_part(norm, laid.sum(0))
    found = linear.of(laid)
    found[-2] += linear.bias
    return found.unflatten(-1, terms.shape[-2:]) if flat else found


def _as_terms(
    body: Anatomy,
    names: list[str],
    each: Tensor,
    form: ScoreForm,
    cache: Mapping[Any, Any],
    place: tuple[int, int, int, int],
) -> ScoreTerms:
    layer, head, query, key = place
    score = each.sum((0, 1)) + form.constant
    scores = body.scores[layer] if body.attention in ("eager", "sdpa") else None
    if scores is not None and str(scores) in cache:
        expected = cache[str(scores)][:, head, query, key].float()
        if not torch.allclose(score, expected, rtol=2e-3, atol=2e-3):
            raise TreeMismatch(NOT_THE_SCORE.format(score=score.tolist(), expected=expected.tolist()))
    axes = [Axis("query part", tuple(names)), Axis("key part", tuple(names))]
    note = f"terms of the score of head {head} of layer {layer}, at query {query} for key {key}"
    found = ScoreTerms(each.mean(-1), axes, form.constant, (), each, [note])
    found.score = score
    return found


NOT_THE_SCORE = (
    "the terms add up to {score}, but the scores in the cache are {expected}: the positions of that run were not "
    "0, 1, 2, …, or an intervention has changed what stands between the stream and the scores."
)
