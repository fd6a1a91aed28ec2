"""Flexible attention in its steps: scores that a function changes, and a mask that a function says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nicehooks.torch_private_tensors import indexed_by_tensors, no_function_modes


def flex_attention_in_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: Mapping[str, Any],
    *buffers: Any,
    at: Callable[[str, Tensor], Tensor] = lambda step, value: value,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator inside of `torch.nn.attention.flex_attention` computes, step by step, from its arguments.

    `at("scores", value)` gives what takes the place of the value before the softmax, `at("pattern", value)` after it,
    both `[batch, head, query, key]`. Scores are float32, or float64, in any dtype.

    Returns:
        The sums of values, `[batch, head, pos, d_head]`, and of each row of scores the logarithm of the sum of their
        exponentials, and the largest, `[batch, head, pos]`: to the base 2, as the operator gives them.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1) for one in (key, value))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(query.to(wide) * scale, key.to(wide).transpose(-2, -1))
    places = [torch.arange(size, device=query.device) for size in scores.shape]
    with no_function_modes(), indexed_by_tensors():
        scores = _at_each_place(score_mod, True)(scores, *places)
        seen = _at_each_place(block_mask[-1], False)(*places)
    scores = at("scores", torch.where(seen, scores, -math.inf))
    is_blind = (scores == -math.inf).all(-1, keepdim=True)
    pattern = torch.softmax(scores.masked_fill(is_blind, 0.0), dim=-1)  # a row of -inf would have no gradient but NaN
    pattern = at("pattern", pattern.masked_fill(is_blind, 0.0).to(query.dtype))
    unit = 1.0 if kernel_options.get("BACKEND") == "FLASH" else math.log(2)
    return torch.matmul(pattern, value.to(query.dtype)), scores.logsumexp(-1) / unit, scores.amax(-1) / unit


def _at_each_place(function: Callable[..., Tensor], takes_score: bool) -> Callable[..., Tensor]:
    """`function` of a score, if it takes one, and of batch, head, query and key, for all of them at once."""
    first = (0,) if takes_score else ()
    for place in (3, 2, 1, 0):
        function = torch.vmap(function, in_dims=(*first, *(0 if one == place else None for one in range(4))))
    return function
