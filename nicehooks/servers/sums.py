"""Steering of many requests in one sum: each row gets the vector of its own request.

Most requests under an intervention are steered, and the sum of one row and one vector is next to no work, all of it
Python. So where a `steer` is all that a request does at a module, its vector is added together with those of the
others, rounded as in `steer`. Whatever is not that plain goes the longer way, one request after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.contexts.changes import Shift
from nicehooks.core.rules import OutputRule
from nicehooks.servers.rows import Packed, RowSpan, row_dim


class RuleOfShift(NamedTuple):
    """What the `rule` of a request adds to each of its rows at a module."""

    rule: OutputRule
    shift: Shift


def shift_of(rules: list[Any]) -> RuleOfShift | None:
    """What `rules` add to the whole output of a module, if that is all they do."""
    rule = rules[0]
    if len(rules) > 1 or type(rule) is not OutputRule or rule.chain or rule.when.counts:
        return None
    shift = getattr(getattr(rule.action, "fn", None), "__self__", None)
    if not isinstance(shift, Shift) or not isinstance(shift.scale, int | float):
        return None
    vector = shift.vector
    plain = type(vector) is Tensor and vector.ndim == 1 and vector.layout is torch.strided and not vector.is_complex()
    return RuleOfShift(rule, shift) if plain else None


def all_shifted(value: Any, shifted: list[tuple[RowSpan, RuleOfShift]], sizes: Packed) -> Tensor | None:
    """`value` with the vector of each request added to its rows; None where that is not plain."""
    shifts = [(span, of_rule.shift) for span, of_rule in shifted]
    first = shifts[0][1].vector
    alike = all([one.vector.shape == first.shape and one.vector.dtype is first.dtype for _, one in shifts])
    if not alike or type(value) is not Tensor or value.ndim < 2 or not value.is_floating_point():
        return None
    dim = row_dim(value, sizes.tokens)
    if dim is None or dim == value.ndim - 1 or value.shape[-1:] != first.shape:
        return None
    wide = torch.promote_types(value.dtype, torch.float32)
    here = [one.vector.to(value.device) for _, one in shifts]
    scales = torch.tensor([float(one.scale) for _, one in shifts], dtype=wide, device=value.device)
    which = [at for at, (span, _) in enumerate(shifts) for _ in range(span.length)]
    rows = [row for span, _ in shifts for row in range(span.start, span.stop)]
    added = (torch.stack(here).to(wide) * scales[:, None])[torch.tensor(which, device=value.device)]
    at = [1] * value.ndim
    at[dim], at[-1] = added.shape
    shape = list(value.shape)
    shape[dim] = len(rows)
    index = torch.tensor(rows, device=value.device)
    summed = value.to(wide).index_add(dim, index, added.view(at).expand(shape))
    for _, (rule, _) in shifted:
        rule.session.reached[rule.key] = True
    return summed.to(value.dtype)
