"""The nodes of a transformer, and between which of them edges are: what can be told without the model.

NOTE [Edges]
The residual stream is a sum, so what one part reads is the sum of what all parts before it have written. An edge is one
term of that sum at one reader. Readers are the queries, keys and values of each head, each MLP, and the logits; writers
are the embeddings, each head, and each MLP. A norm stands between the stream and a reader: it sees the changed sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import SiteNotFound


class Sender(NamedTuple):
    """A part that writes to the stream: `kind` is "embed", "head" or "mlp"."""

    name: str
    kind: str
    layer: int
    head: int = 0


class Receiver(NamedTuple):
    """A part that reads the stream: `kind` is "q", "k", "v", "mlp_in" or "logits"; `into` names the nodes it is of."""

    name: str
    kind: str
    layer: int
    head: int
    into: tuple[str, ...]


class SizesOfNodes(NamedTuple):
    """What the nodes of a transformer follow from.

    Attributes:
        n_layers, n_heads, n_kv_heads: how many there are, of heads in each layer.
        has_mlp: whether its layers have one.
        parallel: whether attention and MLP of a layer read the same stream.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    parallel: bool


class Nodes:
    """The senders and the receivers of one transformer, in order.

    Attributes:
        kind: the class of the model, for messages.
        sizes: what they follow from.
        senders, receivers: all of them.
        depths: of each node, for a picture: 0 the embeddings, `2l + 1` the heads of layer `l`, `2l + 2` its MLP.
    """

    def __init__(self, kind: str, sizes: SizesOfNodes) -> None:
        self.kind = kind
        self.sizes = sizes
        self.n_layers, self.n_heads, self.n_kv_heads, self.has_mlp, self.parallel = sizes
        self.senders = tuple(self._senders())
        self.receivers = tuple(self._receivers())
        last = 2 * self.n_layers + 1
        self.depths = {one.name: _depth(one) for one in self.senders} | {"logits": last}

    def _senders(self) -> Iterable[Sender]:
        yield Sender("embed", "embed", -1)
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                yield Sender(f"z[{layer}].head({head})", "head", layer, head)
            if self.has_mlp:
                yield Sender(f"mlp_out[{layer}]", "mlp", layer)

    def _receivers(self) -> Iterable[Receiver]:
        group = self.n_heads // self.n_kv_heads
        for layer in range(self.n_layers):
            for kind in ("q", "k", "v"):
                size = 1 if kind == "q" else group
                for head in range(self.n_heads // size):
                    into = tuple([f"z[{layer}].head({one})" for one in range(head * size, (head + 1) * size)])
                    yield Receiver(f"{kind}[{layer}].head({head})", kind, layer, head, into)
            if self.has_mlp:
                yield Receiver(f"mlp_in[{layer}]", "mlp_in", layer, 0, (f"mlp_out[{layer}]",))
        yield Receiver("logits", "logits", self.n_layers, 0, ("logits",))

    @cached_property
    def there(self) -> Tensor:
        """`[sender, receiver]`, whether there is such an edge."""
        return torch.tensor(
            [[self._reaches(sender, receiver) for receiver in self.receivers] for sender in self.senders]
        )

    def _reaches(self, sender: Sender, receiver: Receiver) -> bool:
        if sender.layer < receiver.layer:
            return True
        own_mlp = sender.kind == "head" and receiver.kind == "mlp_in" and not self.parallel
        return own_mlp and sender.layer == receiver.layer

    @cached_property
    def place_of_sender(self) -> dict[str, int]:
        """The place of each sender, by its name."""
        return {one.name: at for at, one in enumerate(self.senders)}

    @cached_property
    def place_of_receiver(self) -> dict[str, int]:
        """The place of each receiver, by its name."""
        return {one.name: at for at, one in enumerate(self.receivers)}

    def before(self, layer: int, mlp: bool = False) -> int:
        """How many senders write to what a layer reads: its attention, or its MLP."""
        per_layer = self.n_heads + self.has_mlp
        return 1 + layer * per_layer + (self.n_heads if mlp and not self.parallel else 0)

    def first(self, kind: str, layer: int) -> int:
        """The place of the first sender of one kind in one layer."""
        return next(at for at, one in enumerate(self.senders) if (one.kind, one.layer) == (kind, layer))

    def rows(self, kind: str, layer: int) -> slice:
        """The places of the receivers of one kind in one layer."""
        places = [at for at, one in enumerate(self.receivers) if (one.kind, one.layer) == (kind, layer)]
        return slice(places[0], places[-1] + 1)

    def chosen(self, which: Any, senders: bool) -> dict[str, list[int]]:
        """Names, or parts of the anatomy, with the places that each stands for; a whole layer stands for its heads.

        Raises:
            SiteNotFound: there is no such sender, or receiver.
        """
        known = self.place_of_sender if senders else self.place_of_receiver
        if which is None:
            return {name: [at] for name, at in known.items()}
        names, what = _names(which), "senders" if senders else "receivers"
        if not names:
            raise SiteNotFound(f"edges(…, {what}={which!r}) names no {what}; leave {what}= out for all of them.")
        return {name: self._places(name, known, senders) for name in names}

    def _places(self, name: str, known: dict[str, int], senders: bool) -> list[int]:
        short = {"resid_pre[0]": "embed", "resid_post[-1]": "logits"}.get(name, name).replace("attn_out[", "z[")
        places = [at for one, at in known.items() if one == short or one.startswith(f"{short}.head(")]
        if not places:
            what = "sender" if senders else "receiver"
            kinds = "embed, z[l].head(h), attn_out[l], mlp_out[l]" if senders else "q[l], k[l], v[l], mlp_in[l], logits"
            raise SiteNotFound(f"{name!r} is no {what} of {self.kind}: there are {kinds}; of q, k, v also .head(h).")
        return places


def _depth(sender: Sender) -> int:
    return 0 if sender.kind == "embed" else 2 * sender.layer + (1 if sender.kind == "head" else 2)


def _names(which: Any) -> list[str]:
    """The names of parts, however they are nested."""
    if isinstance(which, str):
        return [which]
    if hasattr(which, "chain"):  # a part, which is a path
        return [which.what]
    return [name for one in which for name in _names(one)]
