"""Gradient lines: what acts on the gradients of one call's tensors, in order, at a node of the graph of its own.

NOTE [A node of its own]
The gradient at a site is that of what is used behind the site, and of nothing else. A module may use its result itself
(to compute another one), its caller an argument a second time, and a container returns the very tensor of its child. So
what passes a site is replaced by a tensor that is the same to the model and a node of its own to autograd: uses before
the site do not count, and backward reaches the container before the child.

Such a tensor shares its memory and its version counter with the old one, but autograd does not take it for a view: an
in-place layer may come next, whose gradient stops at the node, and whoever holds the old one learns that it was
overwritten. Where autograd has to know of the others that share the memory (a view, an argument that comes out as it
went in), the node is an ordinary view with a hook on it: an in-place layer then goes past it, and the site is not
reached, which is said. Several such tensors at once are views that autograd lets nobody overwrite.

NOTE [One line for each tensor]
Interventions at a gradient act in the order in which they were entered, whether they want the gradient of one tensor or
those of several tensors at once. So all that act on a tensor of a call stand in one line, in this order, and a line is
a node. Several tensors whose gradients have to come by together go through one node. Who stood in the lines of single
tensors before moves over to the line of them all. In compiled code the node returns copies, which cost nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks import torch_private, torch_private_tensors
from nicehooks.errors import UnsupportedModule
from nicehooks.values import trees
from nicehooks.values.trees import place_in

Gradients = list[Any]
"""The gradients of some tensors, in their order."""
OnGradients = Callable[[Gradients], Gradients]


class _InLine(NamedTuple):
    """Somebody in a line: what they do, and to the gradients at which positions."""

    positions: list[int]
    fn: OnGradients
    token: Tensor | None = None

    def act(self, gradients: Gradients) -> Gradients:
        """The gradients after it has acted on them; behind them, the gradient of its token, if it has one."""
        new = self.fn([gradients[position] for position in self.positions])
        of_token = new[len(self.positions) :]
        found = dict(zip(self.positions, new[: len(self.positions)], strict=True))
        return [*[found.get(position, gradient) for position, gradient in enumerate(gradients)], *of_token]


class GradientLine:
    """What acts on the gradients of some tensors; see NOTE [One line for each tensor].

    Attributes:
        acting: who acts, in order.
        last: who comes after all of them, whenever they were added: they see what those did.
        sources: in traced code, what went into the node.
    """

    __slots__ = ("acting", "last", "sources")

    def __init__(self, acting: Sequence[_InLine] = ()) -> None:
        self.acting: list[_InLine] = list(acting)
        self.last: list[_InLine] = []
        self.sources: list[Tensor] = []

    def pass_through(self, gradients: Gradients) -> Gradients:
        """The gradients after everything has acted on them."""
        for one in [*self.acting, *self.last]:
            gradients = one.act(gradients)[: len(gradients)]
        return gradients

    def pass_through_with_tokens(self, gradients: Gradients) -> tuple[Gradients, Gradients]:
        """As `pass_through`, and the gradient of each of the `tokens`."""
        count, tokens = len(gradients), self.tokens
        of_tokens: list[Any] = [0.0] * len(tokens)
        for one in self.acting:
            new = one.act(gradients)
            gradients = new[:count]
            for at, token in enumerate(tokens):
                if token is one.token:
                    of_tokens[at] = of_tokens[at] + new[count]
        return gradients, of_tokens

    @property
    def tokens(self) -> list[Tensor]:
        """Of those that act through an operator; see NOTE [Gradients of compiled code]."""
        found: list[Tensor] = []
        for one in self.acting:
            if one.token is not None and not any([one.token is token for token in found]):
                found.append(one.token)
        return found

    def take_over(self, other: GradientLine, positions: list[int]) -> None:
        """Whoever is in the line `other`, whose tensors are at `positions` here, is in this one from now on."""
        for mine, theirs in ((self.acting, other.acting), (self.last, other.last)):
            mine += [_InLine([positions[at] for at in one.positions], one.fn) for one in theirs]
            theirs.clear()


class GradientLines:
    """The lines of the tensors that go into one call, or of those that come out of it."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: list[tuple[Tensor, GradientLine]] = []

    def __contains__(self, tensor: Tensor) -> bool:
        return self._line_of(tensor) is not None

    def watch(
        self, tensors: Sequence[Tensor], fn: OnGradients, last: bool = False, token: Tensor | None = None
    ) -> list[Tensor]:
        """What takes the place of `tensors`, with `fn` on their gradients, all at once.

        With a `token`, which traced code has, the last that `fn` returns is the gradient of the token.
        """
        if torch.compiler.is_compiling():
            return self._watch_in_traced_code(tensors, fn, token)
        line = self._line_of(tensors[0])
        if line is None or any([self._line_of(tensor) is not line for tensor in tensors]):
            line, tensors = self._new_line(tensors)
        if line is None:
            return list(tensors)
        one = _InLine(_places_in(self._tensors_of(line), tensors), fn)
        (line.last if last else line.acting).append(one)
        return list(tensors)

    def _watch_in_traced_code(self, tensors: Sequence[Tensor], fn: OnGradients, token: Any) -> list[Tensor]:
        """Dynamo traces what a node does when the node is made, so one more in the line needs a new node."""
        before = self._line_of(tensors[0])
        if any([self._line_of(tensor) is not before for tensor in tensors]):
            raise UnsupportedModule(OTHER_PARTS)
        if before is not None and len(self._tensors_of(before)) != len(tensors):
            raise UnsupportedModule(OTHER_PARTS)
        earlier = [] if before is None else before.acting
        line = GradientLine([*earlier, _InLine(list(range(len(tensors))), fn, token)])
        line.sources = list(tensors) if before is None else before.sources
        watched = _TracedNode.apply(line, *line.tokens, *line.sources)
        self._places += [(tensor, line) for tensor in watched]
        return list(watched)

    def _line_of(self, tensor: Tensor) -> GradientLine | None:
        return next((line for watched, line in reversed(self._places) if watched is tensor), None)

    def _tensors_of(self, line: GradientLine) -> list[Tensor]:
        return [tensor for tensor, at in self._places if at is line]

    def _new_line(self, tensors: Sequence[Tensor]) -> tuple[GradientLine | None, Sequence[Tensor]]:
        """A line of what takes the place of `tensors`; none where nothing differentiates them."""
        line = GradientLine()
        for before in [at for at in map(self._line_of, tensors) if at is not None]:
            theirs = self._tensors_of(before)
            if all([place_in(tensors, one) is not None for one in theirs]):  # else they come by later in backward
                line.take_over(before, _places_in(tensors, theirs))
        watched = torch_private_tensors.where_differentiated(list(tensors), line.pass_through, _put_node)
        if watched is None:
            return None, tensors
        self._places += [(tensor, line) for tensor in watched]
        return line, watched


