"""The rules of an intervention: how the value at a site gets to what the intervention does with it, and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import torch_private
from nicehooks.core import sessions
from nicehooks.core.explaining import explained
from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Companion, Pairs, PortKind, register_port
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Session
from nicehooks.core.when import When
from nicehooks.errors import TreeMismatch
from nicehooks.paths.grammar import ModulePath, with_chain
from nicehooks.paths.ports import EVERY_CALL, OutputSpelling
from nicehooks.values.nodes import leaves
from nicehooks.values.parts import each_index, rewrite
from nicehooks.values.regions import STAR, Chain, Rows, items_of


class Action:
    """What an intervention does with a value. One action serves all sites of a context.

    Attributes:
        verb: the name of the intervention, for messages.
        for_part: the name of the one that acts on a part of a value, if this one cannot.
        changes: whether it may change the value.
        wants_call: whether it is told of the call that the value belongs to.
        may_write: whether it runs a function of the user, which may write into the value.
        outlives: whether it acts on the gradients of what was computed in its context after that was left, too.
    """

    __slots__ = ()
    verb = ""
    for_part = ""
    changes = True
    wants_call = False
    may_write = False
    outlives = False

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        """What takes the place of `value`, which stands at the path `key`; `value` itself leaves it."""
        raise NotImplementedError  # abstract: every intervention has its own

    def act_in_call(self, call: Any, value: Any, key: str, site: Site) -> Any:
        """As `act`, if it `wants_call`: `call` is the `Frame`, or what the rule keeps of it for its gradients."""
        raise NotImplementedError


class SiteRule(Rule):
    """Brings the values at one site to an action.

    Attributes:
        companion: what rules of this class need for as long as their session lasts, if anything.
        reusable: whether a rule is good for the next context with the same site, with another action.
        of: which of its intervention's actions it brings values to.
        key: the path of the site as text.
        wild: whether only a wildcard has selected the site.
        output_only: whether the port is the result of the call and nothing else.
        reason: why a site of this port is not reached, if that is always the same.
    """

    companion: type[Companion] | None = None
    reusable = False
    reason = ""
    output_only = False
    __slots__ = ("action", "chain", "index", "key", "of", "path", "rows", "simple", "site", "stars", "when", "wild")

    def __init__(self, site: Site, action: Action, when: When) -> None:
        self.site = site
        self.path: ModulePath = site.path
        self.key = str(site)
        self.chain: Chain = site.path.chain
        self.stars = site.path.has_stars
        self.rows = any([isinstance(step, Rows) for step in self.chain])
        self.action = action
        self.when = when
        self.simple = self.output_only and not when.counts
        self.index = 0  # among the rules of its context
        self.of = 0
        self.wild = False

    def take_actions(self, actions: list[Any]) -> None:
        self.action = actions[self.of]

    def was_reached(self, session: Session) -> bool:
        """Whether the site was reached in `session`."""
        return self.key in session.reached

    def why_not_reached(self) -> str:
        """Why the site was not reached, if that is always the same."""
        return self.reason

    def number(self, frame: Frame) -> None:
        """Counts this call, if calls matter."""
        if not self.when.counts:
            return
        progress, first = self.session.progress(), self.when.first_call
        before = progress.calls.get(self.index)
        if not torch.compiler.is_compiling() and torch_private.in_backward():  # a checkpointed region runs again
            if any([count is not None and count.number > 0 for count in (before, progress.step)]):
                raise explained("misuse.recomputed", self.key)
            frame.counts[self] = first
        elif first is not None:
            frame.counts[self] = progress.calls[self.index] = first if before is None else before.after()

    def key_of(self, frame: Frame | None) -> str | None:
        """The key of the site in this call; None where the rule does not act."""
        if frame is None or not self.when.counts:
            return self.key
        if self.when.no_step is not None and not self.session.progress().step.admits():
            return None
        if self.when.first_call is None:
            return self.key
        count = frame.counts[self]
        if not count.admits():
            return None
        return self.key.replace("#*", f"#{count.number}", 1) if self.path.call == EVERY_CALL else self.key

    def through(self, frame: Frame | None, value: Any, chain: Chain | None = None) -> Any:
        """`value` after the action has been at the site in it."""
        key = self.key_of(frame)
        return value if key is None else self.at_key(key, frame, value, chain)

    def at_key(self, key: str, frame: Frame | None, value: Any, chain: Chain | None = None) -> Any:
        """`value` after the action has been at the site in it, which is called `key` in this call."""
        chain = self.chain if chain is None else chain
        if not self.action.changes or torch.compiler.is_compiling():  # what traced code reads, it would be guarded on
            return self.act(value, chain, key, frame)
        first = self.key not in self.session.reached
        new = self.act(value, chain, key, frame)
        self.note_checkpoint(first, new)
        return new

    def note_checkpoint(self, search: bool, value: Any = None) -> None:
        """Notices a forward that backward will run again, and that it does.

        Args:
            search: whether to search the stack for a checkpointed region; once per site is enough.
            value: what takes the place of the value at the site. Backward may reach it without running so much of the
                region again that this rule acts.
        """
        session = self.session
        if session.checkpointed and torch_private.in_backward():
            session.recomputed = True
        elif search and torch_private.in_checkpoint():
            session.checkpointed = max(session.checkpointed, torch_private.checkpoint_depth())
            for tensor in leaves(value):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(_note_backward, session))

    def act(self, value: Any, chain: Chain, key: str, call: Any = None) -> Any:
        """`value` after the action has been at the end of `chain` in it, at each index where the chain has a `*`."""
        if self.rows:
            rows = Rows(self.session.progress().rows)
            chain = tuple([rows if isinstance(step, Rows) else step for step in chain])
        if not self.stars or not any([item is STAR for step in chain for item in items_of(step)]):
            return self.act_at(value, chain, key, call)
        lead = self.path.chain[: len(self.path.chain) - len(chain)]
        try:
            chains = list(each_index(value, chain))
        except TreeMismatch as error:
            raise self.at_edge(error, value, key) from None
        for found in chains:
            value = self.act_at(value, found, with_chain(key, (*lead, *found)), call)
        return value

    def act_at(self, value: Any, chain: Chain, key: str, call: Any) -> Any:
        """As `act`, where the chain has no `*`."""
        try:
            return rewrite(value, chain, partial(self._at_site, key=key, call=call), self.action.may_write)
        except TreeMismatch as error:
            raise self.at_edge(error, value, key) from None

    def _at_site(self, value: Any, key: str, call: Any) -> Any:
        """What takes the place of `value`; a site that has only ever been an empty region was not reached."""
        told = self.action.wants_call
        if value is None and self.wild and self.action.changes and not told:
            return value  # a wildcard passes over modules that return nothing
        sliced = bool(self.chain) and isinstance(self.chain[-1], slice | tuple)
        if not (sliced and isinstance(value, Tensor) and value.numel() == 0):
            self.session.reached[self.key] = True
            sessions.note_export(self.session, self.key)
        if told:
            return self.action.act_in_call(call, value, key=key, site=self.site)
        return self.action.act(self.session, value, key=key, site=self.site)

    def at_edge(self, error: TreeMismatch, value: Any, key: str) -> TreeMismatch:
        """The bare fact, with the site and the line to write instead."""
        torch_private.break_graph(str(error))  # what follows imports the room of teaching
        return explained("misfits.at_site", self, error, value, key)


def _note_backward(session: Session, gradient: Tensor) -> None:
    session.recomputed = True


class OutputRule(SiteRule):
    """The result of a module."""

    __slots__ = ()
    reusable = True
    output_only = True

    def output(self, value: Any) -> Any:
        return self.through(None, value)

    def before(self, frame: Frame) -> None:
        self.number(frame)

    def after(self, frame: Frame) -> None:
        frame.value = self.through(frame, frame.value)


class OutputPort(OutputSpelling, PortKind):
    """The port that every path has which names no other: the output of a module."""

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        return [(site.module, OutputRule(site, action, when))]


register_port(OutputPort())
