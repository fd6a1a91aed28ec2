"""The parts of a transformer that write to its residual stream and read it, with the model that they are of."""

from __future__ import annotations

from torch import nn

from nicehooks.anatomies.anatomy import Anatomy, EncoderDecoder, anatomy
from nicehooks.core.census import Census
from nicehooks.errors import UnsupportedModule
from nicehooks.experiments.nodes import Nodes, SizesOfNodes


class Wiring(Nodes):
    """The nodes of one model.

    Attributes:
        body: its anatomy.
        modules: by their names.

    Raises:
        UnsupportedModule: the model has no anatomy, or one of an encoder and a decoder; its norms stand on the stream;
            its attention is latent.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        found = anatomy(model)
        if isinstance(found, EncoderDecoder):
            raise UnsupportedModule(TWO_STREAMS.format(kind=found.kind))
        self.body: Anatomy = found
        self.modules = dict(Census(model).unwrapped())
        if self.body.family.post_norm:
            raise UnsupportedModule(POST_NORM_EDGES.format(kind=self.body.kind))
        latent = sorted({part for places in self.body.layout.layers for part in places.latent})
        if latent:
            raise UnsupportedModule(LATENT_EDGES.format(kind=self.body.kind, parts=", ".join(latent)))
        has_mlp = not self.body.lacks("mlp_out")
        parallel = has_mlp and self.body.lacks("resid_mid")
        body = self.body
        super().__init__(body.kind, SizesOfNodes(body.n_layers, body.n_heads, body.n_kv_heads, has_mlp, parallel))


LATENT_EDGES = (
    "{kind} makes {parts} of something else than the residual stream or a norm of it, as latent attention does: what a "
    "part writes is no term of what they read. attribute(model, …) and sweep(model, …) work."
)

TWO_STREAMS = (
    "{kind} has an encoder and a decoder, each with a residual stream of its own, and edges are between parts of one "
    "stream.\n    attribute(model, anatomy(model).decoder.z, …)  # works"
)

POST_NORM_EDGES = (
    "{kind} has its norms on the residual stream, one after each addition: what a part writes goes through all norms "
    "that follow, and is no term of what later parts read. attribute(model, …) works."
)
