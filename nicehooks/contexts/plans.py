"""What entering a context does, found out once: the rules and their taps; and where plans wait for their next use."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from nicehooks.core.binding import Bound, taps_for
from nicehooks.core.register import Companion, Pairs
from nicehooks.core.rules import SiteRule
from nicehooks.core.selection import Group, Where
from nicehooks.core.traces import Trace


class RuleGroup(NamedTuple):
    """The rules for one item of a `where`, and whether it was a wildcard."""

    where: Where
    rules: list[SiteRule]
    wild: bool


class Plan(NamedTuple):
    """What entering does: made at the first entry, used again by the next ones.

    Attributes:
        label: how the intervention is shown.
        pairs: the rules, each with the module whose tap it belongs to; only in code that is being traced.
        taps: the same with the taps, which know their modules weakly; only in eager code.
        tapped: the rules by the `id` of the module; only in eager code.
        size: how many actions it is for.
        traces: what the selections have looked at.
        groups: the rules of the sites of each item of a `where`.
        companions: what these need for as long as a session lasts.
        counting: whether steps, calls, or the depth in the root model matter.
        keys: the keys of the sites.
        key: what tells it from the other plans for the same model, if it can be used again; see NOTE [Plans are used
            again].
    """

    label: str
    pairs: Pairs
    taps: list[Bound]
    tapped: dict[int, tuple[Any, ...]]
    size: int
    traces: list[Trace]
    groups: list[RuleGroup]
    companions: list[Companion]
    counting: bool
    keys: frozenset[str]
    key: Any

    @staticmethod
    def of(
        label: str,
        pairs: Pairs,
        selected: list[list[Group]] | None = None,
        groups: list[RuleGroup] | None = None,
        counting: bool = False,
        keys: frozenset[str] = frozenset(),
        key: Any = None,
    ) -> Plan:
        """The plan with these rules; it keeps its `key` if all of them are good for another context."""
        rules = [rule for _, rule in pairs if isinstance(rule, SiteRule)]
        kinds = dict.fromkeys([rule.companion for rule in rules if rule.companion is not None])
        traced = torch.compiler.is_dynamo_compiling()
        companions = [kind([rule for rule in rules if rule.companion is kind]) for kind in kinds if not traced]
        taps = [] if traced else taps_for(pairs)
        tapped: dict[int, tuple[Any, ...]] = {}
        for module, rule in () if traced else pairs:
            tapped[id(module)] = (*tapped.get(id(module), ()), rule)
        key = key if all([rule.reusable for rule in rules]) else None
        traces = list(dict.fromkeys([group.trace for chosen in selected or [] for group in chosen]))
        kept, size = pairs if traced else [], len(selected or [])
        return Plan(label, kept, taps, tapped, size, traces, groups or [], companions, counting, keys, key)

    def holds(self) -> bool:
        """Whether the same would be made again."""
        same = all([trace.holds() for trace in self.traces]) and all([tap.alive for tap, _, _ in self.taps])
        return same and not any([companion.moved() for companion in self.companions])


class Plans:
    """Plans that nobody uses now.

    NOTE [Plans are used again]
    What a plan consists of depends on the model and on the paths alone, and not on the values that a context brings: a
    rule is given the action of whoever enters (`SiteRule.take_actions`). So a context that is left leaves its plan
    here, and the next one of its kind on the same paths takes it, as long as what its selections have looked at is
    still there. A plan holds no module and no value.
    """

    MOST = 4
    """How many plans for the same paths are kept: as many contexts may be entered at the same time."""

    def __init__(self) -> None:
        self.of_model: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[Plan]]] = weakref.WeakKeyDictionary()

    def take(self, model: nn.Module, key: Any) -> Plan | None:
        """A plan whose sites would be selected again, if there is one."""
        kept = self.of_model.get(model, {}).get(key)
        while kept:
            if (plan := kept.pop()).holds():
                return plan
        return None

    def take_back(self, model: nn.Module, plan: Plan) -> bool:
        """Whether `plan` is still there for the one who gave it."""
        kept = self.of_model.get(model, {}).get(plan.key, [])
        count = len(kept)
        kept[:] = [other for other in kept if other is not plan]
        return len(kept) < count

    def give(self, model: nn.Module, plan: Plan) -> None:
        """Keeps `plan`, without the values that its actions hold."""
        nothing: list[Any] = [None] * plan.size
        for _, rule, _ in plan.taps:
            rule.take_actions(nothing)
        kept = self.of_model.setdefault(model, {}).setdefault(plan.key, [])
        if len(kept) < self.MOST:
            kept.append(plan)


PLANS = Plans()
