"""The bilinear form by which a head makes a score of a query and a key: rotary embedding, scale and all.

NOTE [A form that is asked for]
Between queries, keys and scores stand rotations, scales, shared keys, and other things that families have. They are not
written down here: the model runs on queries and keys of our own, and the form is the second derivative of the score. It
is checked that the score is that form and a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.anatomies.parts import Part
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.patching import patch
from nicehooks.contexts.suspending import suspend
from nicehooks.errors import SiteNotFound, UnsupportedModule
from nicehooks.experiments.wiring import Wiring
from nicehooks.paths.names import escape


class ScoreForm(NamedTuple):
    """`score = query · matrix · key + constant`, for one head at two positions.

    Attributes:
        matrix: `[d_head, d_head]`.
        constant: a bias of positions; mostly zero.
        query_norm: the norm that queries go through first, if there is one.
        key_norm: that of keys.
    """

    matrix: Tensor
    constant: Tensor
    query_norm: nn.Module | None
    key_norm: nn.Module | None


class _EntryPoint(NamedTuple):
    """Where queries or keys are put in, and how they lie there.

    Attributes:
        site: the path.
        norm: the module, where it is what a norm returns.
        value: in the run that it was found in.
        layout: `"positions"` is `[batch, pos, head, d_head]`, `"heads"` `[batch, head, pos, d_head]`, `"flat"`
            `[batch, pos, head * d_head]`.
    """

    site: str
    norm: nn.Module | None
    value: Tensor
    layout: str


def score_form(wiring: Wiring, layer: int, head: int, query: int, key: int) -> ScoreForm:
    """The form of one head at two positions; see NOTE [A form that is asked for].

    Raises:
        SiteNotFound: the query does not see the key.
        UnsupportedModule: the score is no such form (a soft cap, say).
    """
    body = wiring.body
    device = next(wiring.model.parameters()).device
    ids = torch.zeros(1, max(query, key) + 1, dtype=torch.long, device=device)
    with suspend(wiring.model):
        nodes = [_node(wiring, layer, what, ids) for what in ("q", "k")]
        random = torch.Generator().manual_seed(0)
        leaves = [_like(node.value, random) for node in nodes]
        values = {node.site: leaf for node, leaf in zip(nodes, leaves, strict=True)}
        with torch.enable_grad(), patch(wiring.model, values), capture(wiring.model, body.scores[layer]) as seen:
            wiring.model(ids)
        score = seen[body.scores[layer]][0, head, query, key]
    if not score > -1e30:
        raise SiteNotFound(f"query {query} does not see key {key} in layer {layer}: its score is masked.")
    shared = head // (body.n_heads // body.n_kv_heads)
    at_query, at_key = (nodes[0].layout, query, head), (nodes[1].layout, key, shared)
    with torch.enable_grad():
        slope = _row(torch.autograd.grad(score, leaves[0], create_graph=True)[0], body.d_head, *at_query)
        rows = [torch.autograd.grad(one, leaves[1], retain_graph=True)[0] for one in slope]
    matrix = torch.stack([_row(row, body.d_head, *at_key) for row in rows])
    q, k = _row(leaves[0], body.d_head, *at_query).detach(), _row(leaves[1], body.d_head, *at_key).detach()
    linear, both = q @ slope.detach(), q @ matrix @ k
    if not torch.allclose(linear, both, rtol=1e-3, atol=1e-4):
        raise UnsupportedModule(NO_FORM.format(kind=body.kind, layer=layer))
    constant = score.detach() - both
    constant = torch.where(constant.abs() < 1e-4 * (1 + both.abs()), torch.zeros_like(constant), constant)  # rounding
    return ScoreForm(matrix, constant.float(), nodes[0].norm, nodes[1].norm)


NO_FORM = (
    "a score in layer {layer} of {kind} is no product of a query and a key: it is capped, or something else is done "
    "to it."
)


def _like(value: Tensor, random: torch.Generator) -> Tensor:
    """Random queries or keys; large, so that a soft cap shows."""
    return (10 * torch.randn(value.shape, generator=random)).to(value).requires_grad_()


def _row(value: Tensor, d_head: int, layout: str, position: int, head: int) -> Tensor:
    """One position of one head, `[d_head]`."""
    if layout == "flat":
        return value[0, position].unflatten(-1, (-1, d_head))[head]
    return value[0, head, position] if layout == "heads" else value[0, position, head]


def _node(wiring: Wiring, layer: int, what: str, ids: Tensor) -> _EntryPoint:
    """Where the queries or keys of a layer are last, before they are rotated: behind their norm, if they have one."""
    part: Part = getattr(wiring.body, what)[layer]
    attention = wiring.body.name("attn", layer)
    inside = f"{escape(attention)}.**" if attention else "**"  # wild: some may never be called
    with torch.no_grad(), capture(wiring.model, part, inside, f"{inside}@input[0]") as seen:
        wiring.model(ids)
    own = seen[part]
    ways = {"positions": own, "heads": own.transpose(1, 2), "flat": own.flatten(-2)}
    for name, module in wiring.modules.items():
        for layout, value in ways.items():
            if _is_norm_of(seen, escape(name), value, module):
                return _EntryPoint(escape(name), module, seen[escape(name)], layout)
    return _EntryPoint(str(part), None, own, "positions")


def _is_norm_of(seen: ActivationCache, site: str, value: Tensor, module: nn.Module) -> bool:
    """Whether a module takes `value` and returns another of its shape."""
    given: Any = seen.get(f"{site}@input[0]")
    if not isinstance(given, Tensor) or given.shape != value.shape or not torch.equal(given, value):
        return False
    made: Any = seen.get(site)
    return isinstance(made, Tensor) and made.shape == value.shape and getattr(module, "weight", value).ndim == 1
