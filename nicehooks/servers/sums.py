"""Steering of many requests in one sum: each row gets the vector of its own request.

Most requests under an intervention are steered, and the sum of one row and one vector is next to no work, all of it
Python. So where a `steer` is all that a request does at a module, its vector is added together with those of the
others, rounded as in `steer`. Whatever is not that plain goes the longer way, one request after the other.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.core.rules import OutputRule
from nicehooks.servers.rows import Packed, RowSpan, row_dim


class Shift(NamedTuple):
    """What a request adds to each of its rows at a module: `scale * vector`, by `rule`."""

    rule: OutputRule
    vector: Tensor
    scale: float


def shift_of(rules: list[Any]) -> Shift | None:
    """What `rules` add to the whole output of a module, if that is all they do."""
    rule = rules[0]
    if len(rules) > 1 or type(rule) is not OutputRule or rule.chain or rule.when.counts or rule.action.verb != "steer":
        return None
    action: Any = rule.action
    held = inspect.getclosurevars(action.fn).nonlocals  # those of the function that `steer` has made
    vector, scale = held.get("vector"), held.get("scale")
    if type(vector) is not Tensor or vector.ndim != 1 or vector.layout is not torch.strided or vector.is_complex():
        return None
    return Shift(rule, vector, scale) if isinstance(scale, int | float) else None


def all_shifted(value: Any, shifts: list[tuple[RowSpan, Shift]], sizes: Packed) -> Tensor | None:
    """`value` with the vector of each request added to its rows; None where that is not plain."""
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
    for _, (rule, _, _) in shifts:
        rule.session.reached[rule.key] = True
    return summed.to(value.dtype)
