"""Gradients that can be differentiated again, at the price of gradients that cannot.

NOTE [Gradients of gradients, when asked for]
`torch.autograd.grad(…, create_graph=True)` makes a graph of the backward, whether or not anybody differentiates it. So
the gradients are computed without; but where something outside could be differentiated through them (a parameter, an
input), they get one node that knows the graph of the forward, and makes that of the backward when it is asked to.
The node's inputs are the leaves that the forward depends on. Where the forward depends on a tensor that was computed
outside, which no node can be given as an input once only its place in the graph is known, the graph is made at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from nicehooks import torch_private_tensors


def gradients(
    value: Tensor, edges: Sequence[Any], begun: int, own: Tensor, again: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """`value`, and its gradients at `edges`; None for those that it does not depend on.

    Args:
        value: a scalar tensor.
        edges: places in its graph, as `get_gradient_edge` gives them.
        begun: the sequence number of autograd when the forward began.
        own: a leaf of the forward that nothing outside knows.
        again: whether what is outside may differentiate the results.
    """
    if value.grad_fn is None:
        return value, [None] * len(edges)
    leaves, others = _outside(value.grad_fn, begun, own) if again else ([], False)
    found: list[Any]
    *found, _ = torch.autograd.grad(
        value, [*edges, own], create_graph=others, retain_graph=bool(leaves) or others, allow_unused=True
    )
    if not leaves and not others:
        return value.detach(), found
    return value, found if others else _with_history(value, edges, found, leaves)


def _outside(last: Any, begun: int, own: Tensor) -> tuple[list[Tensor], bool]:
    """The leaves of the graph of a forward but `own`, and whether it has anything else that was there before it."""
    leaf: Any = type(get_gradient_edge(own).node)
    nodes: list[Any] = [last]
    leaves: list[Any] = []
    found: set[Any] = {last, None}
    for node in nodes:  # which grow meanwhile; this is a large part of what `grad_at` costs a small model
        for before, _ in node.next_functions:
            if before not in found:
                found.add(before)
                (leaves if type(before) is leaf else nodes).append(before)
    others = min(map(torch_private_tensors.sequence_number, nodes)) < begun
    return [node.variable for node in leaves if node.variable is not own], others


def _with_history(
    value: Tensor, edges: Sequence[Any], found: list[Tensor | None], leaves: list[Tensor]
) -> list[Tensor | None]:
    """`found`, with a node that differentiates them with respect to `leaves`."""
    there = [number for number, gradient in enumerate(found) if gradient is not None]
    made: tuple[Tensor, ...] = _Again.apply(  # pyright: ignore
        value, [edges[number] for number in there], [found[number] for number in there], *leaves
    )
    known = dict(zip(there, made, strict=True))
    return [known.get(number) for number in range(len(found))]


class _Again(torch.autograd.Function):
    """See NOTE [Gradients of gradients, when asked for]."""

    @staticmethod
    def forward(ctx: Any, value: Any, edges: list[Any], found: list[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # value.detach() would lose the graph, and value itself is no input: no gradient is to flow to it from here.
        ctx.value, ctx.edges, ctx.leaves = value, edges, leaves
        own = [g.view_as(g) if g.layout is torch.strided else g.clone() for g in found]
        return tuple(own)  # each a tensor of its own

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        with torch.enable_grad():
            found = torch.autograd.grad(ctx.value, ctx.edges, create_graph=True)
        pairs = [(g, a) for g, a in zip(found, along, strict=True) if a is not None and g.requires_grad]
        nothing = [None] * len(ctx.leaves)
        through = nothing if not pairs else _through(pairs, ctx.leaves)
        return None, None, None, *through


def _through(pairs: list[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(
        [gradient for gradient, _ in pairs],
        leaves,
        [along for _, along in pairs],
        create_graph=torch.is_grad_enabled(),
        retain_graph=True,  # the node may be asked again
        allow_unused=True,
    )
