"""The context that binds a tree of hooks to a model: an edit at each of its places that has hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.anatomy import anatomy
from nicehooks.anatomies.norms import NormRule, has_kept, unless_kept
from nicehooks.compat.transformer_debugger.gradient_hooks import GradientScope
from nicehooks.compat.transformer_debugger.hook_collections import FwdBwdHooks, HookCollection
from nicehooks.compat.transformer_debugger.hook_lists import AtLayers, HookNode, Hooks, hooks_below
from nicehooks.compat.transformer_debugger.places import PLACES, Spot, softmax_denominator, spots
from nicehooks.contexts.intervention import Actions, Intervention, Plan
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site, Where
from nicehooks.core.sessions import Session
from nicehooks.core.when import When
from nicehooks.errors import HooksMisuse
from nicehooks.ports.gradients import NO_GRADIENT
from nicehooks.values import trees


class HooksOn(Intervention):
    """The hooks of a tree, acting on a model; what `hooks.on(model)` makes."""

    verb = "hooks.on"
    plans_anew = True  # hooks may have been appended since

    def __init__(self, tree: HookCollection, model: nn.Module, at: str | None = None) -> None:
        super().__init__(model)
        self.tree = tree
        self.at = at
        self._scope = GradientScope()
        self._bound: set[str] = set()

    def __repr__(self) -> str:
        return "hooks.on(model)"

    def _entered(self, session: Session) -> HookCollection:
        return self.tree

    # what is done where

    def _make_plan(self, actions: Actions | None = None) -> Plan:
        self._scope = GradientScope()
        self._bound = set(places_in_use(self.tree))
        return super()._make_plan(actions) if self._bound else Plan.of(repr(self), [])

    def _actions(self) -> list[tuple[Where, Action]]:
        found, parts = places_in_use(self.tree), anatomy(self.model, self.at)
        for place, node in found.items():
            for hooks in hooks_below(node):
                if isinstance(hooks, AtLayers):
                    hooks.check_layers(place, parts.n_layers)
        return [
            (spot.where, AS_THERE.get(place, _AtPlace)(place, node, spot, self._scope))
            for place, node in found.items()
            for spot in spots(parts, place)
        ]

    def _rules(self, site: Site, action: Action) -> Pairs:
        pairs = super()._rules(site, action)
        if isinstance(action, _AtPlace) and action.spot.formula is not None:
            when, step = When(self.steps, self.calls, site.path.call), action.place.rpartition(".")[2]
            pairs[0] = site.module, NormRule(site, action, when, step, action.spot.formula)
        return pairs

    def _left(self, session: Session) -> None:
        self._scope.over = True

    # never silent

    def _check(self, session: Session, plan: Plan) -> None:
        late = [place for place in places_in_use(self.tree) if place not in self._bound]
        if late:
            raise HooksMisuse(TOO_LATE.format(place=late[0]))
        super()._check(session, plan)

    def _all_reached(self, session: Session, plan: Plan) -> bool:
        return self._scope.asked <= self._scope.came and super()._all_reached(session, plan)

    def _unreached(self, session: Session, plan: Plan) -> Iterator[SiteRule]:
        """One rule of each place that was reached in no layer, or where no gradient came in any."""
        of_place: dict[str, list[SiteRule]] = {}
        for rule in [rule for group in plan.groups for rule in group.rules]:
            of_place.setdefault(_place_of(rule), []).append(rule)
        for place, rules in of_place.items():
            if not any([self._was_reached(session, rule) for rule in rules]) or self._lacks_gradient(place):
                yield rules[0]

    def _lacks_gradient(self, place: str) -> bool:
        return place in self._scope.asked and place not in self._scope.came

    def _not_reached(self, session: Session, rule: SiteRule) -> str:
        place = _place_of(rule)
        if self._lacks_gradient(place):
            return f"the gradient hooks at {place!r} were never called: {NO_GRADIENT}\n  while {self!r} was active"
        return f"hooks at {place!r}: {super()._not_reached(session, rule)}"


TOO_LATE = (
    "hooks were appended at {place!r} inside hooks.on(model), where there had been none before: they did nothing.\n"
    "  Append them first, and enter the context then."
)


class _AtPlace(Action):
    """Sends the value at one place of one layer through the hooks there."""

    __slots__ = ("node", "place", "scope", "spot")
    verb = "hooks.on"

    def __init__(self, place: str, node: HookNode, spot: Spot, scope: GradientScope) -> None:
        self.place = place
        self.node: Any = node
        self.spot = spot
        self.scope = scope

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        return self._hooked(value)

    def _hooked(self, value: Any) -> Any:
        keywords = {} if self.spot.layer is None else {"layer": self.spot.layer}
        if torch.compiler.is_compiling():  # which cannot trace a ContextVar
            new = self.node(value, **keywords)
        else:
            with self.scope.at(self.place):
                new = self.node(value, **keywords)
        return value if new is None else trees.assign(value, new)


class _AtProjection(_AtPlace):
    """Sends queries or keys through the hooks with half of the scale of their products: the logits are `q · k`."""

    __slots__ = ()

    def act(self, session: Session, value: Tensor, key: str, site: Site) -> Any:
        scale = value.shape[-1] ** -0.25
        scaled = value * scale
        new = self._hooked(scaled.clone())
        return unless_kept([has_kept(scaled, new)], value, new / scale)


class _AtHeads(_AtPlace):
    """Sends what is `[…, head, query, key]` through the hooks as `[…, query, key, head]`."""

    __slots__ = ()

    def act(self, session: Session, value: Tensor, key: str, site: Site) -> Any:
        heads_last = value.movedim(-3, -1)
        new = self._hooked(heads_last)
        return value if new is heads_last else new.movedim(-1, -3)


class _AtDenominator(_AtPlace):
    """Sends the denominator of the softmax through the hooks, and makes the pattern anew with what comes out."""

    __slots__ = ()

    def act(self, session: Session, value: Tensor, key: str, site: Site) -> Any:
        denominator = softmax_denominator(value)
        new = self._hooked(denominator.clone().movedim(-3, -1)).movedim(-1, -3)
        return unless_kept([has_kept(denominator, new)], value, value * denominator / new)


AS_THERE: dict[str, type[_AtPlace]] = {
    "attn.q": _AtProjection,
    "attn.k": _AtProjection,
    "attn.qk_logits": _AtHeads,
    "attn.qk_softmax_denominator": _AtDenominator,
    "attn.qk_probs": _AtHeads,
}
"""The places whose values have another form in transformer-debugger than in the model."""


def _place_of(rule: SiteRule) -> str:
    action: Any = rule.action
    return action.place


def places_in_use(tree: HookCollection) -> dict[str, HookNode]:
    """The places of `tree` that have something to do, in the order in which they act.

    Raises:
        HooksMisuse: hooks are somewhere else, or in a way that they cannot be called in.
    """
    found = {path: node for path, node in _ends(tree, "") if not _is_idle(node)}
    for path, node in found.items():
        if path not in PLACES:
            raise HooksMisuse(f"{path!r} has hooks, but is no place in a transformer; the places: {', '.join(PLACES)}.")
        if not callable(node):
            raise HooksMisuse(
                f"{path!r} is a {type(node).__name__}, which no value can go through: it is not callable."
            )
        for hooks in node.every_list():
            hooks.check_unbound(["layer"])
    return {place: found[place] for place in PLACES if place in found}


def _ends(node: HookCollection, prefix: str) -> Iterator[tuple[str, HookNode]]:
    """The places in a tree, and what hangs elsewhere in it."""
    for name, child in node.all_hooks.items():
        path = f"{prefix}{name}"
        if path not in PLACES and isinstance(child, HookCollection) and not isinstance(child, FwdBwdHooks):
            yield from _ends(child, f"{path}.")
        else:
            yield path, child


def _is_idle(node: HookNode) -> bool:
    """Whether nothing would happen there: a collection that is more than its hooks (an autoencoder) acts anyway."""
    plain = isinstance(node, Hooks | FwdBwdHooks) or not callable(node)
    return plain and node.is_empty()
