"""`capture`: the intervention that looks and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nicehooks import torch_private, torch_private_tensors
from nicehooks.caches.cache import ActivationCache
from nicehooks.caches.spellings import Names
from nicehooks.caches.watching import GraphWatch, versions_of
from nicehooks.contexts.intervention import Intervention, Plan
from nicehooks.contexts.keeping import Keeper, runs_again
from nicehooks.contexts.user_functions import call_user, show_where, takes_site
from nicehooks.core.frames import Frame, StopForward
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, OutputRule, SiteRule
from nicehooks.core.selection import Site, Where
from nicehooks.core.sessions import Session, note_export
from nicehooks.core.steps import StepRule
from nicehooks.core.tap import overwrite
from nicehooks.core.when import ALWAYS, When
from nicehooks.errors import UnsupportedModule
from nicehooks.torch_private import transforms_running, version_counter
from nicehooks.values import trees

Keep = Literal["first", "last", "all"]


class capture(Intervention):
    """Shows what a model computes inside: yields an `ActivationCache` that fills as the model runs.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with capture(model, "*") as acts:
    ...     _ = model(torch.ones(5, 4))
    >>> list(acts), acts["1"].shape
    (['0', '1', '2'], torch.Size([5, 3]))

    Values are the model's own tensors: they are not detached, cloned or moved unless asked.

    Args:
        model: any module.
        where: paths, sites, … (see `select`); every module if there is none.
        keep: which value of a site that is reached several times: the `"first"`, the `"last"`, or `"all"` (a list, one
            entry per call).
        detach: takes each value out of the autograd graph.
        clone: copies each value, so that in-place layers cannot overwrite it.
        to: a device or dtype, or a tuple of arguments for `Tensor.to`.
        map: reduces each value as it is seen: `fn(value)` or `fn(value, site=…)`.
        stop: ends the forward as soon as every site has been seen; the call of the model then returns None. Where
            the model itself is not called, as under a wrapper, it ends nothing.
        layout: of a value that is spread over processes, a `DTensor`: what this process has of it, `"local"`, that is
            the `DTensor` itself; or the whole, `"full"`, gathered as a plain tensor, for which every process has to be
            in the same context. What is plain already stays as it is: nothing says whether it is a shard.
        steps: the steps to look at (calls of the model since entry): an int, a slice, a list, or a predicate.
        calls: the calls to look at (calls of the module within one step), likewise.

    Raises:
        SiteNotFound: on entry: an item of `where` selects nothing.
        SiteNotReached: on exit: a site was selected, but the forward did not come by.
    """

    verb = "capture"
    keeps_plans = True

    def __init__(
        self,
        model: nn.Module,
        *where: Where,
        keep: Keep = "last",
        detach: bool = False,
        clone: bool = False,
        to: Any = None,
        map: Callable[..., Any] | None = None,
        stop: bool = False,
        steps: Any = None,
        calls: Any = None,
        layout: Literal["local", "full"] = "local",
    ) -> None:
        super().__init__(model, steps, calls)
        if keep not in ("first", "last", "all"):
            raise ValueError(f"keep={keep!r}: it is 'first', 'last' or 'all'")
        if layout not in ("local", "full"):
            raise ValueError(f"layout={layout!r}: it is 'local' or 'full'")
        self.where = where or (True,)
        self.stops = stop
        self._action = _Capture(keep, Keeper(detach, clone, to, layout == "full"), map, stop)

    def __repr__(self) -> str:
        return f"capture(model, {show_where(self.where)})"

    @property
    def cache(self) -> ActivationCache:
        """The cache of the handle: what was seen since it was entered or attached last."""
        return self._action.cache

    def _actions(self) -> list[tuple[Where, Action]]:
        return [(self.where, self._action)]

    def _depends_on(self) -> Any:
        return super()._depends_on(), self._action.is_plain, self._action.stop

    def _rules(self, site: Site, action: Action) -> Pairs:
        if not site.path.port.is_output:
            return super()._rules(site, action)
        whole = len(site.path.chain) == 0 and site.path.call is None
        if whole and self._action.is_plain and self.steps is None and self.calls is None:
            return [(site.module, _WholeOutput(site, self._action, ALWAYS))]
        return [(site.module, _CapturedOutput(site, self._action, self._when(site.path.call)))]

    def _step_rule(self) -> StepRule:
        return _StepOfCapture(self._action)

    def _entered(self, session: Session) -> ActivationCache:
        plan: Any = self._plan
        cache = self._action.begin(len(plan.keys))  # a site that two items select is one site
        cache._other_names = Names(self.model)  # pyright: ignore[reportPrivateUsage]
        return cache

    def _left(self, session: Session) -> None:
        if not session.attached:  # a handle gives its cache to whoever asks; a context has given it already
            self._action.begin(0)

    def _all_reached(self, session: Session, plan: Plan) -> bool:
        self._action.cache.settle()
        return not plan.keys.difference(dict.keys(self._action.cache)).difference(session.reached)

    def _was_reached(self, session: Session, rule: SiteRule) -> bool:
        return rule.key in session.reached or dict.__contains__(self._action.cache, rule.key)


class _Capture(Action):
    """Puts what comes by into a cache."""

    __slots__ = ("cache", "expected", "is_plain", "keep", "keeper", "map", "orders", "seen", "stop", "takes_site")
    verb = "capture"
    changes = False

    def __init__(self, keep: Keep, keeper: Keeper, map_: Any, stop: bool) -> None:
        self.keep = keep
        self.keeper = keeper
        self.map = map_
        self.takes_site = map_ is not None and takes_site(map_)
        self.stop = stop
        self.is_plain = keep == "last" and not (self.keeper.copies or map_ or stop)
        self.begin(0)

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        """Also of an older pickle, which has the options of a keeper and no keeper."""
        slots = dict(state[1])
        old = {name: slots.pop(name) for name in ("detach", "clone", "to") if name in slots}
        if old:
            self.keeper = Keeper(**old)
        for name, value in slots.items():
            setattr(self, name, value)

    def begin(self, expected: int) -> ActivationCache:
        """A new cache, for `expected` sites."""
        self.expected = expected
        self.cache = ActivationCache()
        self.seen = self.cache._seen  # pyright: ignore[reportPrivateUsage]
        self.orders: dict[str, int] = {}  # of the gradients that came by, when their values were made
        return self.cache

    @property
    def is_unwatched(self) -> bool:
        """Whether nothing notices what a graph writes; see NOTE [Where a part of the model is compiled]."""
        return self.cache._graph_watch is None and not self.keeper.clone  # pyright: ignore[reportPrivateUsage]

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        if not site.path.port.is_gradient and runs_again(self.cache, key):
            return value
        unwatched = torch.compiler.is_dynamo_compiling() and self.is_unwatched and site.path.port.is_of_arguments
        kept = trees.map_tensors(_copied_unless_traced_back, value) if unwatched else value
        self.keeper.keep(kept, session.level, lambda seen: self._put(session, seen, key, site))
        if self.stop:
            self._stop_when_complete(session, str(site))
        return value

    def _put(self, session: Session, seen: Any, key: str, site: Site) -> None:
        if self.map is not None:
            seen = call_user(self.map, self.takes_site, seen, key, site)
        if site.path.port.is_gradient:
            self._record_gradient(key, seen, session.order)
        else:
            self.cache.record(key, seen, self.keep)

    def _record_gradient(self, key: str, value: Any, order: int) -> None:
        """Keeps the gradient of the first, the last or of all calls, in the order of the forward: backward turns it."""
        before = self.orders.get(key)
        self.orders[key] = order if before is None or self.keep == "all" else before
        if self.keep == "all":
            self.cache.insert_call(key, value, new_pass=before is None or order >= before)
        elif before is None or (order < before if self.keep == "first" else order >= before):
            self.orders[key] = order
            self.cache.record(key, value)

    def _stop_when_complete(self, session: Session, key: str) -> None:
        progress = session.progress()
        progress.seen.add(key)
        if len(progress.seen) == self.expected and progress.depth > 0 and progress.part is None:
            raise StopForward(session)  # only the root model catches it


class _StepOfCapture(StepRule):
    """Hands the activations of a model that is being exported out beside its output.

    What was captured there are no values, but what stands for them in the program that is made.
    """

    __slots__ = ("action",)

    def __init__(self, action: _Capture) -> None:
        self.action = action

    def take_actions(self, actions: list[Any]) -> None:
        (self.action,) = actions

    def before(self, frame: Frame) -> None:
        super().before(frame)
        if torch.compiler.is_dynamo_compiling() and torch_private.transform_level() == 0:
            frame.enter(_Watched(self.action.cache))
        if torch_private.is_exporting() and not self.session.exporting:
            if torch_private_tensors.is_part_of_export():
                raise UnsupportedModule(PART_OF_EXPORT.format(label=self.session.label))
            frame.enter(_HandedOut(frame, self.session, self.action.cache))


class _Watched(AbstractContextManager[None]):
    """Counts the writes to what is captured in a call of the model that is being traced; see `GraphWatch`."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __enter__(self) -> None:
        self.cache._graph_watch = GraphWatch(self.cache)

    def __exit__(self, *_: object) -> None:
        self.cache._graph_watch.settle()


