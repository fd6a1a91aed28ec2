"""`Autoencoder`: an encoder, latents, and a decoder, as one module whose parts are places."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Sends a value through sparse latents. Its latents are the place `latents`: captured and changed like any other.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture, splice, steer
    >>> from nicehooks.autoencoders.autoencoder import Encoder
    >>> sae = Autoencoder(Encoder(torch.randn(4, 16), torch.zeros(16)), torch.randn(16, 4), torch.zeros(4))
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> with splice(model, "0", sae, error=True), steer(sae, "latents[..., 7]", torch.tensor(5.0)):
    ...     with capture(sae, "latents") as acts:
    ...         _ = model(torch.randn(6, 3))
    >>> acts["latents"].shape
    torch.Size([6, 16])

    Args:
        encoder: makes latents `[…, latent]` of values `[…, d_in]`.
        W_dec: the decoder `[latent, d_out]`.
        b_dec: its bias `[d_out]`.
        centred: whether the bias is subtracted from the value first.
        norm: how the value is scaled first, and the reconstruction back: `"none"`, `"layer_norm"` or
            `"constant_norm_rescale"`.
        W_skip: what goes past the latents `[d_out, d_in]`.
        heads: whether the last two dimensions of the value, `[head, d_head]`, are one to the encoder.
    """

    config: Mapping[str, Any] = MappingProxyType({})
    """What its file said of it."""

    def __init__(
        self,
        encoder: nn.Module,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        centred: bool = True,
        norm: str = "none",
        W_skip: Tensor | None = None,
        heads: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.latents = nn.Identity()
        self.decoder = Decoder(W_dec, b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.centred = centred
        self.norm = norm
        self.heads = heads

    def encode(self, x: Tensor) -> Tensor:
        """The latents of `x`, without what acts on them."""
        return self._latents(x)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """What latents stand for, before it is scaled back."""
        return self.decoder(latents)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x`; of a transcoder, what it makes of it."""
        found, shift, scale = self._latents(x)
        out = self.decoder(self.latents(found)) * scale + shift
        if self.W_skip is not None:
            out = out + x.to(self.W_skip.dtype) @ self.W_skip.T
        return out.unflatten(-1, x.shape[-2:]) if self.heads else out

    def _latents(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        x = x.flatten(-2) if self.heads else x
        x, shift, scale = _scaled(x.to(self.decoder.weight.dtype), self.norm)
        return self.encoder(x - self.decoder.bias if self.centred else x), shift, scale


def _scaled(x: Tensor, norm: str) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """A value as the encoder gets it, and by what its reconstruction is scaled and shifted back."""
    if norm == "layer_norm":
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), mean, deviation
    if norm == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / scale, 0.0, scale
    return x, 0.0, 1.0


class Decoder(nn.Module):
    """Latents times directions: `latents @ weight + bias`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, latents: Tensor) -> Tensor:
        """`[…, latent]` becomes `[…, d_out]`."""
        return latents @ self.weight + self.bias


class Encoder(nn.Module):
    """Latents that are positive where a direction is there: `relu(x @ weight + bias)`.

    Args:
        weight: `[d_in, latent]`.
        bias: `[latent]`.
        threshold: below which a latent is zero `[latent]`: jump-ReLU, Rajamanoharan et al. 2024,
            https://arxiv.org/abs/2407.14435.
        k: how many latents there are at most, the largest: top-k, Gao et al. 2024, https://arxiv.org/abs/2406.04093.
    """

    def __init__(self, weight: Tensor, bias: Tensor, threshold: Tensor | None = None, k: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.threshold = None if threshold is None else nn.Parameter(threshold)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """`[…, d_in]` becomes `[…, latent]`."""
        before = x @ self.weight + self.bias
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        return before.relu() if self.k is None else largest(before, self.k).relu()


class GatedEncoder(nn.Module):
    """Latents whose presence and whose size are decided apart: Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014.

    Args:
        weight: `[d_in, latent]`.
        gate: the bias of what decides whether a latent is there `[latent]`.
        size: the bias of how large it is `[latent]`.
        log_scale: the logarithm of how the weight is scaled for the size `[latent]`.
    """

    def __init__(self, weight: Tensor, gate: Tensor, size: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.gate = nn.Parameter(gate)
        self.size = nn.Parameter(size)
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[…, d_in]` becomes `[…, latent]`."""
        both = x @ self.weight
        return (both + self.gate > 0) * (both * self.log_scale.exp() + self.size).relu()


def largest(values: Tensor, k: int) -> Tensor:
    """The `k` largest values along the last dimension, and zeros."""
    top = values.topk(min(k, values.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)
