"""The base run of an experiment, recorded: which module was called when, from where, and what it returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from nicehooks.contexts.intervention import Actions, Intervention, Plan
from nicehooks.core.frames import Frame
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Group, Site, select_groups
from nicehooks.core.sessions import Session
from nicehooks.core.when import ALWAYS
from nicehooks.experiments.runs import is_plain
from nicehooks.values import trees


class RecordedCall:
    """One call of one module in the base run.

    Attributes:
        module: the module.
        number: which of its calls.
        begin, end: when, in ticks of the recording.
        around: the calls that were going on, from the model's own on; itself is the last.
        inside: the calls that it made, and that those made.
        value: what it returned, as a copy.
        is_plain: whether that is made of containers, tensors and constants alone.
    """

    def __init__(self, site: Site, number: int, begin: int, around: tuple[RecordedCall, ...]) -> None:
        self.site = site
        self.module = site.module
        self.number = number
        self.begin = begin
        self.end = -1
        self.around = (*around, self)
        self.inside: list[RecordedCall] = []
        self.value: Any = None
        self.is_plain = False


class FrameAction(Action):
    """What is done around the calls of one module, with the frame of the call in hand."""

    __slots__ = ()
    verb = "sweep"

    def before(self, frame: Frame, site: Site) -> None:
        """Before the call of the module of `site`."""

    def after(self, frame: Frame, site: Site) -> None:
        """After it."""


class FrameRule(SiteRule):
    """Lets a `FrameAction` act."""

    __slots__ = ()
    action: FrameAction  # pyright: ignore[reportIncompatibleVariableOverride]

    def before(self, frame: Frame) -> None:
        self.action.before(frame, self.site)

    def after(self, frame: Frame) -> None:
        self.action.after(frame, self.site)


class CallsAround(Intervention):
    """Does things around the calls of modules; the sites that it acts at may be reached or not."""

    verb = "sweep"

    def __init__(self, model: nn.Module, actions: Actions) -> None:
        super().__init__(model)
        self.actions = actions

    def __repr__(self) -> str:
        return "sweep(model, …)"

    def _actions(self) -> Actions:
        return self.actions

    def _rules(self, site: Site, action: Action) -> Pairs:
        if isinstance(action, FrameAction):
            return [(site.module, FrameRule(site, action, ALWAYS))]
        return super()._rules(site, action)

    def _check(self, session: Session, plan: Plan) -> None:
        pass


class Recording:
    """The calls of the base run, in the order in which they began."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self.calls: list[RecordedCall] = []
        self._open: list[RecordedCall] = []
        self._ticks = 0
        self._counts: Counter[nn.Module] = Counter()
        self.context = CallsAround(model, [(_is_watched_value(model, sites), _Note(self))])

    def begin(self, site: Site) -> None:
        """Notes that the module of `site` is called."""
        self._ticks += 1
        call = RecordedCall(site, self._counts[site.module], self._ticks, tuple(self._open))
        self._counts[site.module] += 1
        for outer in self._open:
            outer.inside.append(call)
        self.calls.append(call)
        self._open.append(call)

    def end(self, value: Any) -> None:
        """Notes that the call that began last is over, and what it returned."""
        self._ticks += 1
        call = self._open.pop()
        call.end = self._ticks
        call.is_plain = is_plain(value)
        if call.around[0] is not call and call.is_plain:
            call.value = trees.map_tensors(lambda tensor: tensor.detach().clone(), value)

    def calls_of(self, module: nn.Module) -> list[RecordedCall]:
        """The calls of `module`."""
        return [call for call in self.calls if call.module is module]

    def finished_by(self, tick: int) -> Iterator[RecordedCall]:
        """The calls that were over by `tick`, and not those inside of them."""
        for call in self.calls:
            outer = call.around[-2].end if len(call.around) > 1 else tick + 1
            if call.end <= tick < outer:
                yield call


class _Note(FrameAction):
    __slots__ = ("recording",)

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def before(self, frame: Frame, site: Site) -> None:
        self.recording.begin(site)

    def after(self, frame: Frame, site: Site) -> None:
        self.recording.end(frame.value)


def _is_watched_value(model: nn.Module, sites: Iterable[Site]) -> Group:
    """The model, the modules around the sites, and what these call: all others are called inside of one of them."""
    around = {""}
    for site in sites:
        parts = site.name.split(".")
        around.update([".".join(parts[:count]) for count in range(len(parts))])
    own = {site.name for site in sites}

    def is_watched(name: str, module: nn.Module) -> bool:
        return name in around or name in own or name.rpartition(".")[0] in around

    (group,) = select_groups(model, is_watched, "sweep")
    return group
