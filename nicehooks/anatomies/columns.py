"""Which columns of a projection the heads of a value are, and the subscripts that take them out of it.

NOTE [Columns]
A projection may give queries, keys and values at once, in any order: all of one after all of the other, per head, per
group of heads. So no layout is assumed: every number of what attention reads is looked up among those that the
projection gave at the same position, and the columns that hold for all positions are written as a path. In half
precision many numbers are equal: that a head is columns side by side is tried first, from where most of them are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def columns_of(target: Tensor, given: Tensor, factors: tuple[float, ...] = (1.0,)) -> Tensor | None:
    """The columns of `given` that `target` consists of, `[head, d_head]`; None if it does not.

    >>> given = torch.randn(2, 3, 8)
    >>> columns_of(given[:, :, 4:].unflatten(-1, (2, 2)), given).tolist()
    [[4, 5], [6, 7]]

    Args:
        target: `[batch, pos, head, d_head]`.
        given: `[batch, pos, width]`.
        factors: what the columns may have been multiplied with.
    """
    target, given = _wide(target), _wide(given)
    for factor in factors:
        nearest = _nearest_column(given[0, 0] * factor, target[0, 0])
        beside = _beside_each_other(nearest, given.shape[-1])
        for found in (beside, nearest):
            if _are_columns(found, given * factor, target):
                return found
        if not _are_half_right(beside, given * factor, target):
            continue
        among = _each_among(beside, given * factor, target)
        if _are_columns(among, given * factor, target):
            return among
    return None


def _are_columns(columns: Tensor, given: Tensor, target: Tensor) -> bool:
    return torch.allclose(given[..., columns], target, rtol=1e-4, atol=1e-6 * float(target.abs().max()))


def _are_half_right(columns: Tensor, given: Tensor, target: Tensor) -> bool:
    return bool(torch.isclose(given[0, 0, columns], target[0, 0], rtol=1e-4).float().mean() > 0.4)


def _each_among(columns: Tensor, given: Tensor, target: Tensor) -> Tensor:
    """For each number of a head, that of the columns of the head which is nearest to it in all rows."""
    choices = given[..., columns].flatten(0, 1)  # [row, head, column]
    apart = (target.flatten(0, 1).unsqueeze(-1) - choices.unsqueeze(-2)).abs().sum(0)  # [head, d_head, column]
    return columns.gather(-1, apart.argmin(-1))


def _beside_each_other(columns: Tensor, width: int) -> Tensor:
    """For each head the columns side by side that most of `columns`, `[head, d_head]`, are among."""
    places = torch.arange(columns.shape[-1], device=columns.device)
    first = (columns - places).mode(-1, keepdim=True).values
    return (first + places).clamp(0, width - 1)


def leading_columns_of(target: Tensor, given: Tensor) -> Tensor | None:
    """The same of the first dimensions of each head alone: in latent attention, positions are in the others."""
    target, given = _wide(target), _wide(given)
    found = _beside_each_other(_nearest_column(given[0, 0], target[0, 0]), given.shape[-1])
    same = torch.isclose(given[..., found], target, rtol=1e-4, atol=1e-6 * float(target.abs().max())).all((0, 1, 2))
    count = int(same.long().cumprod(0).sum())
    return found[:, :count] if 1 < count < len(same) else None


def _wide(tensor: Tensor) -> Tensor:
    """In which numbers of half precision can be compared with those of single."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _nearest_column(row: Tensor, wanted: Tensor) -> Tensor:
    """Where in `row` the nearest number to each of `wanted` is."""
    ordered, order = row.sort()
    right = torch.searchsorted(ordered, wanted.contiguous()).clamp(1, max(len(row) - 1, 1)).clamp_max(len(row) - 1)
    left = (right - 1).clamp_min(0)
    nearer = (wanted - ordered[left]).abs() <= (ordered[right] - wanted).abs()
    return order[torch.where(nearer, left, right)]


def without_repeats(columns: Tensor) -> Tensor | None:
    """The columns of the heads of keys or values, where several heads of queries read the same ones."""
    kept = torch.cat([torch.tensor([True]), (columns[1:] != columns[:-1]).any(-1)])
    each = columns[kept]
    repeats = len(columns) // len(each)
    same = len(each) * repeats == len(columns) and torch.equal(each.repeat_interleave(repeats, 0), columns)
    return each if same else None


def columns_path(columns: Tensor, width: int) -> str | None:
    """The subscripts that take `columns`, `[head, d_head]`, out of a value that is `width` wide, as heads.

    >>> columns_path(torch.arange(4, 8).unflatten(0, (2, 2)), 8)
    '/2[:, :, 1]/2'

    Returns:
        None if they are no heads side by side, nor one a head.
    """
    heads, size = columns.shape
    ordered = columns.sort(-1).values
    first = ordered[:, 0]
    if not torch.equal(ordered, first[:, None] + torch.arange(size)):
        return None
    stride = int(first[1] - first[0]) if heads > 1 else size
    if not torch.equal(first, first[0] + stride * torch.arange(heads)):
        return None
    if stride == size:
        return _columns_beside(int(first[0]), heads, size, width)
    return _one_a_head(int(first[0]), heads, size, stride) if heads * stride == width else None


def _columns_beside(start: int, heads: int, size: int, width: int) -> str:
    whole = heads * size
    if whole == width:
        return f"/{heads}"
    if width % whole == 0 and start % whole == 0:
        return f"/{width // whole}[:, :, {start // whole}]/{heads}"
    return f"[:, :, {start}:{start + whole}]/{heads}"


def _one_a_head(start: int, heads: int, size: int, stride: int) -> str:
    if stride % size == 0 and start % size == 0:
        return f"/{heads}/{stride // size}[:, :, :, {start // size}]"
    return f"/{heads}[:, :, :, {start}:{start + size}]"
