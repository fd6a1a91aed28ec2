"""The parts of an attention branch, checked by numbers: the pattern, and what is computed with it."""

from __future__ import annotations

import torch
from torch import Tensor

from nicehooks.anatomies.numbers import Seen, off_by
from nicehooks.anatomies.places import PartPlaces

SUMS = "its rows are at least 0 and sum to 1"
PRODUCT = "z = pattern @ v, per head"
DIAGONAL = "scores of a position with itself = q · k"
OUTPUT_OF_HEADS = "attn_proj(z) = attn_out"


def check_attention(seen: Seen, places: PartPlaces) -> None:
    """Checks the parts of attention in one layer: `q`, `k`, `v`, `scores`, `pattern`, `z`."""
    for cross in ("", "cross_"):
        _check_heads(seen, places, cross)
        _check_pattern(seen, places, f"{cross}pattern")
        _check_z(seen, places, cross)
        _check_output(seen, places, cross)
    _check_scores(seen, places)
    for part, how in places.compared.items():
        if places.has(part):
            places.passed.setdefault(part, how)


def _check_heads(seen: Seen, places: PartPlaces, cross: str) -> None:
    for part in (f"{cross}{one}" for one in ("q", "k", "v", "z")):
        value = seen.part(places, part)
        if value is not None and (value.ndim != 4 or value.shape[2] != places.heads.get(part)):
            expected = f"[batch, pos, {places.heads.get(part)}, d_head]"
            places.refuse(part, WRONG_HEADS.format(expected=expected, came=list(value.shape)))


def _check_pattern(seen: Seen, places: PartPlaces, part: str) -> None:
    pattern = seen.part(places, part)
    if pattern is None:
        return
    sums = pattern.float().sum(-1)
    has_sink = str(places.path(part, seen.now)).endswith("]")
    fits = pattern.ndim == 4 and pattern.shape[1] == places.heads.get(part)
    sums_fit = (sums <= 1 + 1e-2) if has_sink else ((sums - 1).abs() < 1e-2) | (sums == 0)
    if fits and bool(sums_fit.all()) and bool((pattern >= 0).all()):
        places.passed[part] = "its rows and a sink sum to 1" if has_sink else SUMS
        places.passed.setdefault(part.replace("pattern", "scores"), "softmax(scores) = pattern")
    else:
        came = f"{list(pattern.shape)}, with rows that sum to {float(sums.min()):.3g} … {float(sums.max()):.3g}"
        places.refuse(
            part, WRONG_HEADS.format(expected=f"[batch, {places.heads.get(part)}, query, key], where {SUMS}", came=came)
        )


def _check_z(seen: Seen, places: PartPlaces, cross: str) -> None:
    pattern, v, z = (seen.part(places, cross + part) for part in ("pattern", "v", "z"))
    if pattern is None or v is None or z is None:
        return
    if places.compared.get(f"{cross}v", "").startswith("the norm"):
        return
    made = _weighted(pattern, v)
    wrong = "another shape" if made is None else off_by(made.to(z.dtype), z)
    if made is not None and wrong is not None:  # values may be multiplied with a number first
        factor = float((made * z).sum() / (made * made).sum().clamp_min(1e-30))
        wrong = off_by(made.to(z.dtype) * factor, z)
    if wrong is None:
        places.passed[f"{cross}v"] = places.passed[f"{cross}z"] = PRODUCT
    else:
        reason = WRONG_HEADS.format(expected=PRODUCT, came=wrong)
        places.refuse(f"{cross}v", reason)
        places.refuse(f"{cross}z", reason)


def _weighted(pattern: Tensor, v: Tensor) -> Tensor | None:
    """`pattern @ v`, `[batch, pos, head, d_head]`."""
    if pattern.ndim != 4 or v.ndim != 4 or pattern.shape[1] % v.shape[2] or pattern.shape[-1] != v.shape[1]:
        return None
    values = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), values)


def _check_scores(seen: Seen, places: PartPlaces) -> None:
    """Rotary embedding turns a query and the key of its own position alike, so that their product stays."""
    scores, q, k = (seen.part(places, part) for part in ("scores", "q", "k"))
    if scores is None or q is None or k is None:
        return
    if q.shape[-1] != k.shape[-1] or q.ndim != 4 or q.shape[2] % k.shape[2] or scores.shape[-1] != scores.shape[-2]:
        return
    own = (q * k.repeat_interleave(q.shape[2] // k.shape[2], 2)).sum(-1).transpose(1, 2).double()
    came = scores.diagonal(dim1=-2, dim2=-1).double()
    if own.shape == came.shape and _is_straight(own, came):
        places.passed["q"] = places.passed["k"] = DIAGONAL


def _is_straight(x: Tensor, y: Tensor) -> bool:
    """Whether `y` is a multiple of `x`, and a number more that each example has (a bias of positions)."""
    x, y = (one - one.mean(0, keepdim=True) for one in (x, y))
    slope = (x * y).sum() / (x * x).sum().clamp_min(1e-30)
    return float((slope * x - y).abs().max()) <= 1e-2 * float(y.abs().max())


def _check_output(seen: Seen, places: PartPlaces, cross: str) -> None:
    z, out, proj = seen.part(places, f"{cross}z"), seen.part(places, f"{cross}attn_out"), f"{cross}attn_proj"
    if z is None or out is None or proj not in places.roles:
        return
    made = seen.run(places.roles[proj], z.flatten(2))
    if made is not None and seen.reaches(made, out, places.roles.get("attn_post_norm")):
        places.passed.setdefault(f"{cross}z", OUTPUT_OF_HEADS)
        places.passed[proj] = OUTPUT_OF_HEADS
    else:
        places.roles.pop(proj)


WRONG_HEADS = "it was checked on a short forward, and is not what its name says: expected {expected}; came {came}"
