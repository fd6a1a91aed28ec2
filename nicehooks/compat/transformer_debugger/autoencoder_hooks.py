"""An autoencoder in the place of a value, with hooks in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nicehooks.compat.transformer_debugger.hook_collections import FwdBwdHooks, HookCollection
from nicehooks.errors import TreeMismatch
from nicehooks.values import trees

if TYPE_CHECKING:
    from typing_extensions import Self


class AutoencoderHooks(HookCollection):
    """Sends a value through an autoencoder, with hooks on its latents, its reconstruction and its error.

    >>> import torch
    >>> from torch import nn
    >>> encoder, decoder = nn.Linear(4, 8), nn.Linear(8, 4)
    >>> autoencoder = AutoencoderHooks(encoder, decoder, add_error=True)
    >>> x = torch.randn(2, 4)
    >>> torch.allclose(autoencoder(x), x, atol=1e-6)
    True
    >>> autoencoder.latents.append_fwd(lambda latents: latents * 0).fwd.is_empty()
    False
    >>> torch.allclose(autoencoder(x), x - decoder(encoder(x)) + decoder(torch.zeros(2, 8)), atol=1e-6)
    True

    It is a hook like any other: `hooks.resid.torso.post_mlp.append_fwd(AtLayers(3).append(autoencoder))`. With
    `add_error` the error, `x` less the decoded latents, comes from a copy of the latents of its own: hooks on `latents`
    and `reconstruction` do not change it, and their gradients are those through the reconstruction alone. Without, the
    error is that of the hooked reconstruction, and is there to be seen only.

    Args:
        encode: makes latents of the value.
        decode: makes a reconstruction of latents, in the shape of the value.
        add_error: adds the error to the reconstruction.
    """

    def __init__(self, encode: Callable[..., Any], decode: Callable[..., Any], add_error: bool = False) -> None:
        super().__init__()
        for name, function in (("encode", encode), ("decode", decode)):
            if not callable(function):
                raise TypeError(f"AutoencoderHooks({name}=…) takes a function, not {type(function).__name__}")
        for name in ("latents", "reconstruction", "error"):
            self.add_subhooks(name, FwdBwdHooks())
        self.encode = encode
        self.decode = decode
        self.add_error = add_error

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What takes the place of `x`; `args` and `kwargs` go to the hooks."""
        latents = self._encoded(x)
        hooked = self.latents(latents.clone() if self.add_error else latents, *args, **kwargs)
        reconstruction = self.reconstruction(self._decoded(hooked, x), *args, **kwargs)
        if not self.add_error:
            if not self.error.is_empty():
                self.error(x - reconstruction, *args, **kwargs)
            return reconstruction
        return reconstruction + self.error(x - self._decoded(latents.clone(), x), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy has hooks of its own, and the same autoencoder."""
        for function in (self.encode, self.decode):
            memo[id(function)] = function
        return super().__deepcopy__(memo)

    def _encoded(self, x: Tensor) -> Tensor:
        latents = self.encode(x)
        if not isinstance(latents, Tensor):
            raise TreeMismatch(f"encode made {trees.structure_of(latents)} of the value, not a tensor of latents")
        return latents

    def _decoded(self, latents: Tensor, x: Tensor) -> Tensor:
        decoded = self.decode(latents)
        if not isinstance(decoded, Tensor) or decoded.shape != x.shape:
            raise TreeMismatch(f"decode made {trees.structure_of(decoded)} of the latents of {trees.structure_of(x)}")
        return decoded
