"""A prompt that the engine runs in pieces: each rule sees it as a whole, or acts where the position is that it names.

NOTE [Prompts in pieces]
The engine cuts a prompt where a forward is full. What acts on each position by itself (`steer`, `ablate`, `patch`) may
be cut with it: it gets the rows of the piece in their place among all positions, the others filled with rows that are
thrown away, so that an index and a tensor over the positions mean what they mean in the whole. A `capture` waits: its
rows are put together, and it sees them once, with the last piece. Where an index names one position, a capture or a
function acts in the piece that has it, and in no other. Everything else, a function over several positions, has to see
all of them: such a prompt is never cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nicehooks.contexts.patching import Replacement
from nicehooks.core.frames import Frame
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Session
from nicehooks.errors import ContextMisuse
from nicehooks.servers.rows import RowSpan, row_dim, times_over
from nicehooks.values import trees

BY_ROW = ("steer", "ablate", "patch")
"""The verbs that act on each position by itself."""


def keeps(rule: Any) -> bool:
    """Whether `rule` keeps what it sees, and changes nothing."""
    return isinstance(rule, SiteRule) and not rule.action.changes


def acts_by_row(rule: Any) -> bool:
    """Whether what `rule` does at a position depends on no other position."""
    if not isinstance(rule, SiteRule):
        return True
    if rule.action.verb not in BY_ROW:
        return False
    change = getattr(getattr(rule.action, "fn", None), "__self__", rule.action)
    in_subspace = isinstance(change, Replacement) and change.subspace is not None
    return not in_subspace or all([isinstance(step, int | str) for step in rule.chain])


def names_one_position(rule: Any) -> bool:
    """Whether an index of `rule` looks as `[:, 3]` does; what it is an index of, only the forward knows."""
    found = [step for step in rule.chain if isinstance(step, tuple) and len(step) > 1 and Ellipsis not in step]
    return any([type(step[1]) is int for step in found])


def may_be_cut(rule: Any) -> bool:
    """Whether a prompt under `rule` can be run in pieces for sure; where it names a position, that is seen later."""
    return keeps(rule) or acts_by_row(rule)


class Pieces:
    """What is kept of the pieces of one prompt until the last of them."""

    def __init__(self) -> None:
        self._kept: dict[Any, list[Any]] = {}
        self._calls: Counter[Any] = Counter()  # of each rule in this piece

    def begin(self, is_first: bool) -> None:
        """Another piece is run; the first one may come again."""
        self._calls.clear()
        if is_first:
            self._kept.clear()

    def act(self, rule: Any, frame: Frame, phase: str, span: RowSpan) -> None:
        """Brings the rows of a piece, spread among all positions, to `rule`: before or after the call of `frame`."""
        if not isinstance(rule, SiteRule) or (phase == "after") != rule.output_only or acts_by_row(rule):
            getattr(rule, phase)(frame)
            return
        named = _named_positions(rule, frame, phase, span) if names_one_position(rule) else None
        if named is not None and len(named) < 2:
            if named and span.before <= named[0] < span.before + span.length:
                _act_where_it_is(rule, frame, phase, span, named[0])
            else:
                rule.number(frame)
        elif keeps(rule):
            self._keep(rule, frame, phase, span)
        else:
            raise ContextMisuse(OVER_SEVERAL.format(path=str(rule.site)))

    def _keep(self, rule: Any, frame: Frame, phase: str, span: RowSpan) -> None:
        """Keeps the rows of this piece; with the last one, hands `rule` all of them."""
        if rule.when.no_step is not None and not rule.session.progress().step.admits():
            return
        value = _value(frame, phase)
        self._calls[rule] += 1
        key = rule, self._calls[rule]
        rows = self._kept.setdefault(key, [])
        rows.append(_mapped(lambda tensor, dim: tensor.narrow(dim, span.before, span.length).clone(), value, span))
        if not span.after:
            _act_on(_joined(self._kept.pop(key), span), rule, frame, phase)


def _act_where_it_is(rule: Any, frame: Frame, phase: str, span: RowSpan, position: int) -> None:
    """Lets `rule` act in the piece that has the one position that it names."""
    if not keeps(rule):
        getattr(rule, phase)(frame)
        return

    def everywhere(tensor: Tensor, dim: int) -> Tensor:  # what is kept of it would hold all rows
        return times_over(tensor.narrow(dim, position, 1).clone(), dim, span.positions)

    _act_on(_mapped(everywhere, _value(frame, phase), span), rule, frame, phase)


def _act_on(value: Any, rule: Any, frame: Frame, phase: str) -> None:
    """Shows `value` to `rule`, which changes nothing."""
    before = _value(frame, phase)
    _put(frame, phase, value)
    getattr(rule, phase)(frame)
    _put(frame, phase, before)


def _value(frame: Frame, phase: str) -> Any:
    return frame.value if phase == "after" else (frame.args, frame.kwargs)


def _put(frame: Frame, phase: str, value: Any) -> None:
    if phase == "after":
        frame.value = value
    else:
        frame.args, frame.kwargs = value


def _mapped(fn: Callable[[Tensor, int], Any], value: Any, span: RowSpan) -> Any:
    """`value` with `fn` applied to each tensor that has all positions, and the dimension that they are in."""

    def one(tensor: Tensor) -> Any:
        dim = row_dim(tensor, span.positions)
        return tensor if dim is None else fn(tensor, dim)

    return trees.map_tensors(one, value)


def _joined(pieces: list[Any], span: RowSpan) -> Any:
    """The last of `pieces`, with the rows of all."""
    columns = zip(*map(trees.leaves, pieces), strict=True)

    def whole(tensor: Tensor) -> Tensor:
        parts = next(column for column in columns if column[-1] is tensor)
        dim = row_dim(tensor, span.length)
        return tensor if dim is None or len(parts) == 1 else torch.cat(parts, dim)

    return trees.map_tensors(whole, pieces[-1])


class _Noting(Action):
    """Notes the value that it is brought to."""

    __slots__ = ("found",)
    changes = False

    def __init__(self) -> None:
        self.found: list[Any] = []

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        self.found += trees.leaves(value)
        return value


def _named_positions(rule: Any, frame: Frame, phase: str, span: RowSpan) -> list[int]:
    """Which positions `rule` would be brought to: it is, once, where each value is its own position."""
    session, noting, marked = rule.session, _Noting(), Frame(frame.tap, (), {})
    progress = session.progress()
    marked.counts = dict(frame.counts)
    _put(marked, phase, trees.map_tensors(lambda tensor: _marks(tensor, span), _value(frame, phase)))
    action, reached, calls = rule.action, dict(session.reached), dict(progress.calls)
    rule.action = noting
    try:
        getattr(rule, phase)(marked)
    finally:
        rule.action, session.reached, progress.calls = action, reached, calls
    found = [leaf.flatten() for leaf in noting.found if isinstance(leaf, Tensor)]
    return torch.cat(found).unique().tolist() if found else []


def _marks(tensor: Tensor, span: RowSpan) -> Tensor:
    dim, last = row_dim(tensor, span.positions), span.positions - 1
    if dim is None:  # the one row that the head has
        return torch.full(tensor.shape, last)
    along = [1] * tensor.ndim
    along[dim] = -1
    return torch.arange(span.positions).view(along).expand(tensor.shape)


OVER_SEVERAL = (
    "{path!r}: a function over several positions has to see all of the prompt, which is longer than a forward.\n"
    "    serving(model, max_batch_tokens=…)"
)
