"""One request: what its contexts do, read as if they were entered, and how far it is; and what its caller holds.

NOTE [A context is read, not entered]
A context in `under` is asked what it would do if it were entered (its plan), as a copy, so that one object serves many
requests. Its rules are those that it would bind, with a session that no thread enters: the request says which step it
is at. So a path, a port, an index, a filter and the order of contexts mean in a request what they mean in a `with`
block around the same request alone.

NOTE [Rows that come again]
An engine that is short of memory drops what it knows of a request, and later runs its prompt and the tokens generated
so far once more. The interventions act on each of these rows at the step that they belonged to, because
what follows depends on them; what was captured there is not captured a second time.
"""

# pyright: reportPrivateUsage=false
# what a context would do is not public, and is asked for here alone

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.changes import edit
from nicehooks.contexts.intervention import Intervention
from nicehooks.contexts.patching import patch
from nicehooks.contexts.plans import Plan
from nicehooks.core.rows import RowsRule
from nicehooks.core.rules import SiteRule
from nicehooks.core.sessions import Progress, Session
from nicehooks.errors import ContextMisuse, NiceHooksError, UnsupportedModule
from nicehooks.servers.pieces import Pieces, may_be_cut
from nicehooks.servers.rows import Hidden, RowSpan
from nicehooks.servers.sums import RuleOfShift, shift_of
from nicehooks.values import trees


class RequestSession(Session):
    """A session that no thread enters; `at` is how far its request is in the rows that it acts on now."""

    __slots__ = ("at",)

    def progress(self) -> Progress:
        return self.at


class Stretch(NamedTuple):
    """Rows of one request that belong to one step of it.

    Attributes:
        again: whether the step has been before; see NOTE [Rows that come again].
        progresses: what each session that counts is to count with.
    """

    request: Request
    span: RowSpan
    again: bool
    progresses: list[tuple[RequestSession, Progress]]


@dataclass
class Served:
    """What came of a request.

    Attributes:
        tokens: the tokens that were generated, without the prompt.
        caches: the activations, one cache for each `capture` in `under`, in this order.
    """

    tokens: list[int]
    caches: list[ActivationCache] = field(default_factory=list[ActivationCache])

    @property
    def activations(self) -> ActivationCache:
        """The activations of all captures.

        Raises:
            ContextMisuse: two captures have the same site: `caches` has them one by one.
        """
        if len(self.caches) == 1:
            return self.caches[0]
        found = ActivationCache()
        for cache in self.caches:
            for key in cache:
                if key in found:
                    raise ContextMisuse(f"two captures of this request have {key!r}: result.caches has one for each.")
                found[key] = cache[key]
        return found


