"""Where the places of a tree of hooks are in a model.

NOTE [What the names mean]
As in the model that transformer-debugger runs: the norm before the attention is `ln_attn`, what it gives
`post_ln_attn`, what the attention adds to the stream `delta_attn`, and the stream after that `post_attn`; for the MLP
likewise. Where the norm stands after the addition (BERT), `ln_attn` is the norm that goes with the attention all the
same, `post_attn` the sum that goes into it, and `post_ln_attn` what comes out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.anatomies.anatomy import Anatomy
from nicehooks.anatomies.norms import NORM_STEPS, NormFormula, formula_of
from nicehooks.errors import NiceHooksError, UnsupportedModule
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape
from nicehooks.values.regions import Rows

LAYER_PLACES = {
    "resid.torso.post_ln_attn": "attn_in",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.qk_logits": "scores",
    "attn.qk_softmax_denominator": "pattern",
    "attn.qk_probs": "pattern",
    "attn.v_out": "z",
    "resid.torso.delta_attn": "attn_out",
    "resid.torso.post_attn": "resid_mid",
    "resid.torso.post_ln_mlp": "mlp_in",
    "mlp.pre_act": "mlp_pre",
    "mlp.post_act": "mlp_post",
    "resid.torso.delta_mlp": "mlp_out",
    "resid.torso.post_mlp": "resid_post",
}
"""The places that every layer has, and the parts of the anatomy that they are."""

NORMS = {"resid.torso.ln_attn": "attn_norm", "resid.torso.ln_mlp": "mlp_norm", "resid.ln_f": "final_norm"}
"""The places with the steps of a norm below them, and the roles of these norms in the anatomy."""

SINGLE = {"resid.post_ln_f": "final_norm", "logits": "logits"}
"""The places of which a model has one, and the parts that they are."""

PLACES = (
    "resid.post_emb",
    *(f"{norm}.{step}" for norm in NORMS for step in NORM_STEPS),
    *LAYER_PLACES,
    *SINGLE,
)
"""Every place of a `TransformerHooks`. Where two are at one module, the first acts first."""


class Spot(NamedTuple):
    """One place in one layer.

    Attributes:
        where: the path of its value, or of the norm that it is a step of.
        layer: which layer, if it has one.
        formula: how the norm computes, if it is a step of one.
    """

    where: ModulePath
    layer: int | None = None
    formula: NormFormula | None = None


def spots(anatomy: Anatomy, place: str) -> list[Spot]:
    """Where `place` is in the model: one spot for each layer, or one.

    Raises:
        UnsupportedModule: the model has no such place.
    """
    try:
        return _spots(anatomy, place)
    except NiceHooksError as error:
        raise UnsupportedModule(f"hooks cannot be at {place!r}: {error}") from None


def _spots(anatomy: Anatomy, place: str) -> list[Spot]:
    layers = range(anatomy.n_layers)
    norm, _, step = place.rpartition(".")
    if place == "resid.post_emb":  # behind positions, norm and dropout: what the first layer reads
        return [Spot(anatomy.resid_pre[0])]
    if norm in NORMS:
        numbers = [None] if norm == "resid.ln_f" else layers
        return [_norm_spot(anatomy, NORMS[norm], step, layer) for layer in numbers]
    if place in SINGLE:
        return [Spot(getattr(anatomy, SINGLE[place]))]
    before, _, part = place.rpartition("post_ln_")
    if before and anatomy.family.post_norm:
        return [Spot(_norm_path(anatomy, f"{part}_norm", layer), layer) for layer in layers]
    return [Spot(path, layer) for layer, path in enumerate(getattr(anatomy, LAYER_PLACES[place]))]


def _norm_spot(anatomy: Anatomy, role: str, step: str, layer: int | None) -> Spot:
    module: nn.Module = anatomy.module(role, layer)
    formula = formula_of(module)
    if step == "post_mean_subtraction" and not formula.centred:
        raise UnsupportedModule(f"{anatomy.kind} normalizes with {type(module).__name__}, which subtracts no mean.")
    path = _norm_path(anatomy, role, layer)
    if role == "mlp_norm" and layer is not None and not anatomy.family.post_norm:  # OPT flattens positions before it
        path = replace(path, chain=tuple([step for step in anatomy.mlp_in[layer].chain if isinstance(step, Rows)]))
    return Spot(path, layer, formula)


def _norm_path(anatomy: Anatomy, role: str, layer: int | None) -> ModulePath:
    """The path of a norm; if it is one module in several roles, that of its call in this one."""
    path = ModulePath.parse(escape(anatomy.name(role, layer)))
    module = anatomy.module(role, layer)
    uses = [use for use in _norms_in_order(anatomy) if anatomy.module(*use) is module]
    return path if len(uses) == 1 else replace(path, call=uses.index((role, layer)))


def _norms_in_order(anatomy: Anatomy) -> list[tuple[str, int | None]]:
    last: list[tuple[str, int | None]] = [("final_norm", None)] if anatomy.has("final_norm") else []
    return [*((role, layer) for layer in range(anatomy.n_layers) for role in ("attn_norm", "mlp_norm")), *last]


def softmax_denominator(pattern: Tensor) -> Tensor:
    """The sum over the keys of `exp(logits - max(logits))`, `[batch, head, query, 1]`, of what softmax has given.

    The greatest of these exponentials is 1, so the greatest probability is 1 over their sum. (In a row without any key
    all are zero: there it is a number, and the row stays zero.)
    """
    return 1 / pattern.amax(-1, keepdim=True).clamp_min(torch.finfo(pattern.dtype).tiny)
