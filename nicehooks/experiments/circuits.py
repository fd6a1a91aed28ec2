"""`circuit`: the sub-graph of the edges that matter most, which reaches the logits."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError, TreeMismatch
from nicehooks.experiments.edge_effects import Edges
from nicehooks.experiments.given import count_given, threshold_given
from nicehooks.experiments.nodes import Nodes
from nicehooks.pictures.graphs import graph_view
from nicehooks.pictures.pages import Page


class Edge(NamedTuple):
    """One edge of a circuit.

    Attributes:
        sender: the node that writes, `"z[3].head(5)"`.
        receiver: what reads it, `"q[7].head(2)"`.
        effect: of the edge.
        into: the nodes that this is an input of, `("z[7].head(2)",)`: several where heads share keys and values.
    """

    sender: str
    receiver: str
    effect: float
    into: tuple[str, ...]


class Circuit:
    """A part of the graph of a transformer: nodes, and edges, from each of which a way leads on to the logits.

    Attributes:
        edges: its edges, those with the largest effects first.
        nodes: its nodes, each with its depth: 0 for the embeddings, `2l + 1` for the heads of layer `l`, `2l + 2` for
            its MLP, and the largest for the logits.
        wiring: the nodes of the model that it is of.
        scores: the effects that it was chosen by.
    """

    def __init__(self, wiring: Nodes, edges: Iterable[Edge], scores: Edges | None = None) -> None:
        self.wiring = wiring
        self.scores = scores
        self.edges = sorted(edges, key=lambda edge: -abs(edge.effect))
        names = {"logits"} | {edge.sender for edge in self.edges}
        self.nodes = {
            name: depth for name, depth in sorted(wiring.depths.items(), key=lambda at: at[1]) if name in names
        }

    @property
    def mask(self) -> Tensor:
        """`[sender, receiver]`, which edges of the whole graph it has."""
        mask = torch.zeros_like(self.wiring.there)
        for edge in self.edges:
            mask[self.wiring.place_of_sender[edge.sender], self.wiring.place_of_receiver[edge.receiver]] = True
        return mask

    def drawn(self) -> list[tuple[str, str, float, str]]:
        """The edges for a picture: sender, receiving node, effect, and the input (`"q"`, `"k"`, `"v"`, or `""`)."""
        kinds = {one.name: one.kind if one.kind in ("q", "k", "v") else "" for one in self.wiring.receivers}
        every = [(edge.sender, node, edge.effect, kinds[edge.receiver]) for edge in self.edges for node in edge.into]
        return [edge for edge in every if edge[1] in self.nodes]

    def to_html(self, file: str | Path, title: str = "circuit") -> Path:
        """Writes the graph as an interactive page that needs nothing beside itself, and returns its path.

        Layers stand one above the other, the embeddings at the bottom; an edge is as thick as its effect, and a table
        lists them all.

        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from nicehooks import edges
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)).eval()
        >>> found = edges(model, 0.0, lambda output: output.logits[:, -1, 8], torch.tensor([[3, 1, 4]]))
        >>> import os, tempfile
        >>> circuit(found, top=5).to_html(os.path.join(tempfile.mkdtemp(), "circuit.html")).name
        'circuit.html'

        Args:
            file: where it goes.
            title: what stands above it.

        Raises:
            FileMissing: there is no such folder.
            PlotError: the file cannot be written.
        """
        return self._page(title).to_html(file)

    def _page(self, title: str) -> Page:
        return graph_view(self.nodes, self.drawn(), title)

    def _repr_html_(self) -> str:
        return self._page("circuit")._repr_html_()

    def __len__(self) -> int:
        return len(self.edges)

    def __repr__(self) -> str:
        return f"Circuit({len(self.nodes)} nodes, {len(self.edges)} of {int(self.wiring.there.sum())} edges)"


def circuit(edges: Edges, top: int | None = None, threshold: float | None = None) -> Circuit:
    """The sub-graph of the edges with the largest effects, of either sign, that reaches the logits.

    It grows from the logits: of all edges into nodes that are in it already, the one with the largest effect comes next
    (as Hanna et al. 2024 do), so that every edge of it leads on to the logits.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture, edges
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)).eval()
    >>> parts, difference = anatomy(model), lambda output: output.logits[:, -1, 8] - output.logits[:, -1, 9]
    >>> with capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
    ...     _ = model(torch.tensor([[3, 1, 7, 1, 5]]))
    >>> found = circuit(edges(model, values, difference, torch.tensor([[3, 1, 4, 1, 5]])), top=5)
    >>> len(found), list(found.nodes)[-1], found.edges[0].receiver
    (5, 'logits', 'logits')

    Args:
        edges: the effects of all edges, from `edges`.
        top: how many edges, if there are so many.
        threshold: how large the effect of an edge has to be, at least; then as many as are that large.

    Raises:
        TypeError, ValueError: `edges` are others, `top` is no whole number, `threshold` no number.
        TreeMismatch: the effect of an edge is NaN.
        NiceHooksError: neither is given, or both; `edges` are those of chosen senders or receivers alone.
    """
    if (top is None) == (threshold is None):
        raise NiceHooksError("circuit(edges, top=…) takes a number of edges, or threshold=… the smallest effect.")
    if not isinstance(edges, Edges):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"circuit(edges, …) takes what edges(model, …) returns, not {type(edges).__name__}")
    top = None if top is None else count_given(top, "circuit(edges, top")
    threshold = None if threshold is None else threshold_given(threshold, "circuit(edges, threshold")
    wiring = edges.wiring
    if tuple(edges.values.shape) != tuple(wiring.there.shape):
        raise NiceHooksError("circuit takes the effects of all edges; leave senders= and receivers= of edges(…) out.")
    lost = (wiring.there & edges.values.isnan().cpu()).nonzero().tolist()
    if lost:
        raise TreeMismatch(NAN_EDGE.format(edge=edge_at(wiring, edges.values, *lost[0])))
    chosen = grown(wiring, edges.values, wiring.there.numel() if top is None else top, threshold or 0.0)
    return Circuit(wiring, [edge_at(wiring, edges.values, *place) for place in chosen], edges)


NAN_EDGE = "circuit: the effect of the edge {edge.sender} → {edge.receiver} is NaN, so it has no size."


def grown(wiring: Nodes, scores: Tensor, top: int, threshold: float = 0.0) -> list[tuple[int, int]]:
    """The places of the edges that a circuit grows by from the logits, in order."""
    sizes = scores.abs().tolist()
    there = wiring.there.tolist()
    inputs: dict[str, list[int]] = {}
    for at, receiver in enumerate(wiring.receivers):
        for node in receiver.into:
            inputs.setdefault(node, []).append(at)
    opened: set[int] = set()
    candidates: list[tuple[float, int, int]] = []

    def open_node(node: str) -> None:
        for receiver in inputs.get(node, []):
            if receiver not in opened:
                opened.add(receiver)
                for sender in range(len(there)):
                    if there[sender][receiver] and sizes[sender][receiver] >= threshold:
                        heapq.heappush(candidates, (-sizes[sender][receiver], sender, receiver))

    open_node("logits")
    chosen: list[tuple[int, int]] = []
    while candidates and len(chosen) < top:
        _, sender, receiver = heapq.heappop(candidates)
        chosen.append((sender, receiver))
        open_node(wiring.senders[sender].name)
    return chosen


def edge_at(wiring: Nodes, scores: Tensor, sender: int, receiver: int) -> Edge:
    """The edge at a place, with its effect."""
    reads = wiring.receivers[receiver]
    return Edge(wiring.senders[sender].name, reads.name, scores[sender, receiver].item(), reads.into)


def connected(wiring: Nodes, mask: Tensor) -> Tensor:
    """The edges of `mask` from which a way leads to the logits."""
    kept = torch.zeros_like(mask)
    for sender, receiver in grown(wiring, mask.float(), mask.numel(), 0.5):
        kept[sender, receiver] = True
    return kept


def edges_in(mask: Tensor) -> Sequence[tuple[int, int]]:
    """The places that are true, in order."""
    return [(sender, receiver) for sender, receiver in mask.nonzero().tolist()]


def check_circuit_of(wiring: Nodes, circuit: Circuit, verb: str) -> None:
    """Refuses a circuit of a model with other parts.

    Raises:
        TreeMismatch: it is.
    """
    if circuit.wiring.sizes != wiring.sizes:
        raise TreeMismatch(PARTS_DIFFER.format(verb=verb, of=_shown_parts(circuit.wiring), model=_shown_parts(wiring)))


def _shown_parts(nodes: Nodes) -> str:
    shared = "" if nodes.n_kv_heads == nodes.n_heads else f" that share {nodes.n_kv_heads} keys"
    return f"{nodes.kind} with {nodes.n_layers} layers of {nodes.n_heads} heads{shared}"


PARTS_DIFFER = "{verb}(model, …): the circuit is of a {of}, and model is a {model}: their edges are not the same."
