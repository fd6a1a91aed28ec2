"""`grad_at`: the gradients of a metric at sites.

NOTE [One backward for all sites]
Nothing in a model need ask for gradients: parameters may be frozen, inputs may be tokens. So a zero that does ask is
subtracted at each site, or, where the value has a graph already, it is copied. Each site is then a node of its own, and
`torch.autograd.grad` gives the gradients at all of them at once. (It is no view: a later in-place layer would take that
out of the graph.)

Inside of a `torch.func` transform the metric is differentiated with respect to that zero, and a hook takes the gradient
of each site on its way there: `torch.func.grad` knows no places in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from nicehooks import torch_private, torch_private_tensors
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts import second_order
from nicehooks.contexts.intervention import Intervention, Plan
from nicehooks.contexts.uncompiled import uncompiled
from nicehooks.contexts.user_functions import show_where
from nicehooks.core import sessions
from nicehooks.core.children import unwrap
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, OutputRule, SiteRule
from nicehooks.core.selection import Site, Where, select
from nicehooks.core.sessions import Session
from nicehooks.errors import TreeMismatch, UnsupportedModule
from nicehooks.values import trees


def grad_at(
    model: nn.Module, where: Where, *more: Any, metric: Callable[[Any], Tensor] | None = None
) -> Callable[..., tuple[Tensor, ActivationCache]]:
    """A function with the model's signature that returns `(value, gradients)`: those of a metric at the sites.

    One forward and one backward serve any number of sites. Under `vmap` the gradients are those of each example. What
    is compiled of the model runs as it was written meanwhile.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    >>> value, grads = grad_at(model, ["*", "0@weight"], lambda output: output.sum())(torch.ones(5, 4))
    >>> grads["0"].shape, grads["1"].unique().item(), grads["0@weight"].shape
    (torch.Size([5, 3]), 1.0, torch.Size([3, 4]))

    Args:
        model: any module.
        where, more: paths, sites, … (see `select`) of any port but gradients: outputs, inputs, parameters, calls, and
            parts of them; the keys of a mapping, such as a cache. The gradient of a tree is a tree like it, with None
            for what is no floating-point tensor.
        metric: `metric(output)` is a scalar tensor. It comes last, or by its name.

    Raises:
        UnsupportedModule: a site is a gradient itself: write `h.3`, not `h.3@grad`.
        TreeMismatch: the metric returned something else than a scalar tensor.
        SiteNotReached: the metric does not depend on a site (on none of the sites of a wildcard).
    """
    *places, measure = [where, *more] if metric is None else [where, *more, metric]
    if not places or not callable(measure):
        raise TypeError(NO_METRIC.format(kind=type(measure).__name__))
    for site in select(model, *places):
        if site.path.port.is_gradient:
            text = f"{str(site)!r}: grad_at takes the paths of values, 'h.3': it adds the gradient by itself."
            raise UnsupportedModule(text)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ActivationCache]:
        if torch.compiler.is_dynamo_compiling():
            raise UnsupportedModule(NOT_TRACED)
        with uncompiled(model), _GradientsAt(model, places) as gradients:
            value = gradients.differentiate(lambda: _only_number(measure(model(*args, **kwargs))))
        return value, gradients.cache()

    return run


NOT_TRACED = (
    "grad_at cannot be traced by torch.compile: autograd is asked for places in its graph; a compiled graph has none.\n"
    "    grad_at(model, …)(x)                              # outside of compiled code; a compiled model may be given\n"
    '    with capture(model, "h.3@grad"): loss.backward()  # around a compiled forward'
)

NO_METRIC = (
    "grad_at takes places and, behind them, a metric: a function of the output, not {kind}.\n"
    '    grad_at(model, "h.3", "h.4", lambda output: output.sum())'
)


def _only_number(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    raise TreeMismatch(
        f"the metric of grad_at returned {trees.structure_of(value)}, and not a scalar tensor.\n"
        "    metric = lambda output: output.sum()  # one number to differentiate, for example"
    )


class _GradientsAt(Intervention):
    """Collects the gradients at the sites of a backward that runs inside of it."""

    verb = "grad_at"
    keeps_plans = True

    def __init__(self, model: nn.Module, where: Where) -> None:
        super().__init__(model)
        self.where = where
        self._action = _Differentiate()

    def __repr__(self) -> str:
        return f"grad_at(model, {show_where(self.where)}, …)"

    def _actions(self) -> list[tuple[Where, Action]]:
        return [(self.where, self._action)]

    def _rules(self, site: Site, action: Action) -> Pairs:
        pairs = super()._rules(site, action)
        ((module, rule), *others) = pairs
        whole = type(rule) is OutputRule and not rule.chain and not rule.when.counts and not others
        return [(module, _WholeOutputNode(site, action, rule.when))] if whole else pairs

    def _entered(self, session: Session) -> _Differentiate:
        return self._action

    def _all_reached(self, session: Session, plan: Plan) -> bool:
        return not plan.keys.difference(self._action.differentiated)

    def _was_reached(self, session: Session, rule: SiteRule) -> bool:
        return rule.key in self._action.differentiated

    def _not_reached(self, session: Session, rule: SiteRule) -> str:
        if rule.key not in session.reached:
            return super()._not_reached(session, rule)
        return NO_DEPENDENCE.format(key=rule.key, model=type(unwrap(self.model)).__name__, context=self)


NO_DEPENDENCE = (
    "{key!r} has no gradient in {model}: the metric does not depend on it, or something between them has none (as "
    "argmax, .item() and .detach() have none).\n"
    "  while {context!r} ran"
)


class _WholeOutputNode(OutputRule):
    """The whole output of a module: where that is a tensor with a graph, by the shortest way to the same node."""

    __slots__ = ()

    def output(self, value: Any) -> Any:
        action: Any = self.action
        if type(value) is not Tensor or not action.takes_straight(value):
            return super().output(value)
        self.session.reached[self.key] = True
        sessions.note_export(self.session, self.key)
        entry = _Entry(value, 0, self.key)
        action.keep(self.key, value, [entry])
        return action.node(value, entry, 0)


class _Differentiate(Action):
    """Makes what comes by a node of the graph; see NOTE [One backward for all sites].

    Attributes:
        zero: what is subtracted.
        by_edges: whether autograd is asked for the gradients, where a site is in no transform of the model's own.
        found: the value at each site, and an entry for each tensor in it, in the order of the forward.
        differentiated: the sites, as they were selected, that a gradient came by.
        done: whether the forward is over: what comes by later is a checkpointed region that backward runs again.
    """

    __slots__ = ("by_edges", "differentiated", "done", "found", "zero")
    verb = "grad_at"

    def __init__(self) -> None:
        self.zero: Any = None
        self.by_edges = False
        self.found: dict[str, tuple[Any, list[_Entry]]] = {}
        self.differentiated: set[str] = set()
        self.done = False

    def differentiate(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns, a scalar; its gradients at the sites are found on the way."""
        if torch_private.innermost_transform() is None and not torch.is_inference_mode_enabled():
            return self._by_autograd(compute)

        def valued(zero: Tensor) -> tuple[Tensor, Tensor]:
            self.zero = zero
            value = compute()
            return value, value

        return torch.func.grad(valued, has_aux=True)(torch.zeros(()))[1]

    def _by_autograd(self, compute: Callable[[], Tensor]) -> Tensor:
        self.by_edges = True
        again, begun = torch.is_grad_enabled(), torch_private_tensors.next_sequence_number()
        self.zero = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            value = compute()
        self.done = True
        entries = [entry for _, entries in self.found.values() for entry in entries if entry.edge is not None]
        value, found = second_order.gradients(value, [entry.edge for entry in entries], begun, self.zero, again)
        for entry, gradient in zip(entries, found, strict=True):
            if gradient is not None:
                entry.gradient = gradient
                self.differentiated.add(entry.site)
        return value

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        if torch.compiler.is_dynamo_compiling():
            raise UnsupportedModule(NOT_TRACED)
        entries: list[_Entry] = []
        self.keep(key, value, entries)

        def watch(tensor: Tensor) -> Tensor:
            entry = _Entry(tensor, session.level, str(site))
            entries.append(entry)
            return tensor if entry.value is None else self.node(tensor, entry, session.level)

        return trees.map_tensors(watch, value)

    def takes_straight(self, tensor: Tensor) -> bool:
        """Whether all there is to do at `tensor` is to make a node, and no transform of the model's own is around."""
        plain = self.by_edges and tensor.requires_grad and not torch.compiler.is_compiling()
        return plain and torch_private.innermost_transform() is None

    def keep(self, key: str, value: Any, entries: list[_Entry]) -> None:
        """Notes what was at a site in the forward."""
        if not self.done:
            self.found.pop(key, None)  # of several calls the last one counts, and its place in the order
            self.found[key] = (value, entries)

    def node(self, tensor: Tensor, entry: _Entry, level: int) -> Tensor:
        """A tensor like `tensor` that only the site has, and that `entry` gets the gradient of."""
        node = tensor.clone() if self.by_edges and tensor.requires_grad else tensor - self.zero.to(tensor)
        if not self.by_edges or torch_private.innermost_transform() is not None:
            hooked = torch_private_tensors.hook_gradient(node, partial(self._on_gradient, entry, level))
            return node if hooked is None else hooked
        if node.requires_grad:
            entry.edge = get_gradient_edge(node)  # now: a later in-place layer gives the tensor another one
        return node

    def _on_gradient(self, entry: _Entry, level: int, gradient: Tensor) -> Tensor:
        self.differentiated.add(entry.site)
        entry.gradient = torch_private_tensors.lift(gradient, level)
        return gradient

    def cache(self) -> ActivationCache:
        """The gradients, in the order of the forward; the sites that none came by are left out."""
        return ActivationCache(
            (key, _gradients(value, entries))
            for key, (value, entries) in self.found.items()
            if any([entry.gradient is not None for entry in entries])
        )


class _Entry:
    """One tensor of the value at a site, as it is outside of the transforms above `level`, and its gradient.

    Attributes:
        value: None for a tensor that cannot have a gradient.
        site: the site, as it was selected.
        edge: the place of the site's own node in the graph, where autograd can be asked for the gradient.
    """

    __slots__ = ("edge", "gradient", "site", "value")

    def __init__(self, tensor: Tensor, level: int, site: str) -> None:
        self.value = torch_private_tensors.lift(tensor, level) if trees.has_fractions(tensor) else None
        self.site = site
        self.edge: Any = None
        self.gradient: Tensor | None = None

    def or_zeros(self) -> Tensor | None:
        """The gradient; zeros where only other tensors of the same site have one."""
        return torch.zeros_like(self.value) if self.gradient is None and self.value is not None else self.gradient


def _gradients(value: Any, entries: list[_Entry]) -> Any:
    remaining = iter(entries)
    return trees.map_tensors(lambda _: next(remaining).or_zeros(), value)
