"""The gradient ports: `@grad` of a module's output, `@input.grad` of its arguments.

NOTE [How a gradient is reached]
What passes the site gets a node of its own in the graph, where its gradient comes by: see NOTE [A node of its own]. It
does wherever autograd runs: in plain backward, under `torch.func.grad` and `vmap(grad)`, in double backward, behind
in-place layers. What acts on one tensor acts in the order of the interventions: see NOTE [One line for each tensor]. A
tensor that nothing has made differentiable (frozen parameters, inputs without gradients) is made so at the site: what
comes behind is differentiated with respect to it, as asked.

A node outlives its context, with the graph it is in. It does nothing once the session is over, for backward belongs
inside; unless its action says that it `outlives` the context: then it is gone when the graph is.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks import torch_private, torch_private_tensors
from nicehooks.core.frames import Frame
from nicehooks.core.register import Companion, Pairs, PortKind, register_port
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Session
from nicehooks.core.when import When
from nicehooks.errors import TreeMismatch, UnsupportedModule
from nicehooks.paths.grammar import with_chain
from nicehooks.paths.ports import Port, Words
from nicehooks.ports.arguments import InputRule
from nicehooks.ports.compiled_gradients import give_token, passed, take_token
from nicehooks.ports.gradient_lines import (
    GradientLines,
    Gradients,
    made_differentiable,
    may_have_gradient,
)
from nicehooks.values import trees
from nicehooks.values.trees import STAR, Chain, place_in

NO_GRADIENT = (
    "no gradient came by. Run backward inside the context, of something that depends on this value, with gradients "
    "enabled in the forward. (An in-place layer overwrites its input: take the gradient of the module before it.)"
)


COMPILED_BACKWARD = (
    "{key!r}: torch._dynamo.config.compiled_autograd is on, and a backward that is compiled as one graph does not come "
    "back to interventions on gradients.\n"
    "    torch._dynamo.config.compiled_autograd = False  # the forward may be compiled all the same"
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
        if torch_private_tensors.is_backward_compiled():
            raise UnsupportedModule(COMPILED_BACKWARD.format(key=self.rules[0].key))
        if torch_private.innermost_transform() is None:
            give_token(session, {rule.index: partial(act_on_gradient, rule) for rule in self.rules})

    def end(self, session: Session) -> None:
        take_token(session)


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
    spelled = rule.path.chain
    lead = spelled[: len(spelled) - len(chain)]
    try:
        for one in _each_in_trees(value, chain):
            way, rest = _split_at_tensor(value, one)
            own = tuple([new if old is STAR else old for old, new in zip(spelled, (*lead, *one), strict=True)])
            text = key if one is chain else with_chain(key, own)
            found = _Found(rule, text, own, len(way), rest, used, [], lines_of(frame, rule.path.port.kind))
            value = trees.rewrite(value, way, partial(_watch_part, found))
    except TreeMismatch as error:
        raise rule.at_edge(error, value, key) from None
    return value


def _each_in_trees(value: Any, chain: Chain) -> list[Chain]:
    """`chain` with each element that trees have in the place of a `*`; the `*` of a tensor is one of its gradient."""
    for taken, step in enumerate(chain):
        if step is STAR and not isinstance(trees.get(value, chain[:taken]), Tensor):
            each = [one[taken] for one in trees.each_index(value, chain[: taken + 1])]
            rest = chain[taken + 1 :]
            return [more for entry in each for more in _each_in_trees(value, (*chain[:taken], entry, *rest))]
    return [chain]


def used_by(frame: Frame, value: Any) -> list[Tensor]:
    """The tensors with another use than one in `value`: what went into the call, and what is there twice."""
    used = [leaf for leaf in trees.leaves((frame.args, frame.kwargs)) if isinstance(leaf, Tensor)]
    if isinstance(value, Tensor):
        return used
    here = [leaf for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]
    return used + [one for at, one in enumerate(here) if place_in(here[:at], one) is not None]


def lines_of(frame: Frame, port: str) -> GradientLines:
    """The lines of the tensors that go into the call, or of those that come out of it: at the port `port`."""
    return frame.kept.setdefault(port, GradientLines())


def _split_at_tensor(value: Any, chain: Chain) -> tuple[Chain, Chain]:
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
        chain: its subscripts, as they are spelled.
        taken: how many steps of the path lead to the tensors.
        rest: the steps that lead on in them.
        used: the tensors that have another use than this one.
        passed: the tensors that this rule has come by already.
        lines: the lines of the gradients of this call.
    """

    rule: SiteRule
    text: str
    chain: Chain
    taken: int
    rest: Chain
    used: list[Tensor]
    passed: list[Tensor]
    lines: GradientLines

    def key(self, more: Chain) -> str:
        """The path of the tensor at the end of `more`."""
        if not more:
            return self.text
        return with_chain(self.text, (*self.chain[: self.taken], *more, *self.chain[self.taken :]))


def _watch_part(found: _Found, part: Any) -> Any:
    if not found.rule.wild and not any(map(trees.has_fractions, trees.leaves(part))):
        raise TreeMismatch(f"{trees.structure_of(part)} has no tensor in it that could have a gradient")
    return _watch_all(found, part, ())


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
    if tensor not in found.lines or place_in(found.passed, tensor) is not None:
        if not may_have_gradient(tensor):
            return tensor
        tensor = made_differentiable(own_use(tensor, found.used + found.passed))
    found.passed.append(tensor)
    if rule.action.outlives and not torch.compiler.is_compiling():
        rule.session.reached[rule.key] = True  # backward may come later than anybody can ask
    session, order = rule.session, next_order()
    if torch.compiler.is_dynamo_compiling() and session.ticket is not None:
        if torch_private_tensors.is_backward_compiled():
            raise UnsupportedModule(COMPILED_BACKWARD.format(key=key))
        token, index, steps = session.ticket, rule.index, len(rest)
        return found.lines.watch(
            [tensor], lambda gradients: list(passed(gradients[0], token, index, key, steps, order)), token=token
        )[0]

    def on_gradient(gradients: Gradients) -> Gradients:
        if session.ended and not rule.action.outlives:
            return gradients
        return [act_on_gradient(rule, gradients[0], key, len(rest), order)]

    return found.lines.watch([tensor], on_gradient)[0]


def own_use(tensor: Tensor, used: list[Tensor]) -> Tensor:
    """`tensor`, or a view if it is in `used`: with other uses come other gradients."""
    return tensor if place_in(used, tensor) is None else tensor.view_as(tensor)


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
    is_of_arguments = True
    rule = InputGradientRule


register_port(GradientPort())
register_port(InputGradientPort())
GRADIENT, INPUT_GRADIENT = Port(GradientPort.kind), Port(InputGradientPort.kind)
