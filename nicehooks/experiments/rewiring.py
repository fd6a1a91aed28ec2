"""One run in which any set of edges carries what another run wrote: the exact side of edges and circuits.

NOTE [A run with other edges]
Whenever a sender has written, it is noted how far the other run's writing is from that. A receiver reads its stream
with the sum of these changes over its patched edges, through the norm and the projection that it always reads through.
What it makes of that goes on to later parts as ever. So any number of edges are patched in one forward, and a receiver
without a patched edge reads bit for bit what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nicehooks.anatomies.parts import Part
from nicehooks.contexts.changes import edit
from nicehooks.core.selection import Site
from nicehooks.experiments.contributions import written_by
from nicehooks.experiments.reading import read_by
from nicehooks.experiments.wiring import Wiring

At = Callable[[Tensor], Tensor | None]


@contextmanager
def rewired(wiring: Wiring, patched: Tensor, new: Tensor) -> Generator[None]:
    """Patches edges of the model while the context lasts, for one forward, without gradients.

    Args:
        wiring: the nodes of the model.
        patched: `[sender, receiver]`, the edges.
        new: what each sender is to write on them, `[sender, batch, pos, d_model]`.
    """
    if not patched.any():
        yield
        return
    run = _EdgesInOneRun(wiring, patched, new)
    places = run.places()
    with torch.no_grad(), edit(wiring.model, list(places), lambda value, site: _act_at(places, value, site)):
        yield


def _act_at(places: dict[str, list[At]], value: Tensor, site: Site) -> Tensor:
    for act in places[str(site)]:
        changed = act(value)
        value = value if changed is None else changed
    return value


class _EdgesInOneRun:
    """The streams of the layers, and what senders have written, in one forward; see NOTE [A run with other edges]."""

    def __init__(self, wiring: Wiring, patched: Tensor, new: Tensor) -> None:
        self.wiring = wiring
        self.patched = (patched & wiring.there).to(new.device)
        self.new = new
        self.changes = torch.zeros_like(new)
        self.streams: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}

    def places(self) -> dict[str, list[At]]:
        """What to do at which part: only at those that patched edges begin or end at."""
        found: dict[str, list[At]] = {}

        def at(part: Part, act: At) -> None:
            found.setdefault(str(part), []).append(act)

        body, wiring = self.wiring.body, self.wiring
        ends = sorted({(one.layer, one.kind) for one in _of(wiring.receivers, self.patched.any(0))})
        for layer, kind in ends:
            if kind != "logits":
                at(body.resid_pre[layer], partial(self._keep, self.streams, layer))
            if kind == "mlp_in" and not wiring.parallel:
                at(body.attn_out[layer], partial(self._keep, self.attention, layer))
        for layer, kind in sorted({(one.layer, one.kind) for one in _of(wiring.senders, self.patched.any(1))}):
            part = body.resid_pre[0] if kind == "embed" else getattr(body, {"head": "z", "mlp": "mlp_out"}[kind])[layer]
            at(part, partial(self._note, part, wiring.first(kind, layer)))
        for layer, kind in ends:
            part = body.resid_post[-1] if kind == "logits" else getattr(body, kind)[layer]
            at(part, self._logits if kind == "logits" else partial(self._read, kind, layer))
        return found

    def _keep(self, where: dict[int, Tensor], layer: int, value: Tensor) -> None:
        where[layer] = value

    def _note(self, part: Part, first: int, value: Tensor) -> None:
        now = written_by(self.wiring, part, value)
        self.changes[first : first + len(now)] = self.new[first : first + len(now)] - now

    def _moves(self, rows: slice, before: int) -> Tensor:
        """By how much the streams of these receivers change, `[receiver, batch, pos, d_model]`."""
        edges = self.patched[:before, rows].to(self.changes.dtype)
        return torch.einsum("sr,sbpd->rbpd", edges, self.changes[:before])

    def _read(self, kind: str, layer: int, value: Tensor) -> Tensor:
        rows, is_mlp = self.wiring.rows(kind, layer), kind == "mlp_in"
        stream = self.streams[layer] + self.attention[layer] if is_mlp and self.attention else self.streams[layer]
        new = read_by(self.wiring, kind, layer, stream + self._moves(rows, self.wiring.before(layer, is_mlp)))
        has_edges = self.patched[:, rows].any(0)
        return torch.where(has_edges if is_mlp else has_edges[:, None], new, value)

    def _logits(self, stream: Tensor) -> Tensor:
        return stream + self._moves(slice(-1, None), len(self.changes))[0]


def _of(nodes: Sequence[Any], which: Tensor) -> list[Any]:
    return [nodes[at] for at in which.nonzero().flatten().tolist()]