class Handle:
    """A request that was submitted: its result, when it is there, by `result()` or `await`."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def result(self, timeout: float | None = None) -> Served:
        """Waits for the tokens and activations; raises what has failed in this request.

        Args:
            timeout: for how many seconds to wait at most.
        """
        return self._request.future.result(timeout)

    def __await__(self) -> Generator[Any, None, Served]:
        return asyncio.wrap_future(self._request.future).__await__()

    def done(self) -> bool:
        """Whether it is over: finished, failed or cancelled."""
        return self._request.future.done()

    def cancel(self) -> bool:
        """Ends the request without a result; says whether it was in time."""
        return self._request.future.cancel()


class Request:
    """One request: its prompt, the rules of its contexts by module, and how far it is."""

    def __init__(self, prompt: list[int], under: Iterable[Any], is_part: Callable[[nn.Module], bool]) -> None:
        self.name = ""
        self.prompt = prompt
        self.contexts = [_Context(one) for one in under]
        self.future: Future[Served] = Future()
        self.next_step = 0
        self.lock = threading.Lock()
        self.over = False
        self.rules: dict[nn.Module, list[Any]] = {}
        for context in self.contexts:
            for module, rule in context.rules:
                if not is_part(module):
                    raise ContextMisuse(f"{context.own!r} is about another model than the one that is served.")
                self.rules.setdefault(module, []).append(rule)
        self.over_all = [rule for of_module in self.rules.values() for rule in of_module if not may_be_cut(rule)]
        self.shifts: dict[nn.Module, RuleOfShift] = {
            module: shift for module, of_module in self.rules.items() if (shift := shift_of(of_module)) is not None
        }
        self.pieces = Pieces()
        self._counting = [context for context in self.contexts if context.session.counting]
        self._steps = {context: context.new_progress() for context in self._counting}

    def stretches(self, start: int, count: int, first_row: int, logit: int | None) -> list[Stretch]:
        """The rows of one forward, which are those of `count` positions from `start` on, by the step they belong to.

        The prompt is step 0, or a piece of it; each token behind it is a step of its own.
        """
        end, found, position, prompt = start + count, [], start, len(self.prompt)
        while position < end:
            in_prompt = position < prompt
            stop = min(prompt, end) if in_prompt else position + 1
            step = 0 if in_prompt else position - prompt + 1
            first, logit_there = first_row - start, logit if stop == end else None
            around = (position, prompt - stop) if in_prompt else (0, 0)
            span = RowSpan(first + position, first + stop, logit_there, *around)
            found.append(Stretch(self, span, step < self.next_step, self._progresses(step)))
            if span.is_piece:
                self.pieces.begin(is_first=position == 0)
            if not span.after:  # a prompt has been run once its last piece has
                self.next_step = max(self.next_step, step + 1)
            position = stop
        return found

    def _progresses(self, step: int) -> list[tuple[RequestSession, Progress]]:
        """A count at `step` for each session that counts, which goes on from that of the step before."""
        found: list[tuple[RequestSession, Progress]] = []
        for context in self._counting:
            progress = context.new_progress()
            if step:
                progress.step = self._steps[context].step
            progress.next_step()
            self._steps[context] = progress
            found.append((context.session, progress))
        return found

    def settle(self, tokens: list[int] | None = None, error: BaseException | None = None) -> None:
        """Gives the result, or the error, to whoever waits; only the first one counts."""
        with self.lock:
            if self.over:
                return
            self.over = True
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            if error is not None:
                raise error
            self.future.set_result(Served(tokens or [], self._checked()))
        except BaseException as failed:
            self.future.set_exception(failed)

    def _checked(self) -> list[ActivationCache]:
        for context in self.contexts:
            context.check()
        return [context.cache for context in self.contexts if context.cache is not None]


class _Context:
    """One context of a request; see NOTE [A context is read, not entered]."""

    def __init__(self, given: Any) -> None:
        if not isinstance(given, Intervention):
            raise TypeError(f"under=[…] takes contexts (capture, steer, patch, …), not {type(given).__name__}")
        if not isinstance(given, capture | edit | patch):
            raise UnsupportedModule(SHARED.format(path=given, why="it is about the model as a whole"))
        self.own: Any = copy.copy(given)
        self.own._plan = self.own._session = None
        self.own._action = copy.copy(getattr(given, "_action", None))  # a capture's holds the cache of one request
        actions = self.own._actions()
        self.plan: Plan = self.own._plan_for(actions)
        self.own._plan = self.plan
        self.session = RequestSession(repr(given))
        self.session.called, self.session.counting = True, self.plan.counting
        self.session.at = Progress(0, None)
        self.rules: list[tuple[Any, Any]] = [
            (tap.module(), rule) for tap, rule, _ in self.plan.taps if isinstance(rule, SiteRule | RowsRule)
        ]
        for _, rule in self.rules:
            rule.session = self.session
            rule.take_actions([action for _, action in actions])
            _refuse_if_shared(self.own, rule)
        cache = self.own._entered(self.session)
        self.cache: ActivationCache | None = cache if isinstance(cache, ActivationCache) else None

    def new_progress(self) -> Progress:
        """A count before the first step."""
        (when, *_) = [rule.when for _, rule in self.rules if isinstance(rule, SiteRule)]
        return Progress(0, when.no_step)

    def check(self) -> None:
        """What leaving the context would check: that all was reached; and that nothing belongs to others."""
        self.own._check(self.session, self.plan)
        for key, value in ({} if self.cache is None else self.cache).items():
            if any([isinstance(leaf, Hidden) for leaf in trees.leaves(value)]):
                raise UnsupportedModule(SHARED.format(path=repr(key), why=NO_ROWS_OF_OWN))


def _refuse_if_shared(context: Any, rule: Any) -> None:
    """Refuses what is not the rows of one request: gradients, weights, calls, and to stop for all."""
    if isinstance(context, capture) and context._action.stop:
        raise UnsupportedModule(STOPS.format(label=context))
    if not isinstance(rule, SiteRule):
        return
    port = rule.site.path.port
    if port.is_gradient:
        raise UnsupportedModule(NO_GRADIENTS.format(path=str(rule.site), name=rule.site.name))
    if not (port.is_output or port.is_of_arguments):
        raise UnsupportedModule(SHARED.format(path=repr(str(rule.site)), why=OF_ALL))


NO_GRADIENTS = (
    "{path!r}: an engine that serves requests computes no gradients.\n"
    "  Run the request alone:\n"
    '    grad_at(model, "{name}", metric)(ids)'
)
OF_ALL = "it belongs to all requests in a batch"
NO_ROWS_OF_OWN = "the requests have no rows of their own there"
SHARED = (
    "{path} cannot be served: {why}.\n"
    "  A request reaches outputs and inputs of modules, where it has rows of its own. For all else, run it alone:\n"
    "    with …: model.generate(ids)"
)
STOPS = (
    "{label} has stop=True, which would end the forward of all requests in the batch.\n"
    "    capture(model, …)  # without it, and submit(…, max_new_tokens=1)"
)
ENDED = NiceHooksError("the engine was stopped before this request was finished.")