PART_OF_EXPORT = (
    "{label} is around an export of which its model is only a part, so it cannot hand the activations out.\n"
    "    output, activations = captured(model, …)(x)  # in the forward of the module around the model"
)


class _HandedOut(AbstractContextManager[None]):
    def __init__(self, frame: Frame, session: Session, cache: ActivationCache) -> None:
        self.frame = frame
        self.session = session
        self.cache = cache

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        frame, found = self.frame, dict(self.cache)
        before = frame.kept.get("handed out")
        frame.kept["handed out"] = everything = {**found, **({} if before is None else before)}
        frame.value = (frame.value if before is None else frame.value[0], everything)
        for key in found:
            note_export(self.session, key)
        self.cache.clear()


class _CapturedOutput(OutputRule):
    """Brings a module's output, or a part of it, to a cache.

    NOTE [Where a part of the model is compiled]
    A graph gives out what is in a tensor at its end, and `GraphWatch` counts the writes to it up to there. It needs the
    call of the model in the graph. Where only a part of the model is compiled nothing tells the end of its graph, so
    the model goes on with a copy, and what it writes into that is not seen in the cache. What the module was given and
    returns as it is stays the same tensor for the model, which may know it by another name. So do its arguments: of
    these the cache gets the copy, unless gradients are to come back to them.
    """

    __slots__ = ()
    action: _Capture  # pyright: ignore[reportIncompatibleVariableOverride]

    def after(self, frame: Frame) -> None:
        super().after(frame)
        if torch.compiler.is_dynamo_compiling() and self.action.is_unwatched:
            given = trees.leaves((frame.args, frame.kwargs))
            frame.value = trees.map_tensors(lambda tensor: _copied_unless_in(given, tensor), frame.value)


