"""The anatomy of a model with an encoder and a decoder: one of each."""

from __future__ import annotations

from typing import Any

from nicehooks.anatomies.body import Anatomy
from nicehooks.errors import UnsupportedModule


class EncoderDecoder:
    """The anatomies of an encoder and a decoder: what `anatomy(model)` returns of such a model.

    Attributes:
        encoder: the anatomy of the encoder.
        decoder: the anatomy of the decoder, with what it adds from the encoder: `cross_attn_out`, and `cross_q`,
            `cross_k`, `cross_v`, `cross_scores`, `cross_pattern`, `cross_z`.
    """

    def __init__(self, encoder: Anatomy, decoder: Anatomy) -> None:
        self.encoder = encoder
        self.decoder = decoder

    @property
    def kind(self) -> str:
        """The class of the model, for messages."""
        return self.decoder.kind

    def __getattr__(self, what: str) -> Any:
        if what.startswith("_"):
            raise AttributeError(what)
        known = hasattr(self.decoder, what) or hasattr(self.encoder, what)
        if not known:
            raise AttributeError(f"an anatomy has no {what!r}; ask .encoder or .decoder for a part")
        raise UnsupportedModule(
            f"{self.kind} has an encoder and a decoder, and {what} is a part of each. Say which:\n"
            f"    anatomy(model).decoder.{what}"
        )

    def __repr__(self) -> str:
        return f"EncoderDecoder(\n  encoder: {self.encoder!r}\n  decoder: {self.decoder!r}\n)"
