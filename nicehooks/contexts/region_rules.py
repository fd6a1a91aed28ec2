"""Many regions of one value, patched at once.

NOTE [Regions that are written together]
Each `patch` of a region copies the tensor around it. Where one context patches several single indices of one output, as
`{"h.3[0, 5]": …, "h.3[1, 6]": …}` does, the first of their rules copies it once and writes all of them; the others do
nothing. They have to be different places, so that their order does not matter. Whatever is not that plain (a transform,
code that is being traced, an index out of range, a value that does not fit) is left to the rules one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private
from nicehooks.core import sessions
from nicehooks.core.frames import Frame
from nicehooks.core.rules import Action, OutputRule
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.torch_private import transforms_running
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS
from nicehooks.values.regions import items_of

Shape = tuple[bool, ...]
"""Of a subscript: which of its items are indices; the others are whole dimensions."""


def shape_of(site: Site) -> Shape | None:
    """The shape of the one subscript of `site`; None where its region is no single index, after whole dimensions."""
    path = site.path
    if not path.port.is_output or path.call is not None or len(path.chain) != 1:
        return None
    step = path.chain[0]
    items = items_of(step)
    shape = tuple([type(item) is int for item in items])
    plain = all([index or item == slice(None) for index, item in zip(shape, items, strict=True)])
    at = shape.index(True) if any(shape) else 0
    neighbours = shape == (False,) * at + (True,) * (len(shape) - at) and any(shape)
    return shape if plain and neighbours else None


class RegionRule(OutputRule):
    """One of the regions of a module's output that a context patches; see NOTE [Regions that are written together].

    Attributes:
        together: the rules of all of them, this one included.
    """

    __slots__ = ("together",)

    def __init__(self, site: Site, action: Action, when: When, together: list[RegionRule]) -> None:
        super().__init__(site, action, when)
        self.together = together
        together.append(self)

    def output(self, value: Any) -> Any:
        return self._all(None, value) if self.together[0] is self else value

    def after(self, frame: Frame) -> None:
        if self.together[0] is self:
            frame.value = self._all(frame, frame.value)

    def _all(self, frame: Frame | None, value: Any) -> Any:
        written = self._written(value) if len(self.together) > 1 else self._written_alone(value)
        if written is not None:
            return written
        for rule in self.together:
            value = rule.through(frame, value)
        return value

    def _written_alone(self, value: Any) -> Tensor | None:
        """A copy of `value` with this region written, the shortest way; None where that is not plain."""
        action: Any = self.action
        new = action.value
        if torch.compiler.is_dynamo_compiling() or not (type(new) is type(value) is Tensor) or transforms_running():
            return None
        if new.dtype is not value.dtype or new.device != value.device or action.subspace is not None:
            return None
        try:
            written = value.clone()
            region = written[self.chain[0]]
            if not trees.fits(new.shape, region.shape) or region.numel() == 0:
                return None
            region.copy_(new)
        except TORCH_ERRORS:
            return None  # sparse, nested, quantised, out of range: the longer way knows or says so
        self._note(written)
        return written

    def _written(self, value: Any) -> Tensor | None:
        """A copy of `value` with every region written; None where that is not plain."""
        if torch.compiler.is_compiling() or type(value) is not Tensor:
            return None
        if torch_private.innermost_transform() is not None or value.is_nested:  # which has no sizes
            return None
        shape = items_of(self.chain[0])
        dims = [dim for dim, item in enumerate(shape) if type(item) is int]
        if len(shape) > value.ndim or not (places := _places_in_region(self.together, dims, value)):
            return None
        try:
            new = [_instead(rule, value) for rule in self.together]
            index = [torch.tensor(along, device=value.device) for along in zip(*places, strict=True)]
            written = value.clone()
            written[(*(slice(None),) * dims[0], *index)] = torch.stack(new, dims[0])
        except TORCH_ERRORS:
            return None  # the rule whose value it is says so better
        self._note(written)
        return written

    def _note(self, written: Tensor) -> None:
        first = self.key not in self.session.reached
        for rule in self.together:
            self.session.reached[rule.key] = True
            sessions.note_export(self.session, rule.key)
        self.note_checkpoint(first, written)


def _places_in_region(rules: list[RegionRule], dims: list[int], value: Tensor) -> list[tuple[int, ...]]:
    """The indices of each rule, counted from the start; empty where one is out of range or two are one place."""
    sizes = [value.shape[dim] for dim in dims]
    given = [[items_of(rule.chain[0])[dim] for dim in dims] for rule in rules]
    if any([not -size <= at < size for each in given for at, size in zip(each, sizes, strict=True)]):
        return []
    places = [tuple([at % size for at, size in zip(each, sizes, strict=True)]) for each in given]
    return places if len(set(places)) == len(places) and value.numel() else []


def _instead(rule: RegionRule, value: Tensor) -> Tensor:
    """What takes the place of the region of `rule` in `value`."""
    return rule.action.placed(value[rule.chain[0]])  # type: ignore[attr-defined]