def _copied_unless_in(given: list[Any], tensor: Tensor) -> Tensor:
    return tensor if any([tensor is one for one in given]) else tensor.clone()


def _copied_unless_traced_back(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.clone()


class _WholeOutput(_CapturedOutput):
    """The shortest way from a module's whole output into a cache: most captures are nothing else.

    The tap itself does what `output` does for a tensor that comes by for the first time in a call of the model: see
    NOTE [The shortest way].

    Attributes:
        round: the call of the model in which a value came by last.
    """

    __slots__ = ("round",)
    plain = True

    def __init__(self, site: Site, action: Action, when: When) -> None:
        super().__init__(site, action, when)
        self.round = -1

    def output(self, value: Any) -> Any:
        kind = type(value)
        if (kind is not Tensor and kind is not tuple) or transforms_running():
            return self.through(None, value)
        try:
            version: Any = version_counter(value) if kind is Tensor else versions_of(value)
        except (AttributeError, RuntimeError):  # another tree than a tuple of tensors; made under inference_mode
            return self.through(None, value)
        session, action = self.session, self.action
        again = self.round == session.round or session.attached  # each thread may be in a call of its own
        if again and self.key in action.seen and torch_private.in_backward():
            return value  # a checkpointed region runs again: this was captured in the forward
        self.round = session.round
        overwrite(action.cache, self.key, value)  # see NOTE [What a cache keeps alive]
        action.seen[self.key] = (value, version)
        return value
