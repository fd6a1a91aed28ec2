"""Queries whose heads stand in the dimension of positions: known by the reshape that put them there.

NOTE [Packed heads]
Under grouped queries, transformers reshapes the queries of a single position, `[batch, head, 1, d_head]`, to
`[batch, kv_head, heads of a group, d_head]` before it calls the fused kernel, so that keys and values need not be
repeated (`pack_gqa`, 5.24). The shapes alone do not tell this from as many positions as a group has heads. So the
reshape itself is noted where it happens, by whatever mode will run attention in its steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_heads_in_a_group: Any = WeakTensorKeyDictionary()
"""The queries that are packed, each with the number of heads in a group."""


def note_packed_heads(func: Any, args: tuple[Any, ...], result: Any) -> None:
    """Notes `result` if `func` has packed the heads of the first of `args` into the dimension of positions."""
    if func is not Tensor.reshape or torch.compiler.is_dynamo_compiling():
        return
    before = args[0]
    if before.ndim != 4 or result.ndim != 4 or before.shape[2] != 1 or before.shape[0] != result.shape[0]:
        return
    groups = result.shape[2]
    if groups > 1 and result.shape[1] * groups == before.shape[1] and result.shape[3] == before.shape[3]:
        _heads_in_a_group[result] = groups


def packed_heads(query: Tensor) -> int:
    """How many heads of `query` stand in its dimension of positions; 1 where they have a dimension of their own."""
    return 1 if torch.compiler.is_dynamo_compiling() else _heads_in_a_group.get(query, 1)


def with_heads_apart(query: Tensor) -> Tensor:
    """Packed `query`, `[batch, kv_head, heads of a group, d_head]`, as `[batch, head, 1, d_head]`."""
    return query.flatten(1, 2).unsqueeze(2)


def mask_with_heads_apart(mask: Tensor, query: Tensor) -> Tensor:
    """The mask of packed `query`, for heads apart."""
    if mask.ndim == 2:
        mask = mask[None, None]
    elif mask.ndim == 3:
        mask = mask[None]
    if mask.shape[1:3] == (1, 1):  # the same for each head
        return mask
    return with_heads_apart(mask.expand(-1, *query.shape[1:3], -1))
