"""What receivers make of streams of their own: the norm, and the projection to queries, keys or values."""

from __future__ import annotations

import torch
from torch import Tensor

from nicehooks.anatomies.parts import Part
from nicehooks.contexts.suspending import suspend
from nicehooks.errors import UnsupportedModule
from nicehooks.experiments.wiring import Wiring
from nicehooks.values import trees


def read_by(wiring: Wiring, kind: str, layer: int, streams: Tensor) -> Tensor:
    """What the receivers of one kind in one layer read of streams of their own.

    Args:
        wiring: the nodes of a model.
        kind: `"q"`, `"k"`, `"v"` or `"mlp_in"`.
        layer: of the receivers.
        streams: the residual stream that each receiver reads, `[receiver, batch, pos, d_model]`.

    Returns:
        `[batch, pos, receiver, d_head]` of heads, `[batch, pos, d_model]` of an MLP.
    """
    flat = streams.flatten(0, 1)
    normed = _normed_for(wiring, "mlp_norm" if kind == "mlp_in" else "attn_norm", layer, flat)
    if kind == "mlp_in":
        return normed
    every = projected(wiring, getattr(wiring.body, kind)[layer], normed)  # of each stream, all heads
    own = every.unflatten(0, streams.shape[:2]).diagonal(dim1=0, dim2=3)  # [batch, pos, d_head, receiver]
    return own.movedim(-1, -2)


def _normed_for(wiring: Wiring, norm: str, layer: int, streams: Tensor) -> Tensor:
    if not wiring.body.has(norm, layer):
        return streams
    module = wiring.body.module(norm, layer)
    with suspend(module):
        return module(streams)


def projected(wiring: Wiring, part: Part, x: Tensor) -> Tensor:
    """What a projection makes of `x`, `[batch, pos, d_model]`: `[batch, pos, head, d_head]`."""
    if not part.port.is_output:
        raise UnsupportedModule(f"{part.what} is at {str(part)!r}, and not what a projection returns.")
    module = wiring.modules[part.plain_name]
    with suspend(module):
        return trees.get(module(x), part.chain)


def slopes_of(wiring: Wiring, kind: str, layer: int, stream: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a metric with respect to the stream that each receiver reads, `[receiver, batch, pos, d_model]`.

    Args:
        wiring: the nodes of a model.
        kind: `"q"`, `"k"`, `"v"` or `"mlp_in"`.
        layer: of the receivers.
        stream: the residual stream that they read, `[batch, pos, d_model]`.
        gradient: of the metric with respect to what they read.
    """
    count = 1 if kind == "mlp_in" else gradient.shape[2]
    with torch.inference_mode(False), torch.enable_grad():
        streams = stream.detach().expand(count, *stream.shape).clone().requires_grad_()
        return torch.autograd.grad(read_by(wiring, kind, layer, streams), streams, gradient.clone())[0]
