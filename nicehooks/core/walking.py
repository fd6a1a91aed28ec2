"""One walk through a model along a pattern, which goes only where the pattern leads.

NOTE [A walk costs what it selects]
Where only one name may follow, the child of this name is looked up, and its siblings are not looked at. So a path
without wildcards costs its length, in a model of any size.

NOTE [The name that a wrapper gives]
The module in a wrapper is read twice: under the wrapper's own name, and, spelled out, under the one that it has in the
wrapper. The second is read with and without a mark in it: what matches it with the mark too has not spelled it out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from nicehooks import torch_private
from nicehooks.core.children import further_children
from nicehooks.core.traces import Trace
from nicehooks.paths.names import escape
from nicehooks.paths.patterns import Choice, Pattern, Reading

ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""What may run a fused kernel that hides the modules in it."""

WRAPPED = "\0"
"""In a marked name, before the part that the child of a wrapper has in it."""


class Found(NamedTuple):
    """A module under a name that the pattern matches.

    Attributes:
        name: the name.
        module: the module.
        encoders: the encoders and encoder layers around it.
        is_marked: whether the name has a part that a wrapper gives.
    """

    name: str
    module: nn.Module
    encoders: tuple[nn.Module, ...]
    is_marked: bool


class _Name(NamedTuple):
    """One name of a module: how far it is read, and how far with the marks of wrappers in it, if it has any."""

    text: str
    reading: Reading
    marked: Reading | None


class Walk:
    """The modules that a pattern matches, by the combination of the alternatives in its braces.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    >>> walk = Walk(model, Pattern.of("1.{0,1}"))
    >>> [found.name for found in walk.named((0,))], walk.named((1,))
    (['1.0'], [])

    Args:
        model: any module.
        pattern: over the names of its modules.
        trace: notes whatever the walk looks at.
    """

    def __init__(self, model: nn.Module, pattern: Pattern, trace: Trace | None = None) -> None:
        self._pattern = pattern
        self._trace = Trace() if trace is None else trace
        self._found: dict[Choice, list[Found]] = {}
        self._read: dict[tuple[Reading, str | None], Reading] = {}
        self._visit(model, [_Name("", pattern.start, None)], (), ())

    def named(self, choice: Choice) -> list[Found]:
        """What these alternatives match, in the order of the model; names that a wrapper gives come last."""
        names: dict[str, Found] = {}
        for found in sorted(self._found.get(choice, ()), key=lambda found: found.is_marked):
            names.setdefault(found.name, found)
        return list(names.values())

    def _visit(
        self, module: nn.Module, names: list[_Name], around: tuple[nn.Module, ...], encoders: tuple[nn.Module, ...]
    ) -> None:
        inner = torch_private.wrapped_child(module)
        if inner is not None:
            self._trace.looked_at(module, inner)
            child: Any = self._child(module, inner)
            self._visit(child, [*names, *self._in_wrapper(names, inner)], around, encoders)
            return
        for name in names:
            self._note(name, module, encoders)
        if torch_private.is_scripted(module):
            self._trace.looked_at(module)
            return
        around = (*around, module)
        if isinstance(module, ENCODERS):
            encoders = (*encoders, module)
        for key, child in self._children(module, names):
            if all([child is not parent for parent in around]):
                named = [below for name in names if (below := self._below(name, key)) is not None]
                if named:
                    self._visit(child, named, around, encoders)

    def _note(self, name: _Name, module: nn.Module, encoders: tuple[nn.Module, ...]) -> None:
        implied = () if name.marked is None else self._pattern.accepted(name.marked)
        for choice in self._pattern.accepted(name.reading):
            if choice not in implied:
                found = Found(name.text, module, encoders, name.marked is not None)
                self._found.setdefault(choice, []).append(found)

    def _in_wrapper(self, names: list[_Name], inner: str) -> list[_Name]:
        """The names of the module in a wrapper that spell the wrapper out."""
        spelled: list[_Name] = []
        for text, reading, marked in names:
            own = self._along(text, reading, inner)
            if own:
                marked = self._along(text, reading if marked is None else marked, WRAPPED + inner)
                spelled.append(_Name(joined(text, inner), own, marked))
        return spelled

    # children

    def _children(self, module: nn.Module, names: list[_Name]) -> list[tuple[str, nn.Module]]:
        """The children that a name may lead to."""
        keys = {self._pattern.only_segment(self._starts(name.text, name.reading)) for name in names}
        only = [key for key in keys if key]  # an empty one is that of a name that ends here
        if len(only) < 2 and None not in keys:
            self._trace.looked_at(module, *only)
            return [(key, child) for key in only if (child := self._child(module, key)) is not None]
        self._trace.looked_at_all(module)
        found: dict[str, nn.Module] = {}
        for key, child in (*module._modules.items(), *further_children(module)):
            if child is not None:
                found.setdefault(key, child)
        return list(found.items())

    def _child(self, module: nn.Module, key: str) -> nn.Module | None:
        child = module._modules.get(key)
        if child is None:
            child = next((method for name, method in further_children(module) if name == key), None)
        return child

    # reading

    def _below(self, name: _Name, key: str) -> _Name | None:
        reading = self._along(name.text, name.reading, key)
        if not reading:
            return None
        marked = None if name.marked is None else self._along(name.text, name.marked, key)
        return _Name(joined(name.text, key), reading, marked)

    def _along(self, text: str, reading: Reading, key: str) -> Reading:
        """How far the child called `key` is read; siblings that are read alike are read once."""
        starts = self._starts(text, reading)
        after = self._read.get((starts, key))
        if after is None:
            after = self._read[starts, key] = self._pattern.along(starts, key)
        return after

    def _starts(self, text: str, reading: Reading) -> Reading:
        """Where the name of a child of the module called `text` begins."""
        if not text:
            return reading
        starts = self._read.get((reading, None))
        if starts is None:
            starts = self._read[reading, None] = self._pattern.dotted(reading)
        return starts


def joined(name: str, key: str) -> str:
    """The name of the child called `key` of the module called `name`."""
    return f"{name}.{key}" if name else key


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module of `model` called `name`, if there is one."""
    found = Walk(model, Pattern.of(escape(name))).named(())
    return found[0].module if found else None
