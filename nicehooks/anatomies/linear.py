"""What is linear on the way to the logits: projections of heads, a norm at its scale, the unembedding.

NOTE [Through the module]
Projections and norms are run, not rewritten from their weights: so adapters, quantised and parametrised weights count,
and nothing has to be known of an epsilon.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.anatomies.ends import unembedded_by
from nicehooks.anatomies.finding import Anatomy
from nicehooks.anatomies.offloaded import parameter_there
from nicehooks.errors import TreeMismatch, UnsupportedModule
from nicehooks.ports.weights import numbers_of_parameter
from nicehooks.values.trees import structure_of


class LinearPart(NamedTuple):
    """A norm at one scale: it maps `x` to `of(x) + bias`, where `of` is linear.

    Attributes:
        gain: the weight of the norm times its scale, `[…, d_model]`.
        bias: the bias of the norm, `[d_model]`.
        centred: whether the norm takes the mean away (a LayerNorm), or does not (an RMSNorm).
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    def of(self, term: Tensor) -> Tensor:
        """What the norm makes of a term of its input."""
        return (_centred(term) if self.centred else term) * self.gain


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def linear_part(norm: nn.Module, x: Tensor) -> LinearPart:
    """The norm at the scale that it has on `x`, `[…, d_model]`; scale and gain are found from what it returns.

    Raises:
        UnsupportedModule: it is neither a LayerNorm nor an RMSNorm.
    """
    wide, given = x.float(), norm(x).float()
    found: list[tuple[Tensor, LinearPart]] = []
    for weight, bias in _gains_and_biases(norm):
        gains = [torch.ones_like(wide[..., :1])] if weight is None else [weight.float(), weight.float() + 1]
        shift = wide.new_zeros(wide.shape[-1]) if bias is None else bias.float()
        target = given - shift
        for centred, gain in product((True, False), gains):
            raw = (_centred(wide) if centred else wide) * gain
            scale = (raw * target).sum(-1, keepdim=True) / (raw * raw).sum(-1, keepdim=True).clamp_min(1e-30)
            found.append(((raw * scale - target).norm(), LinearPart(gain * scale, shift, centred)))
    error, best = min(found, key=lambda pair: pair[0].item())
    if error > 0.02 * (given - best.bias).norm():
        raise UnsupportedModule(f"{type(norm).__name__} is no LayerNorm or RMSNorm with gain weight or 1 + weight.")
    return best


def _gains_and_biases(norm: nn.Module) -> list[tuple[Tensor | None, Tensor | None]]:
    """What may be the weight and the bias of a norm: `weight` and `bias`, or else its vectors by any names."""
    if hasattr(norm, "weight") or hasattr(norm, "bias"):
        return [(parameter_there(norm, "weight"), parameter_there(norm, "bias"))]
    names = [name for name, one in norm.named_parameters(recurse=False) if one.ndim == 1]
    vectors = [None, *(parameter_there(norm, name) for name in names[:2])]
    return [pair for pair in product(vectors, vectors) if pair[0] is None or pair[0] is not pair[1]]


def last_linear_part(body: Anatomy, x: Tensor) -> LinearPart:
    """The final norm at the scale that it has on `x`; the identity where the model lacks one."""
    if not body.lacks("final_norm"):
        return linear_part(body.module("final_norm"), x)
    return LinearPart(torch.ones_like(x[..., :1], dtype=torch.float32), x.new_zeros(x.shape[-1]).float(), False)


def results_of_heads(body: Anatomy, layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """What each head adds to `attn_out`, `[…, head, d_model]`, for `z`, `[…, head, d_head]`; and what the bias adds."""
    project = body.module("attn_proj", layer)
    alone = torch.eye(body.n_heads, dtype=z.dtype, device=z.device)[:, :, None] * z.unsqueeze(-3)
    bias = project(torch.zeros_like(z).flatten(-2))
    rows = alone.flatten(-2).flatten(1, -2)  # three dimensions are what every projection takes
    results = project(rows).reshape(*z.shape[:-1], -1) - bias.unsqueeze(-2)
    if not body.has("attn_post_norm", layer):
        return results, bias
    norm = linear_part(body.module("attn_post_norm", layer), project(z.flatten(-2)))
    each = norm._replace(gain=norm.gain.unsqueeze(-2))
    return each.of(results.float()).to(z.dtype), (norm.of(bias.float()) + norm.bias).to(z.dtype)


def unembedded(body: Anatomy, normed: Tensor) -> Tensor:
    """The logits of what comes out of the final norm."""
    if body.has("before_unembed"):
        normed = body.module("before_unembed")(normed)
    return body.head.of(unembedded_by(body.module("unembed"), normed))


def logit_direction(body: Anatomy, tokens: object, against: object, batch: int) -> tuple[Tensor, Tensor]:
    """In which direction behind the final norm a logit (or the difference of two) grows, `[batch, d_model]`; its bias.

    Raises:
        UnsupportedModule: the unembedding is no linear layer, or its weight is packed in a form of its own.
        TreeMismatch: a token is not in the vocabulary.
    """
    weight, bias = _matrix(body, "unembed"), parameter_there(body.module("unembed"), "bias")
    to, more = torch.zeros((), device=weight.device), torch.zeros(batch, device=weight.device)
    for sign, given in ((1.0, tokens), (-1.0, against)):
        if given is not None:
            chosen = _ids_of_tokens(given, batch, len(weight)).to(weight.device)
            to = to + sign * weight[chosen].float()
            more = more if bias is None else more + sign * bias[chosen].float()
    if body.has("before_unembed"):
        to = to @ _matrix(body, "before_unembed").float()
    return to * body.head.scale, more * body.head.scale


def _matrix(body: Anatomy, role: str) -> Tensor:
    """The numbers of the weight of a linear layer, dequantised if need be."""
    weight = parameter_there(body.module(role), "weight")
    if weight is None or weight.ndim != 2:
        raise UnsupportedModule(f"the unembedding {body.name(role)!r} of {body.kind} is no linear layer.")
    return numbers_of_parameter(weight, f"{body.name(role)}@weight")


def _ids_of_tokens(given: object, batch: int, vocabulary: int) -> Tensor:
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TreeMismatch(f"tokens are given by their ids, one or one per example, not {given!r}.") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim > 1:
        raise TreeMismatch(f"tokens are given by their ids, one or one per example, not as {structure_of(ids)}.")
    if ids.ndim == 1 and len(ids) not in (1, batch):
        raise TreeMismatch(f"{len(ids)} tokens came for a batch of {batch}.")
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise TreeMismatch(f"token {ids.tolist()} is not among the {vocabulary} of this model.")
    return ids.expand(batch)
