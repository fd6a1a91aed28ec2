"""Attention in its steps: what a fused kernel computes at once, as functions that a path can reach."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nicehooks.ports.flex import flex_attention_in_steps
from nicehooks.ports.packed_heads import mask_with_heads_apart, note_packed_heads, packed_heads, with_heads_apart
from nicehooks.torch_private_tensors import flex_kernel, is_flex_shown

_wanted: ContextVar[int] = ContextVar("nicehooks.as_steps", default=0)


class _RunInSteps(threading.local):
    """The same for traced code, which cannot read a `ContextVar`."""

    def __init__(self) -> None:
        self.wanted = 0


_here = _RunInSteps()


def as_steps_wanted() -> bool:
    """Whether attention runs in its steps here."""
    return (_here.wanted if torch.compiler.is_dynamo_compiling() else _wanted.get()) > 0


class fused_attention_as_steps(AbstractContextManager[None]):
    """Runs fused attention as its explicit steps, so that `@softmax()` exists and can be patched.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> class Attention(nn.Module):
    ...     def forward(self, x):
    ...         return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> model, x = Attention(), torch.randn(1, 2, 3, 4)
    >>> with fused_attention_as_steps(), capture(model, "@softmax()") as acts:
    ...     out = model(x)
    >>> acts["@softmax()"].shape, torch.allclose(out, model(x), atol=1e-5)
    (torch.Size([1, 2, 3, 3]), True)

    The steps are `matmul` (the scaled scores, `[batch, head, query, key]`), `add` (a mask), `softmax` (the pattern),
    `dropout`, and `matmul` again (the values). Causal, masked and grouped-query attention are covered. It acts in the
    thread or task that entered it, and equals the fused result to rounding (1e-5 in float32). `flex_attention` runs in
    steps, too, where it is called by a module with a site of a call: NOTE [How flex attention is seen].
    """

    def __enter__(self) -> None:
        self._count(1)
        self.mode = _AsSteps()
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        self._count(-1)

    def _count(self, change: int) -> None:
        _here.wanted += change
        if not torch.compiler.is_dynamo_compiling():
            _wanted.set(_wanted.get() + change)


class _AsSteps(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if runs_in_steps(func):
            return steps_of(func)(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        note_packed_heads(func, args, result)
        return result


def runs_in_steps(func: Any) -> bool:
    """Whether `func` is a fused kernel that runs in its steps here."""
    return (func is functional.scaled_dot_product_attention and as_steps_wanted()) or (
        func is flex_kernel and func is not None and is_flex_shown()
    )


def steps_of(func: Any) -> Any:
    """What computes in steps what `func` does: a fused kernel; itself, if it is none."""
    if func is functional.scaled_dot_product_attention:
        return attention_in_steps
    if func is flex_kernel and func is not None:
        return flex_attention_in_steps
    return func


def attention_in_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    at: Callable[[str, Tensor], Tensor] = lambda step, value: value,
) -> Tensor:
    """`scaled_dot_product_attention`, step by step; shapes as there: `[batch, head, pos, d_head]`.

    `at("scores", value)` gives what takes the place of the value before the softmax, `at("pattern", value)` after it.
    Where the heads of a group are packed into the positions, they are apart in the steps: NOTE [Packed heads].
    """
    if packed_heads(query) > 1 and not is_causal:
        mask = None if attn_mask is None else mask_with_heads_apart(attn_mask, query)
        z = attention_in_steps(with_heads_apart(query), key, value, mask, dropout_p, False, scale, True, at=at)
        return z.reshape(*z.shape[:1], *query.shape[1:3], z.shape[-1])
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    bias = _bias(query, key, attn_mask, is_causal)
    if bias is not None:
        scores = scores + bias
    scores = at("scores", scores)
    pattern = torch.softmax(scores, dim=-1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # a row without any key gets zeros, as in the kernel
        pattern = torch.where(attn_mask.any(-1, keepdim=True), pattern, torch.zeros_like(pattern))
    pattern = at("pattern", pattern)
    if dropout_p > 0:
        pattern = torch.dropout(pattern, dropout_p, train=True)
    return torch.matmul(pattern, value)


def _bias(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to the scores: minus infinity where a query may not look."""
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)


FUSED_KERNELS: Mapping[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attention_in_steps,
    "flex_attention": flex_attention_in_steps,
}
"""Fused attention by the name of its function: what computes the same in steps, and shows them to its `at`."""
