"""The gradient ports: `@grad` of a module's output, `@input.grad` of its arguments.

NOTE [How a gradient is reached]
A hook on the tensor itself sees its gradient wherever autograd runs: in plain backward, under `torch.func.grad` and
`vmap(grad)`, in double backward, behind in-place layers. What acts on one tensor acts in the order of the
interventions: see NOTE [One line for each tensor]. A tensor that nothing has made differentiable (frozen parameters,
inputs without gradients) is made so at the site: what comes behind is differentiated with respect to it, as asked.

A tensor that comes out of a module as it went in, or that goes in, may be used elsewhere too. Its use at the site gets
a node of its own in the graph (a view), or the hook would see the gradients of all uses.

A hook outlives its context, with the graph it is in. It does nothing once the session is over: backward belongs inside.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks import torch_private
from nicehooks.core.register import Companion, Pairs, PortKind, register_port
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Session
from nicehooks.core.tap import Frame
from nicehooks.core.when import When
from nicehooks.errors import TreeMismatch
from nicehooks.paths.grammar import with_chain
from nicehooks.paths.ports import Port, Words
from nicehooks.ports.arguments import InputRule
from nicehooks.ports.compiled_gradients import give_ticket, passed, take_ticket
from nicehooks.ports.gradient_lines import Gradients, Stations
from nicehooks.values import trees
from nicehooks.values.trees import Chain, place_in

NO_GRADIENT = (
    "no gradient came by. Run backward inside the context, of something that depends on this value, with gradients "
    "enabled in the forward. (An in-place layer overwrites its input: take the gradient of the module before it.)"
)


def act_on_gradient(rule: SiteRule, gradient: Tensor, key: str, steps: int, order: int, mapped: int = 0) -> Any:
    """`gradient`, of a tensor at `key`, after the rule has acted on it.

    Args:
        steps: how many steps of the rule's path lead on in the tensor.
        order: when the tensor was made.
        mapped: how many dimensions in front are those of examples, which an edit sees one by one.
    """
    rule.session.order = order
    act: Any = partial(rule.act, chain=rule.chain[len(rule.chain) - steps :], key=key)
    for _ in range(mapped if rule.action.changes else 0):
        act = torch.vmap(act, randomness="different")
    return act(gradient)


class ComesBack(Companion):
    """Lets the backward of compiled code come back to the rules; see NOTE [Gradients of compiled code]."""

    def begin(self, session: Session) -> None:
        if torch_private.innermost_transform() is None:
            give_ticket(session, {rule.index: partial(act_on_gradient, rule) for rule in self.rules})

    def end(self, session: Session) -> None:
        take_ticket(session)


class GradientRule(SiteRule):
    """The gradient of what is differentiated with respect to the output of a module."""

    __slots__ = ()
    companion = ComesBack
    reason = NO_GRADIENT

    def before(self, frame: Frame) -> None:
        self.number(frame)

    def after(self, frame: Frame) -> None:
        frame.value = watched(self, frame, frame.value, self.chain)


class InputGradientRule(InputRule):
    """The gradient of what is differentiated with respect to an argument of a module."""

    __slots__ = ()
    reusable = False
    companion = ComesBack
    reason = NO_GRADIENT

    def through(self, frame: Frame | None, value: Any, chain: Chain | None = None) -> Any:
        return value if frame is None else watched(self, frame, value, self.chain if chain is None else chain)


_order = itertools.count()


@torch_private.evaluated_while_tracing
def next_order() -> int:
    """Numbers the values whose gradients are watched: backward comes to the last call of a module first."""
    return next(_order)


def watched(rule: SiteRule, frame: Frame, value: Any, chain: Chain) -> Any:
    """`value` with the rule on the gradient of each of its tensors that the path leads to, or leads into."""
    key = rule.key_of(frame)
    if key is None:
        return value
    return watched_at(rule, frame, key, value, chain, used_by(frame, value))


def watched_at(rule: SiteRule, frame: Frame, key: str, value: Any, chain: Chain, used: list[Tensor]) -> Any:
    """As `watched`, at the path `key`; `used` are the tensors that have another use than this one."""
    try:
        way, rest = _way_and_rest(value, chain)
        stations = stations_of(frame, rule.path.port.kind)
        found = _Found(rule, key, len(way), rest, used, [], stations)
        return trees.rewrite(value, way, lambda part: _watch_part(found, part))
    except TreeMismatch as error:
        raise rule.at_edge(error, value, key) from None


def used_by(frame: Frame, value: Any) -> list[Tensor]:
    """The tensors with another use than one in `value`: what went into the call, and what is there twice."""
    used = [leaf for leaf in trees.leaves((frame.args, frame.kwargs)) if isinstance(leaf, Tensor)]
    if isinstance(value, Tensor):
        return used
    here = [leaf for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]
    return used + [one for at, one in enumerate(here) if place_in(here[:at], one) is not None]


def stations_of(frame: Frame, port: str) -> Stations:
    """The stations of the tensors that go into the call, or of those that come out of it: at the port `port`."""
    return frame.kept.setdefault(port, Stations())


def _way_and_rest(value: Any, chain: Chain) -> tuple[Chain, Chain]:
    """The steps of `chain` that lead to a tensor, or to the end, and those that lead on in it."""
    for taken in range(len(chain)):
        if isinstance(trees.get(value, chain[:taken]), Tensor):
            return chain[:taken], chain[taken:]
    return chain, ()


class _Found(NamedTuple):
    """Where the tensors are whose gradients are wanted.

    Attributes:
        rule: the rule whose action the gradients go through.
        text: the path of the site in this call.
        taken: how many steps of the path lead to the tensors.
        rest: the steps that lead on in them.
        used: the tensors that have another use than this one.
        passed: the tensors that this rule has come by already.
        stations: where gradients of this call are acted on already.
    """

    rule: SiteRule
    text: str
    taken: int
    rest: Chain
    used: list[Tensor]
    passed: list[Tensor]
    stations: Stations

    def key(self, more: Chain) -> str:
        """The path of the tensor at the end of `more`."""
        chain = self.rule.path.chain
        return with_chain(self.text, (*chain[: self.taken], *more, *chain[self.taken :]))


def _watch_part(found: _Found, part: Any) -> Any:
    if not found.rule.wild and not any(map(_is_differentiable, trees.leaves(part))):
        raise TreeMismatch(f"{trees.describe(part)} has no tensor in it that could have a gradient")
    return _watch_all(found, part, ())


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _watch_all(found: _Found, part: Any, more: Chain) -> Any:
    """Every tensor in `part` has a gradient of its own, and a key of its own."""
    if isinstance(part, Tensor):
        return _watch(found, part, found.key(more))
    node = trees.open_node(part)
    if node is None:
        return part
    inner = zip(node.entries, node.children, strict=True)
    children = [_watch_all(found, child, (*more, entry)) for entry, child in inner]
    same = all([trees.is_same(new, old) for new, old in zip(children, node.children, strict=True)])
    return part if same else node.rebuild(children)


def _watch(found: _Found, tensor: Tensor, key: str) -> Tensor:
    rule, rest = found.rule, found.rest
    if tensor not in found.stations or place_in(found.passed, tensor) is not None:
        if not may_have_gradient(tensor):
            return tensor
        tensor = own_use(tensor, found.used + found.passed)
        if torch_private.innermost_transform() is None:
            tensor = made_differentiable(tensor)
    found.passed.append(tensor)
    session, order = rule.session, next_order()
    if torch.compiler.is_dynamo_compiling() and session.ticket is not None:
        ticket, index, steps = session.ticket, rule.index, len(rest)
        return found.stations.watch(
            [tensor], lambda gradients: list(passed(gradients[0], ticket, index, key, steps, order)), ticket=ticket
        )[0]

    def on_gradient(gradients: Gradients) -> Gradients:
        if session.ended:
            return gradients
        return [act_on_gradient(rule, gradients[0], key, len(rest), order)]

    return found.stations.watch([tensor], on_gradient)[0]


def may_have_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that can have a gradient, here and now."""
    return torch.is_grad_enabled() and _is_differentiable(value)


def own_use(tensor: Tensor, used: list[Tensor]) -> Tensor:
    """`tensor`, or a view if it is in `used`: with other uses come other gradients."""
    return tensor if place_in(used, tensor) is None else tensor.view_as(tensor)


def made_differentiable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that requires a gradient: a clone, because an in-place layer may not write to a leaf."""
    if tensor.requires_grad or torch.compiler.is_dynamo_compiling():  # there, the ticket does it
        return tensor
    return tensor.detach().requires_grad_().clone()


class GradientPort(PortKind):
    """`@grad`: the gradient of what is differentiated with respect to the output of a module."""

    kind = "grad"
    is_gradient = True
    rank = 1
    shown = "grad"
    rule: type[SiteRule] = GradientRule

    def read(self, words: Words) -> Port | None:
        return Port(self.kind) if words.name == self.kind and not words.has_brackets else None

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        return [(site.module, self.rule(site, action, when))]


class InputGradientPort(GradientPort):
    """`@input.grad`: the same of an argument of a module."""

    kind = shown = "input.grad"
    rule = InputGradientRule


register_port(GradientPort())
register_port(InputGradientPort())
GRADIENT, INPUT_GRADIENT = Port(GradientPort.kind), Port(InputGradientPort.kind)
