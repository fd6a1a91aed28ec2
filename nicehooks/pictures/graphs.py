"""The graph of a circuit: its nodes by layers, its edges as thick as their effect."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nicehooks.errors import TreeMismatch
from nicehooks.pictures.pages import Page


class GraphEdge(NamedTuple):
    """One edge of a graph; a plain tuple does as well.

    Attributes:
        sender: the name of the node that it comes from.
        receiver: the name of the node that it goes to.
        effect: how much it does, of either sign.
        label: what of the receiver it goes into ("q", "k", "v"), where that is told apart.
    """

    sender: str
    receiver: str
    effect: float
    label: str = ""


class Middle(NamedTuple):
    """Where a node is drawn: its middle."""

    x: float
    y: float


def graph_view(
    nodes: Mapping[str, float],
    edges: Iterable[tuple[str, str, float] | tuple[str, str, float, str]],
    title: str = "circuit",
) -> Page:
    """The graph of a circuit, from the first layer at the bottom to the last at the top.

    An edge is as thick as its effect, and red or blue by its sign. The node under the pointer, or that the keyboard is
    at, lights up its edges; a table below the graph lists them all.

    >>> nodes = {"embed": 0, "a0.h1": 1, "m0": 2, "logits": 3}
    >>> page = graph_view(nodes, [("embed", "a0.h1", 0.5, "q"), ("a0.h1", "logits", 2.0), ("embed", "logits", -0.25)])
    >>> page.body.count('class="edge')
    3

    Args:
        nodes: the layer of each node; nodes of one number stand side by side. Numbers between layers are layers, too.
        edges: `(sender, receiver, effect)`, or with a fourth item, what of the receiver it goes into: `"q"`.
        title: what stands above it.

    Returns:
        A page that shows itself in a notebook, and has `.to_html(file)`.

    Raises:
        TreeMismatch: an edge begins or ends at no node.
    """
    drawn = [GraphEdge(str(edge[0]), str(edge[1]), float(edge[2]), *edge[3:]) for edge in edges]
    layers = {str(node): float(layer) for node, layer in nodes.items()}
    for edge in drawn:
        for end in (edge.sender, edge.receiver):
            if end not in layers:
                raise TreeMismatch(
                    f"the edge {edge.sender!r} → {edge.receiver!r} has no node {end!r} among {len(nodes)}."
                )
    drawn.sort(key=lambda edge: abs(edge.effect))  # the thick ones are drawn last, on top
    data = {"edges": [[edge.sender, edge.receiver, edge.label, _short(edge.effect)] for edge in reversed(drawn)]}
    return Page(title, "graph", data, _drawing(_laid_out(layers, drawn), drawn, title))


# --- where the nodes stand --------------------------------------------------------------------------------------------

ACROSS, UP, MARGIN = 84.0, 70.0, 56.0
"""From one node to the next, from one layer to the next, and around the whole, in the units of the drawing."""


def _laid_out(layers: Mapping[str, float], edges: Sequence[GraphEdge]) -> dict[str, Middle]:
    """The layers one above the other, each in the middle; within a layer, nodes stand near those that they talk to."""
    rows = [[node for node in layers if layers[node] == layer] for layer in sorted(set(layers.values()))]
    widest = max(map(len, rows), default=0)
    across = {node: index - (len(row) - 1) / 2 for row in rows for index, node in enumerate(row)}
    for number in [
        *range(len(rows)),
        *reversed(range(len(rows))),
    ] * 2:  # up and down, each row by the others as they are
        rows[number].sort(key=lambda node: _pull(node, across, edges))
        across |= {node: index - (len(rows[number]) - 1) / 2 for index, node in enumerate(rows[number])}
    places: dict[str, Middle] = {}
    for number, row in enumerate(reversed(rows)):
        for index, node in enumerate(row):
            x = MARGIN + ACROSS * (index + (widest - len(row)) / 2)
            # Neighbours are a little higher and lower in turn, so that the edges between them tell apart.
            places[node] = Middle(x, MARGIN + UP * number + (10.0 * (index % 2) if len(row) > 2 else 0.0))
    return places


def _pull(node: str, across: Mapping[str, float], edges: Sequence[GraphEdge]) -> float:
    """The mean place of the nodes at the other ends of the edges of `node`."""
    ends = [across[edge.receiver] for edge in edges if edge.sender == node]
    ends += [across[edge.sender] for edge in edges if edge.receiver == node]
    return sum(ends) / len(ends) if ends else across[node]


# --- the drawing ------------------------------------------------------------------------------------------------------


def _drawing(places: Mapping[str, Middle], edges: Sequence[GraphEdge], title: str) -> str:
    width = max((place.x for place in places.values()), default=0.0) + MARGIN
    height = max((place.y for place in places.values()), default=0.0) + MARGIN
    most = max((abs(edge.effect) for edge in edges), default=1.0) or 1.0
    lines = "".join([_line(edge, number, places, most) for number, edge in enumerate(edges)])
    boxes = "".join([_box(node, place) for node, place in places.items()])
    return (
        f'<div class="scroll"><svg role="group" aria-label="{html.escape(title)}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{lines}{boxes}</svg></div>'
    )


def _line(edge: GraphEdge, number: int, places: Mapping[str, Middle], most: float) -> str:
    """An S from sender to receiver; where one pair has several edges, their bends lie apart."""
    start, end = places[edge.sender], places[edge.receiver]
    bend = (start.y - end.y) / 2 or UP / 2
    aside = {"q": -14.0, "k": 0.0, "v": 14.0}.get(edge.label, 0.0)
    # A straight line over several layers would run through the nodes between: it goes around them.
    around = 0.34 * ACROSS if abs(start.x - end.x) < 1 and abs(start.y - end.y) > 1.3 * UP else 0.0
    path = (
        f"M{start.x:.1f} {start.y:.1f}C{start.x + aside + around:.1f} {start.y - bend:.1f} "
        f"{end.x + aside + around:.1f} {end.y + bend:.1f} {end.x + aside / 2:.1f} {end.y:.1f}"
    )
    into = f" ({edge.label})" if edge.label else ""
    said = html.escape(f"{edge.sender} → {edge.receiver}{into}: {edge.effect:+.4g}")
    ends = f'data-from="{html.escape(edge.sender)}" data-to="{html.escape(edge.receiver)}"'
    thick = max(0.75, 9 * abs(edge.effect) / most)
    sign = "down" if edge.effect < 0 else "up"
    return f'<path class="edge {sign}" {ends} d="{path}" stroke-width="{thick:.2f}"><title>{said}</title></path>'


def _box(node: str, place: Middle) -> str:
    name = html.escape(node)
    wide = min(76.0, 14 + 7.2 * len(node))
    squeezed = f' textLength="{wide - 8:.0f}" lengthAdjust="spacingAndGlyphs"' if 14 + 7.2 * len(node) > 76 else ""
    return (
        f'<g class="node" data-node="{name}" tabindex="0" role="button" aria-label="{name}">'
        f'<rect x="{place.x - wide / 2:.1f}" y="{place.y - 12:.1f}" width="{wide:.1f}" height="24" rx="6"/>'
        f'<text x="{place.x:.1f}" y="{place.y + 4:.1f}"{squeezed}>{name}</text></g>'
    )


def _short(number: float) -> float | None:
    """Six digits, and None for what JSON has no word for."""
    return float(f"{number:.6g}") if abs(number) < float("inf") else None
