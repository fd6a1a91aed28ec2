"""The parts of a transformer that write to its residual stream and read it, with the model that they are of."""

from __future__ import annotations

from torch import nn

from nicehooks.anatomies.anatomy import Anatomy, anatomy
from nicehooks.core.census import Census
from nicehooks.errors import UnsupportedModule
from nicehooks.experiments.nodes import Nodes, SizesOfNodes


class Wiring(Nodes):
    """The nodes of one model.

    Attributes:
        body: its anatomy.
        modules: by their names.

    Raises:
        UnsupportedModule: the model has no anatomy, or its norms stand on the stream.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.body: Anatomy = anatomy(model)
        self.modules = dict(Census(model).unwrapped())
        if self.body.family.post_norm:
            raise UnsupportedModule(POST_NORM_EDGES.format(kind=self.body.kind))
        has_mlp = not self.body.lacks("mlp_out")
        parallel = has_mlp and self.body.lacks("resid_mid")
        body = self.body
        super().__init__(body.kind, SizesOfNodes(body.n_layers, body.n_heads, body.n_kv_heads, has_mlp, parallel))


POST_NORM_EDGES = (
    "{kind} has its norms on the residual stream, one after each addition: what a part writes goes through all norms "
    "that follow, and is no term of what later parts read. attribute(model, …) works."
)