def _places_in(tensors: Sequence[Tensor], some: Sequence[Tensor]) -> list[int]:
    """Where each of `some` stands among `tensors`, which has them all."""
    return [at for one in some if (at := place_in(tensors, one)) is not None]


OTHER_PARTS = (
    "in compiled code, hooks on the gradients of one value have to be on the same parts of it: "
    "set them on the whole value."
)


def with_gradient_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    """What takes the place of `tensor`, with `hook` on its gradient, if anything differentiates it."""
    return GradientLines().watch([tensor], lambda gradients: [hook(gradients[0])])[0]


def may_have_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that can have a gradient, here and now."""
    return torch.is_grad_enabled() and trees.has_fractions(value)


def made_differentiable(tensor: Tensor) -> Tensor:
    """`tensor`, or a leaf with its memory, if nothing has made it differentiable.

    What comes behind is then differentiated with respect to it. A transform has made it so or means not to, and in
    compiled code the token does it.
    """
    if tensor.requires_grad or torch.compiler.is_compiling() or torch_private.innermost_transform() is not None:
        return tensor
    return trees.usable(tensor).detach().requires_grad_()


# --- the node ---------------------------------------------------------------------------------------------------------


def _put_node(tensors: list[Tensor], on_gradients: OnGradients) -> list[Tensor]:
    """See NOTE [A node of its own]."""
    if len(tensors) > 1 or not torch_private_tensors.is_view(tensors[0]):
        return list(_Node.apply(on_gradients, *tensors))
    view = tensors[0].view_as(tensors[0])
    view.register_hook(lambda gradient: torch_private_tensors.each_of_batch(on_gradients, [gradient])[0])
    return [view]


class _Node(torch.autograd.Function):
    """The identity, with something on the gradients of all its tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(on_gradients: OnGradients, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple([one.view_as(one) if torch_private_tensors.is_view(one) else one.detach() for one in tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.on_gradients = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None, *torch_private_tensors.each_of_batch(ctx.on_gradients, list(gradients)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple([tangent.view_as(tangent) for tangent in tangents[1:]])


class _TracedNode(torch.autograd.Function):
    """As `_Node`, as Dynamo takes it: without forward mode, and with tokens before the tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(line: GradientLine, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple([tensor.clone() for tensor in tensors[len(line.tokens) :]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.line = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if not ctx.line.tokens:
            return (None, *ctx.line.pass_through(list(gradients)))
        new, of_tokens = ctx.line.pass_through_with_tokens(list(gradients))
        return (None, *of_tokens, *new)
