"""What every intervention is: a context that is entered and left, or attached and removed, and never silent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.core import sessions
from nicehooks.core.register import Pairs, rules_for, slow_path_rules
from nicehooks.core.rules import Action, SiteRule, StepRule
from nicehooks.core.selection import Group, Site, Where, select_groups, unwrap
from nicehooks.core.sessions import Session
from nicehooks.core.tap import bind, unbind
from nicehooks.core.traced import bind_traced, groups_of, unbind_traced
from nicehooks.core.when import When
from nicehooks.errors import (
    CheckpointWarning,
    ContextMisuse,
    NotCalledWarning,
    NotReachedWarning,
    SiteNotFound,
    SiteNotReached,
)
from nicehooks.ports.compiled_gradients import give_ticket, take_ticket
from nicehooks.ports.gradients import act_on_gradient
from nicehooks.ports.overrides import stand_in, step_back
from nicehooks.ports.weights import AttributeRule, ParameterRule


class _Group(NamedTuple):
    """The rules for one item of a `where`, and whether it was a wildcard."""

    where: Where
    rules: list[SiteRule]
    wild: bool


class Plan(NamedTuple):
    """What entering does: made at the first entry, used again by the next ones.

    Attributes:
        label: how the intervention is shown.
        pairs: the rules, each with the module whose tap it belongs to.
        groups: the rules of the sites that each item of a `where` has selected.
        holders: the modules with a parameter that may have another value.
        counting: whether steps, calls, or the depth in the root model matter.
        keys: the keys of the sites.
        in_backward: the rules of the sites, by their `index`; empty if none of them is about a gradient.
    """

    label: str
    pairs: Pairs
    groups: list[_Group]
    holders: list[nn.Module]
    counting: bool
    keys: frozenset[str]
    in_backward: list[SiteRule]


class Intervention:
    """A context that acts on a model while it is entered; also a handle.

    Making one does nothing. `with` scopes it to the thread or task that entered it; `attach` makes it persistent and
    process-wide, until `remove`.
    """

    verb = ""
    first = False  # whether it acts before what is there already, not after it
    plans_anew = False

    def __init__(self, model: nn.Module, steps: Any = None, calls: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.verb}(model, …) takes a torch.nn.Module as model, not {type(model).__name__}")
        self.model = model
        self.steps = steps
        self.calls = calls
        self._plan: Plan | None = None
        self._session: Session | None = None

    # what the interventions say

    def _actions(self) -> list[tuple[Where, Action]]:
        """What to do where."""
        raise NotImplementedError  # abstract: every intervention has its own

    def _rules(self, site: Site, action: Action) -> Pairs:
        return rules_for(site, action, When(self.steps, self.calls, site.path.call), unwrap(self.model))

    def _step_rule(self) -> StepRule:
        """What happens whenever the model itself is called."""
        return StepRule()

    def _entered(self, session: Session) -> Any:
        """What `with … as` gives."""
        return self

    def _left(self, session: Session) -> None:
        """Lets go of what only an active context needs."""

    def _was_reached(self, session: Session, rule: SiteRule) -> bool:
        return rule.key in session.reached

    # entering and leaving

    def __enter__(self) -> Any:
        return self._entered(self._start(attached=False))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        session, plan = self._session, self._plan
        self._stop()
        if session is None or plan is None:
            return
        try:
            if kind is None:
                self._check(session, plan)
        finally:
            self._left(session)

    def attach(self) -> Any:
        """Makes the intervention persistent and process-wide; once attached, does nothing. Returns the handle."""
        if self._session is None or not self._session.attached:
            self._entered(self._start(attached=True))
        return self

    def remove(self) -> None:
        """Ends the intervention, attached or entered; once ended, does nothing."""
        session, plan = self._session, self._plan
        self._stop()
        if session is None or plan is None:
            return
        try:
            for missed in self._unreached(session, plan) if session.called else ():
                warnings.warn(self._not_reached(session, missed), NotReachedWarning, stacklevel=2)
        finally:
            self._left(session)

    @property
    def active(self) -> bool:
        """Whether it is entered or attached now."""
        return self._session is not None

    def _start(self, attached: bool) -> Session:
        if torch.compiler.is_dynamo_compiling():
            return self._start_traced()
        with sessions.LOCK:
            if self._session is not None:
                raise ContextMisuse(ACTIVE_ALREADY.format(verb=self.verb))
            if self._plan is None or self.plans_anew:
                self._plan = self._make_plan()
            plan = self._plan
            session = self._session = Session(plan.label, attached)
        done = 0
        try:
            session.counting = plan.counting
            for _, rule in plan.pairs:
                rule.session = session
            for module in plan.holders:
                done += 1
                stand_in(module)
            if plan.in_backward and torch_private.innermost_transform() is None:
                give_ticket(session, [partial(act_on_gradient, rule) for rule in plan.in_backward])
            sessions.begin(session)
            bind(plan.pairs, self.first)
        except BaseException:
            self._stop(done)
            raise
        return session

    def _start_traced(self) -> Session:
        self._plan = self._make_plan()
        self._session = Session(self._plan.label)
        self._session.attached = True  # acts wherever its rules are: nobody else has them
        self._session.counting = self._plan.counting
        for _, rule in self._plan.pairs:
            rule.session = self._session
        bind_traced(self._plan.pairs, self.first)
        return self._session

    def _stop(self, holders: int | None = None) -> None:
        """Undoes whatever `_start` did, also when it is interrupted itself; what is undone already stays so."""
        session, plan = self._session, self._plan
        if session is None or plan is None:
            return
        if torch.compiler.is_dynamo_compiling():
            unbind_traced(plan.pairs)
            self._session = None
            return
        try:
            unbind(plan.pairs)
        except BaseException:  # interrupted half-way: what is unbound stays so
            unbind(plan.pairs)
            raise
        finally:
            sessions.end(session)
            take_ticket(session)
            self._session = None
            for module in plan.holders[:holders]:
                step_back(module)

    def _make_plan(self) -> Plan:
        groups: list[_Group] = []
        pairs: Pairs = [(unwrap(self.model), self._step_rule())]
        sites: list[Site] = []
        for where, action in self._actions():
            made: dict[Any, Pairs] = {}  # a site that two items select is one site
            selected = self._selected(where)
            for group in selected:
                keys = [site.key for site in group.sites]
                for key, site in zip(keys, group.sites, strict=True):
                    new = key not in made
                    if new:
                        made[key] = self._rules(site, action)
                    first: Any = made[key][0][1]
                    first.wild = group.wild and (new or first.wild)
                groups.append(_Group(group.where, [made[key][0][1] for key in keys], group.wild))  # pyright: ignore
                sites += group.sites
            if not made and not any(group.where is False for group in selected):
                raise SiteNotFound(EMPTY.format(verb=self.verb))
            pairs += [pair for of_site in made.values() for pair in of_site]
        if not groups:
            raise SiteNotFound(EMPTY.format(verb=self.verb))
        pairs += slow_path_rules(sites)
        holders = {id(m): m for _, rule in pairs if isinstance(rule, ParameterRule) for m in rule.modules()}
        rules = [rule for _, rule in pairs if isinstance(rule, SiteRule)]
        for index, rule in enumerate(rules):
            rule.index = index
        gradients = rules if any([rule.path.port.kind.endswith("grad") for rule in rules]) else []
        keys = frozenset([rule.key for rule in rules])
        return Plan(repr(self), pairs, groups, list(holders.values()), self._counts(rules), keys, gradients)

    def _selected(self, where: Where) -> list[Group]:
        select = groups_of if torch.compiler.is_dynamo_compiling() else select_groups
        return select(self.model, where, self.verb)

    def _counts(self, rules: list[SiteRule]) -> bool:
        """Whether steps, calls, or the depth in the root model matter."""
        return any([rule.when.counts for rule in rules])

    # never silent

    def _all_reached(self, session: Session, plan: Plan) -> bool:
        return not plan.keys.difference(session.reached)

    def _check(self, session: Session, plan: Plan) -> None:
        missed = None if self._all_reached(session, plan) else next(self._unreached(session, plan), None)
        if missed is not None and not session.called and not self._acted(session, plan):
            warnings.warn(self._not_called(session), NotCalledWarning, stacklevel=3)
        elif missed is not None:
            self._plan = None  # the model may have changed since it was made
            raise SiteNotReached(self._not_reached(session, missed))
        outlived = session.checkpointed and not session.recomputed
        if (
            outlived and session.checkpointed > torch_private.checkpoint_depth()
        ):  # else the region enters the context again
            warnings.warn(CHECKPOINTED.format(context=self), CheckpointWarning, stacklevel=3)

    def _acted(self, session: Session, plan: Plan) -> bool:
        return any(self._was_reached(session, rule) for group in plan.groups for rule in group.rules)

    def _unreached(self, session: Session, plan: Plan) -> Iterator[SiteRule]:
        """One rule of each group that was not reached as it should have been."""
        for group in plan.groups:
            missed = [rule for rule in group.rules if not self._was_reached(session, rule) and not rule.when.optional]
            if missed and (not group.wild or len(missed) == len(group.rules)):
                yield missed[0]

    def _not_called(self, session: Session) -> str:
        text = f"{self!r} was left, but the model was not called in it."
        if session.elsewhere:
            text += (
                " It was called in another thread or task meanwhile, where this context does not act: enter it there,"
                " carry it along with contextvars.copy_context(), or use .attach()."
            )
        if session.suspended:
            text += " It was called inside suspend(model) only."
        return text

    def _not_reached(self, session: Session, rule: SiteRule) -> str:
        text = f"{rule.key!r} was never reached in {type(unwrap(self.model)).__name__}: {_reason(rule, session)}"
        return f"{text}\n  while {self!r} was active"


CHECKPOINTED = (
    "{context} acted inside an activation-checkpointed region. Backward runs the forward of such a region again, and "
    "the intervention has to act there too: run backward inside the context."
)

EMPTY = "{verb}(model, …) was given an empty list of sites, perhaps by a filter. To select none, write False."

ACTIVE_ALREADY = (
    "this {verb}(…) is active already: one object is one intervention.\n"
    "  To have it twice, make a second one: with {verb}(…), {verb}(…):\n"
    "  To use it again, leave it first."
)


def _reason(rule: SiteRule, session: Session) -> str:
    site = rule.site
    parent = _parent(site)
    if isinstance(parent, nn.MultiheadAttention):
        name = site.name.rpartition(".")[0]
        return (
            "nn.MultiheadAttention hands the weights of its out_proj to a fused function and never calls it. "
            f"What comes out of it is the output of the attention: {name + '[0]'!r}."
        )
    if isinstance(rule, AttributeRule):
        return f"the module that owns it was not called, and {site.path.port.name!r} is there only while it runs."
    if rule.reason:
        return rule.why_not_reached()
    if rule.chain and session.called:
        return (
            "either nothing called this module, or the part of its value that the path selects was empty every time "
            "(as [:, 50:60] is of 8 positions)."
        )
    if rule.when.counts and session.called:
        return f"the model ran, but not once with {rule.when.shown}."
    if session.suspended:
        return "it was called inside suspend(model) only."
    return (
        "nothing called this module. Its parent may use the weights without calling it, may call it only in another "
        "mode or for other inputs, or may hold another module under this name by now."
    )


def _parent(site: Site) -> nn.Module | None:
    model: Any = site._model()  # pyright: ignore[reportPrivateUsage]
    name = site.name.rpartition(".")[0]
    try:
        return model.get_submodule(name) if site.name else None
    except AttributeError:
        return None
