"""What the residual stream and its terms say about logits: logit lens, direct logit attribution, results of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.finding import Anatomy, find_anatomy
from nicehooks.anatomies.linear import last_linear_part, logit_direction, results_of_heads, unembedded
from nicehooks.anatomies.parts import Part
from nicehooks.anatomies.reading import reader_of
from nicehooks.contexts.suspending import suspend
from nicehooks.errors import SiteNotFound, TreeMismatch, UnsupportedModule
from nicehooks.values.trees import structure_of

Tokens = int | Sequence[int] | Tensor
Position = int | slice | Tensor | None

STREAM = ("resid_pre", "resid_mid", "resid_post")


def logit_lens(
    model: nn.Module,
    cache: Mapping[Any, Any],
    part: str = "resid_post",
    *,
    layers: slice | Sequence[int] | None = None,
    position: Position = None,
) -> Tensor:
    """The logits that the model would give if it stopped after each layer (nostalgebraist 2020, "Logit Lens").

    The residual stream goes through the final norm and the unembedding of the model, clean of interventions.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=32, vocab_size=100)).eval()
    >>> with capture(model, anatomy(model).resid_post) as cache:
    ...     logits = model(torch.tensor([[3, 1, 4, 1, 5]])).logits
    >>> lens = logit_lens(model, cache)
    >>> lens.shape, torch.allclose(lens[-1], logits, atol=1e-5)
    (torch.Size([4, 1, 5, 100]), True)

    A model whose norms are on the stream (BERT) has no final norm: what leaves a layer goes through the norm of that
    layer, as on its way to the next one. Where the table of a model says that it lacks a final norm, none is applied.

    Args:
        model: a model with a language modelling head that `anatomy` knows.
        cache: activations with `anatomy(model).resid_post`, or the `part` that was asked for.
        part: `"resid_post"`, `"resid_mid"` or `"resid_pre"`.
        layers: which layers; all if None.
        position: one position, or a slice of them; for one position per example, a tensor `[batch]`. All if None.

    Returns:
        `[layer, batch, pos, vocab]`; without `pos` for one position.

    Raises:
        NotCaptured: the cache lacks a layer; the message has the line that captures it.
        UnsupportedModule: the model has no unembedding, or no such part.
    """
    body = find_anatomy(model)
    if part not in STREAM:
        raise UnsupportedModule(
            f"logit_lens reads the residual stream, {', '.join(STREAM[:-1])} or {STREAM[-1]}, and not {part!r}."
        )
    chosen = _chosen(body, layers)
    sites = [getattr(body, part)[layer] for layer in chosen]
    read = reader_of(body, cache, "logit_lens", sites)
    rows = [_at_position(read(site), position) for site in sites]
    with suspend(model):
        return torch.stack([unembedded(body, _normed(body, part, i, row)) for i, row in zip(chosen, rows, strict=True)])


def direct_logit_attribution(
    model: nn.Module,
    cache: Mapping[Any, Any],
    tokens: Tokens,
    against: Tokens | None = None,
    position: int | Tensor = -1,
    per_head: bool = False,
) -> dict[str, Tensor]:
    """How much each layer, or head, adds to a logit: direct logit attribution (Elhage et al. 2021).

    The residual stream is a sum, and the final norm, at the scale that it had in this very run, is linear: so is the
    logit. The terms add up to it (or to the difference of two logits), from "A Mathematical Framework for Transformer
    Circuits".

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture
    >>> model, ids = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=100)).eval(), [[3, 1, 4]]
    >>> parts = anatomy(model)
    >>> ends = parts.resid_pre[0], parts.resid_post[-1], parts.final_norm
    >>> with capture(model, parts.attn_out, parts.mlp_out, *ends) as cache:
    ...     logits = model(torch.tensor(ids)).logits
    >>> terms = direct_logit_attribution(model, cache, 7, against=5)
    >>> list(terms)[:3], len(terms)
    (['resid_pre[0]', 'attn_out[0]', 'mlp_out[0]'], 8)
    >>> torch.allclose(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5], atol=1e-5)
    True

    Args:
        model: a model with a language modelling head, whose norms are on the branches (not BERT).
        cache: activations with `resid_pre[0]`, `attn_out` (with `per_head`, `z`), `mlp_out`, `resid_post[-1]` and
            `final_norm` of `anatomy(model)`, as far as the model has them.
        tokens: the token whose logit it is, or one per example.
        against: the token whose logit is subtracted, likewise; None subtracts nothing.
        position: the position whose logits these are, or one per example, `[batch]`.
        per_head: gives each head a term of its own.

    Returns:
        One term `[batch]` per name, in the order of the model: `"resid_pre[0]"` (the embeddings), `"attn_out[i]"` (or
        `"z[i].head(h)"` and `"attn_out[i] bias"`), `"mlp_out[i]"`; then `"final_norm bias"` and `"logits bias"`, and
        `"rest"`: rounding, and whatever an intervention put into the stream or made of the final norm. Of logits with a
        soft cap, these are the terms before it; an intervention on the logits themselves is in none of them.

    Raises:
        NotCaptured: the cache lacks a part; the message has the line that captures it.
        UnsupportedModule: the model has no unembedding, or the norms stand on the stream.
    """
    body = find_anatomy(model)
    if body.post_norm:
        raise UnsupportedModule(POST_NORM.format(kind=body.kind))
    if not isinstance(position, int | Tensor):
        raise TreeMismatch(
            f"position={position!r}: the logits of one position, an int, or of one per example, [batch]."
        )
    branches = _branches(body, per_head)
    ends = [body.resid_post[-1], *([] if body.lacks("final_norm") else [body.final_norm])]
    read = reader_of(
        body, cache, "direct_logit_attribution", [body.resid_pre[0], *(part for _, part in branches), *ends]
    )
    first, last = read(body.resid_pre[0]), _at_position(read(body.resid_post[-1]), position)
    terms = {"resid_pre[0]": _at_position(first, position).float()}
    with suspend(model):
        for layer, part in branches:
            value = read(part)
            if part.what.startswith("z["):
                terms.update(_terms_of_heads(body, layer, part, _at_position(value, position)))
            else:
                terms[part.what] = _at_position(_like_stream(value, first, part), position).float()
        norm = last_linear_part(body, last)
        to, bias = logit_direction(body, tokens, against, batch=len(last))
    read_by_unembed = _at_position(_like_stream(read(ends[-1]), first, ends[-1]), position)
    rest = read_by_unembed.float() - norm.of(torch.stack(list(terms.values())).sum(0)) - norm.bias
    found = {what: (norm.of(term) * to).sum(-1) for what, term in terms.items()}
    return {
        **found,
        "final_norm bias": (norm.bias * to).sum(-1),
        "logits bias": bias,
        "rest": (rest * to).sum(-1),
    }


def head_results(model: nn.Module, cache: Mapping[Any, Any], layer: int | None = None) -> Tensor:
    """What each head adds to `attn_out`; the bias of the projection is apart.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=100)).eval()
    >>> with capture(model, anatomy(model).z) as cache:
    ...     _ = model(torch.tensor([[3, 1, 4, 1, 5]]))
    >>> head_results(model, cache, 1).shape, head_results(model, cache).shape
    (torch.Size([1, 5, 4, 32]), torch.Size([2, 1, 5, 4, 32]))

    Args:
        model: a model that `anatomy` knows.
        cache: activations with `anatomy(model).z`, of all layers or of the one.
        layer: which layer; all if None.

    Returns:
        `[batch, pos, head, d_model]`; for all layers, `[layer, batch, pos, head, d_model]`.

    Raises:
        NotCaptured: the cache lacks `z`; the message has the line that captures it.
    """
    body = find_anatomy(model)
    layers = range(body.n_layers) if layer is None else [layer]
    sites = [body.z[one] for one in layers]
    read = reader_of(body, cache, "head_results", sites)
    with suspend(model):
        results = [results_of_heads(body, one, read(site))[0] for one, site in zip(layers, sites, strict=True)]
    return torch.stack(results) if layer is None else results[0]


POST_NORM = (
    "{kind} has its norms on the residual stream, one after each addition: a term of the stream goes through all norms "
    "that follow, and adds nothing to the logits that is apart from the others. logit_lens(model, cache) works."
)


NO_PLAIN_SUM = (
    "in layer {layer} of {kind} the stream is not plainly a sum of what its branches add: no logit can be taken apart "
    "into what each of them adds. logit_lens(model, cache) works."
)


def _chosen(body: Anatomy, layers: slice | Sequence[int] | None) -> list[int]:
    every = range(body.n_layers)
    if layers is None or isinstance(layers, slice):
        return list(every[layers or slice(None)])
    if isinstance(layers, int) or not all(isinstance(layer, int) and layer in every for layer in layers):
        raise SiteNotFound(f"layers={layers!r}: a slice or a list of layers, 0 … {body.n_layers - 1}.")
    return list(layers)


def _at_position(value: Tensor, position: Position) -> Tensor:
    """`value`, `[batch, pos, …]`, at one position, at some, or at one per example."""
    if position is None:
        return value
    try:
        if isinstance(position, Tensor):
            return value[torch.arange(len(value), device=value.device), position.to(value.device)]
        return value[:, position]
    except (IndexError, TypeError):
        shown = structure_of(position) if isinstance(position, Tensor) else repr(position)
        raise TreeMismatch(f"position={shown} is no position of {structure_of(value)}, [batch, pos, …].") from None


def _like_stream(value: Tensor, stream: Tensor, part: Part) -> Tensor:
    if value.shape != stream.shape:
        raise TreeMismatch(f"{part.what} is {structure_of(value)}, but the stream is {structure_of(stream)}: two runs?")
    return value


# --- terms ------------------------------------------------------------------------------------------------------------


def _normed(body: Anatomy, part: str, layer: int, row: Tensor) -> Tensor:
    """The stream behind the norm that comes next on the way to the logits."""
    if not body.post_norm:
        return row if body.lacks("final_norm") else body.module("final_norm")(row)
    if part == "resid_pre":
        return row
    return body.module("mlp_norm" if part == "resid_post" else "attn_norm", layer)(row)


def _branches(body: Anatomy, per_head: bool) -> list[tuple[int, Part]]:
    """What is added to the stream, in order, with the layer that adds it; of attention, the heads where it has them."""
    found: list[tuple[int, Part]] = []
    for layer, places in enumerate(body.layout.layers):
        if not places.form or any(step.kind != "add" for step in places.form):
            raise UnsupportedModule(NO_PLAIN_SUM.format(kind=body.kind, layer=layer))
        for step in places.form:
            heads = per_head and step.what == "attn_out" and places.has("z") and body.has("attn_proj", layer)
            found.append((layer, body["z" if heads else step.what, layer]))
    return found


def _terms_of_heads(body: Anatomy, layer: int, part: Part, z: Tensor) -> dict[str, Tensor]:
    results, bias = results_of_heads(body, layer, z)
    terms = {part.head(i).what: results[..., i, :].float() for i in range(body.n_heads)}
    return {**terms, f"attn_out[{layer}] bias": bias.float()} if bias.any() else terms
