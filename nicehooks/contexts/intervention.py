"""What every intervention is: a context that is entered and left, or attached and removed, and never silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.contexts.plans import PLANS, Plan, RuleGroup
from nicehooks.core import sessions
from nicehooks.core.binding import bind, unbind
from nicehooks.core.children import unwrap
from nicehooks.core.exclusive import free_left_over
from nicehooks.core.explaining import explained
from nicehooks.core.register import Pairs, kind_of, rules_around
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Group, Site, Where, select_groups
from nicehooks.core.sessions import Progress, Session
from nicehooks.core.steps import StepRule
from nicehooks.core.traced import bind_traced, groups_of, unbind_traced
from nicehooks.core.traces import is_remembering
from nicehooks.core.when import When
from nicehooks.errors import (
    CheckpointWarning,
    ContextMisuse,
    NotCalledWarning,
    NotReachedWarning,
    SiteNotFound,
    SiteNotReached,
    warn_caller,
)

Actions = list[tuple[Where, Action]]
"""What to do where."""


class Intervention:
    """A context that acts on a model while it is entered; also a handle.

    Making one does nothing. `with` scopes it to the thread or task that entered it; `attach` makes it persistent and
    process-wide, until `remove`.
    """

    verb = ""
    first = False  # whether it acts before what is there already, not after it
    plans_anew = False
    stops = False  # whether it ends a forward early
    _session: Session | None = None
    keeps_plans = False  # whether its plans depend on the model, the paths, and `_depends_on` alone

    def __init__(self, model: nn.Module, steps: Any = None, calls: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.verb}(model, …) takes a torch.nn.Module as model, not {type(model).__name__}")
        self.model = model
        self.steps = steps
        self.calls = calls
        self._plan: Plan | None = None
        self._has_given = False  # whether its plan waits for whoever comes first
        self._whens: dict[Any, When] = {}  # by the call of the path: all sites have the same ones

    # what the interventions say

    def _actions(self) -> Actions:
        """What to do where."""
        raise NotImplementedError  # abstract: every intervention has its own

    def _rules(self, site: Site, action: Action) -> Pairs:
        return kind_of(site.path.port).rules(site, action, self._when(site.path.call), unwrap(self.model))

    def _when(self, call: Any) -> When:
        if call not in self._whens:
            self._whens[call] = When(self.steps, self.calls, call)
        return self._whens[call]

    def _step_rule(self) -> StepRule:
        """What happens whenever the model itself is called."""
        return StepRule()

    def _entered(self, session: Session) -> Any:
        """What `with … as` gives."""
        return self

    def _left(self, session: Session) -> None:
        """Lets go of what only an active context needs."""

    def _was_reached(self, session: Session, rule: SiteRule) -> bool:
        return rule.was_reached(session)

    # entering and leaving

    def __enter__(self) -> Any:
        return self._begin(attached=False)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._end(self._check if kind is None else None)

    def attach(self) -> Any:
        """Makes the intervention persistent and process-wide; once attached, does nothing. Returns the handle."""
        if self._session is None or not self._session.attached:
            self._begin(attached=True)
        return self

    def remove(self) -> None:
        """Ends the intervention, attached or entered; once ended, does nothing."""
        self._end(self._warn)

    def restart(self) -> None:
        """Counts steps from 0 again, as if it were entered anew: before the second of two generations, say."""
        if self._session is not None:
            self._session.start_counting()

    def __del__(self) -> None:
        """What was entered and is kept nowhere, or what an interrupt has left entered, nobody can leave any more."""
        if self._session is not None and not self._session.attached:
            self._stop(broken_off=True)
            warn_caller(explained("not_reached.forgotten", self), NotReachedWarning)

    @property
    def active(self) -> bool:
        """Whether it is entered or attached now."""
        return self._session is not None

    def _begin(self, attached: bool) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._entered(self._start_traced())
        free_left_over()
        actions = self._actions() if self.keeps_plans else None
        plan = self._plan_of_last_entry() or self._plan_for(actions)
        session = Session(plan.label, attached)
        if vars(self).setdefault("_entered_by", session) is not session:  # in one step: another thread may be here too
            raise ContextMisuse(explained("misuse.active_already", self.verb))
        try:
            self._session, self._plan, self._has_given = session, plan, False
            self._start(session, plan, actions)
            return self._entered(session)
        except BaseException:
            free_left_over()
            self._stop(broken_off=True)
            self._plan = None
            raise

    def _start(self, session: Session, plan: Plan, actions: Actions | None) -> None:
        sessions.number(session)
        session.counting = plan.counting
        if not session.attached:  # of a handle, it would be a cycle
            session.tapped = plan.tapped
        session.no_step = None if self.steps is None else self._when(None).no_step
        for companion in plan.companions:
            for rule in companion.rules:
                rule.session = session
            companion.begin(session)
        sessions.begin(session)
        bind(plan.taps, session, actions and [action for _, action in actions], self.first)

    def _start_traced(self) -> Session:
        self._plan = self._make_plan()
        self._session = Session(self._plan.label)
        self._session.attached = True  # acts wherever its rules are: nobody else has them
        self._session.counting = self._plan.counting
        self._session.no_step = None if self.steps is None else self._when(None).no_step
        self._session.mine = Progress(0, self._session.no_step)
        for _, rule in self._plan.pairs:
            rule.session = self._session
        bind_traced(self._plan.pairs, self.first)
        return self._session

    def _end(self, check: Callable[[Session, Plan], None] | None) -> None:
        session, plan = self._session, self._plan
        if not torch.compiler.is_dynamo_compiling():
            free_left_over()
        self._stop()
        if session is None or plan is None:
            return
        try:
            if check is not None:
                check(session, plan)
                if session.displaced is not None or not plan.holds():
                    self._plan = None
                    explained("displaced.tell", self, session, plan)
        finally:
            self._left(session)
            self._leave_plan(plan)

    def _stop(self, broken_off: bool = False) -> None:
        """Undoes whatever `_start` did, also when it is interrupted itself; what is undone already stays so."""
        if torch.compiler.is_dynamo_compiling():
            if self._session is not None and self._plan is not None:
                unbind_traced(self._plan.pairs)
            self._session = None
            return
        session, plan = self._session, self._plan
        if session is None or plan is None:
            vars(self).pop("_entered_by", None)
            return
        try:
            unbind(plan.taps, broken_off)
        except BaseException:  # interrupted half-way: what is unbound stays so
            free_left_over()
            unbind(plan.taps, broken_off=True)
            self._plan = None
            raise
        finally:
            sessions.end(session)
            for companion in plan.companions:
                companion.end(session)
            self._session = None
            vars(self).pop("_entered_by", None)

    # plans

    def _depends_on(self) -> Any:
        """What a plan depends on besides the model and the paths."""
        return type(self), self.verb, self.first

    def _key_of_plan(self, actions: Actions) -> Any:
        """Under which its plan is kept; None where it cannot be used again."""
        if not self.keeps_plans or self.steps is not None or self.calls is not None or not is_remembering():
            return None
        wheres = tuple([_as_key(where, self.model) for where, _ in actions])
        return None if None in wheres else (self._depends_on(), wheres)

    def _leave_plan(self, plan: Plan) -> None:
        """Lets the next context of this kind have the plan; see NOTE [Plans are used again]."""
        if plan.key is not None and self._plan is plan:
            self._has_given = True
            PLANS.give(self.model, plan)

    def _plan_of_last_entry(self) -> Plan | None:
        """The plan that it had, unless it has to be made anew or somebody else has taken it."""
        if self._plan is None or self.plans_anew or not self._plan.holds():
            return None
        return self._plan if not self._has_given or PLANS.take_back(self.model, self._plan) else None

    def _plan_for(self, actions: Actions | None) -> Plan:
        """The plan that another context of its kind has left, or a new one."""
        key = None if actions is None else self._key_of_plan(actions)
        return (key and PLANS.take(self.model, key)) or self._make_plan(actions)

    def _make_plan(self, actions: Actions | None = None) -> Plan:
        actions = self._actions() if actions is None else actions
        selected = [self._selected(where) for where, _ in actions]
        groups: list[RuleGroup] = []
        pairs: Pairs = [(unwrap(self.model), self._step_rule())]
        sites: list[Site] = []
        for of, ((_, action), chosen) in enumerate(zip(actions, selected, strict=True)):
            made: dict[Any, Pairs] = {}  # a site that two items select is one site
            for group in chosen:
                for site in group.sites:
                    new = site.key not in made
                    if new:
                        made[site.key] = self._rules(site, action)
                    first: Any = made[site.key][0][1]
                    first.wild = group.wild and (new or first.wild)
                groups.append(RuleGroup(group.where, [made[site.key][0][1] for site in group.sites], group.wild))
                sites += group.sites
            if not made and not any([group.where is False for group in chosen]):
                raise SiteNotFound(explained("misuse.empty", self.verb))
            new_pairs = [pair for of_site in made.values() for pair in of_site]
            for _, rule in new_pairs:
                if isinstance(rule, SiteRule):
                    rule.of = of
            pairs += new_pairs
        if not groups:
            raise SiteNotFound(explained("misuse.empty", self.verb))
        rules = [rule for _, rule in pairs if isinstance(rule, SiteRule)]
        counts = any([rule.when.counts for rule in rules])
        pairs[1:1] = rules_around(sites, unwrap(self.model), counts)
        for index, rule in enumerate(rules):
            rule.index = index
        keys, key = frozenset([rule.key for rule in rules]), self._key_of_plan(actions)
        return Plan.of(repr(self), pairs, selected, groups, counts or self.stops, keys, key)

    def _selected(self, where: Where) -> list[Group]:
        select = groups_of if torch.compiler.is_dynamo_compiling() else select_groups
        return select(self.model, where, self.verb)

    # never silent

    def _all_reached(self, session: Session, plan: Plan) -> bool:
        return not session.elsewhere and not plan.keys.difference(session.reached)

    def _check(self, session: Session, plan: Plan) -> None:
        missed = None if self._all_reached(session, plan) else next(self._unreached(session, plan), None)
        acted = session.called or any(self._was_reached(session, rule) for of in plan.groups for rule in of.rules)
        if missed is not None and not acted:
            warn_caller(explained("not_reached.not_called", self, session), NotCalledWarning)
        elif missed is not None:
            raise SiteNotReached(self._not_reached(session, missed))
        # inside of the region itself, backward enters the context again
        if session.checkpointed and not session.recomputed and session.checkpointed > torch_private.checkpoint_depth():
            warn_caller(explained("misuse.checkpointed", self), CheckpointWarning)

    def _warn(self, session: Session, plan: Plan) -> None:
        for missed in self._unreached(session, plan) if session.called else ():
            warn_caller(self._not_reached(session, missed), NotReachedWarning)

    def _unreached(self, session: Session, plan: Plan) -> Iterator[SiteRule]:
        """One rule of each group that was not reached as it should have been."""
        for group in plan.groups:
            missed = [rule for rule in group.rules if not self._was_reached(session, rule) and not rule.when.optional]
            if missed and (not group.wild or len(missed) == len(group.rules)):
                yield missed[0]

    def _not_reached(self, session: Session, rule: SiteRule) -> str:
        return explained("not_reached.not_reached", self, session, rule)


def _as_key(where: Where, model: nn.Module) -> Any:
    """What tells one `where` from another, if it is paths, sites of the `model`, and lists of them."""
    if isinstance(where, tuple | list):
        keys = tuple([_as_key(item, model) for item in where])
        return None if None in keys else keys
    return where if isinstance(where, str) or (isinstance(where, Site) and where.belongs_to(model)) else None
