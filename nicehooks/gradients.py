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
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks import internals, trees
from nicehooks.arguments import InputRule
from nicehooks.errors import TreeMismatch
from nicehooks.paths import ModulePath
from nicehooks.rebinding import Frame
from nicehooks.rules import SiteRule
from nicehooks.stations import Gradients, Stations
from nicehooks.trees import Chain

NO_GRADIENT = (
    "no gradient came by. Run backward inside the context, of something that depends on this value, with gradients "
    "enabled in the forward. (An in-place layer overwrites its input: take the gradient of the module before it.)"
)


class GradientRule(SiteRule):
    """The gradient of what is differentiated with respect to the output of a module."""

    __slots__ = ()
    reason = NO_GRADIENT

    def before(self, frame: Frame) -> None:
        self.number(frame)

    def after(self, frame: Frame) -> None:
        frame.value = watched(self, frame, frame.value, self.chain)


class InputGradientRule(InputRule):
    """The gradient of what is differentiated with respect to an argument of a module."""

    __slots__ = ()
    reason = NO_GRADIENT

    def through(self, frame: Frame | None, value: Any, chain: Chain | None = None) -> Any:
        return value if frame is None else watched(self, frame, value, self.chain if chain is None else chain)


_order = itertools.count()
"""Numbers the values whose gradients are watched: backward comes to the last call of a module first."""


def watched(rule: SiteRule, frame: Frame, value: Any, chain: Chain) -> Any:
    """`value` with the rule on the gradient of each of its tensors that the path leads to, or leads into."""
    key = rule.key_of(frame)
    if key is None:
        return value
    return watched_at(rule, frame, key, value, chain, used_by(frame, value))


def watched_at(rule: SiteRule, frame: Frame, key: str, value: Any, chain: Chain, used: set[int]) -> Any:
    """As `watched`, at the path `key`; `used` are the tensors, by `id`, that have another use than this one."""
    try:
        way, rest = _split(value, chain)
        stations = stations_of(frame, rule.path.port.kind)
        found = _Found(rule, ModulePath.parse(key), len(way), rest, used, set(), stations)
        return trees.rewrite(value, way, lambda part: _watch_part(found, part))
    except TreeMismatch as error:
        raise rule.at_edge(error, value, key) from None


def used_by(frame: Frame, value: Any) -> set[int]:
    """The tensors, by `id`, with another use than one in `value`: what went into the call, and what is there twice."""
    used = {id(leaf) for leaf in trees.leaves((frame.args, frame.kwargs)) if isinstance(leaf, Tensor)}
    if not isinstance(value, Tensor):
        here = [id(leaf) for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]
        used |= {one for one in here if here.count(one) > 1}
    return used


def stations_of(frame: Frame, port: str) -> Stations:
    """The stations of the tensors that go into the call, or of those that come out of it: at the port `port`."""
    return frame.kept.setdefault(port, Stations())


def _split(value: Any, chain: Chain) -> tuple[Chain, Chain]:
    """The steps of `chain` that lead to a tensor, or to the end, and those that lead on in it."""
    for taken in range(len(chain)):
        if isinstance(trees.get(value, chain[:taken]), Tensor):
            return chain[:taken], chain[taken:]
    return chain, ()


class _Found(NamedTuple):
    """Where the tensors are whose gradients are wanted.

    Attributes:
        rule: the rule whose action the gradients go through.
        path: the path of the site.
        taken: how many steps of the path lead to the tensors.
        rest: the steps that lead on in them.
        used: the tensors, by `id`, that have another use than this one.
        passed: the tensors, by `id`, that this rule has come by already.
        stations: where gradients of this call are acted on already.
    """

    rule: SiteRule
    path: ModulePath
    taken: int
    rest: Chain
    used: set[int]
    passed: set[int]
    stations: Stations

    def key(self, more: Chain) -> str:
        """The path of the tensor at the end of `more`."""
        chain = self.path.chain
        return str(replace(self.path, chain=(*chain[: self.taken], *more, *chain[self.taken :])))


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
    same = all([new is old for new, old in zip(children, node.children, strict=True)])
    return part if same else node.rebuild(children)


def _watch(found: _Found, tensor: Tensor, key: str) -> Tensor:
    rule, rest = found.rule, found.rest
    if tensor not in found.stations or id(tensor) in found.passed:
        if not may_have_gradient(tensor):
            return tensor
        tensor = own_use(tensor, found.used | found.passed)
        if internals.innermost_transform() is None:
            tensor = made_differentiable(tensor)
    found.passed.add(id(tensor))
    session, order = rule.session, next(_order)

    def on_gradient(gradients: Gradients) -> Gradients:
        if session.ended:
            return gradients
        session.order = order
        return [rule.act(gradients[0], rest, key)]

    return found.stations.watch([tensor], on_gradient)[0]


def may_have_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that can have a gradient, here and now."""
    return torch.is_grad_enabled() and _is_differentiable(value)


def own_use(tensor: Tensor, used: set[int]) -> Tensor:
    """`tensor`, or a view if it is in `used`: with other uses come other gradients."""
    return tensor.view_as(tensor) if id(tensor) in used else tensor


def made_differentiable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that requires a gradient: a clone, because an in-place layer may not write to a leaf."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_().clone()
