"""The path language: text that says which values of a model are meant.

    path  =  modules  [ "#" call ]  [ "@" port ]  { "[" index "]" | "/" heads | "/rows" }

This file knows nothing of any model: it turns text into `ModulePath`s and back, and tells which module names a path
matches. `selection.py` brings paths and models together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from operator import methodcaller
from typing import Any

from nicehooks.paths.names import ESCAPED, RANGE, escape, unescape
from nicehooks.paths.patterns import Choice, Pattern
from nicehooks.paths.ports import EVERY_CALL, OUTPUT, Port, read_port
from nicehooks.paths.subscripts import fault, read_chain
from nicehooks.torch_private import evaluated_while_tracing
from nicehooks.values.regions import STAR, Chain, items_of, show_step


@dataclass(frozen=True, eq=False)
class ModulePath:
    """A path, taken apart.

    >>> path = ModulePath.parse("h.3.attn@input[0]/12[:, :, 7]")
    >>> path.name, path.port.kind, path.subscripts
    ('h.3.attn', 'input', '[0]/12[:, :, 7]')
    >>> ModulePath.parse(str(path)) == path
    True
    >>> name, index = ModulePath("h.3", (slice(None), -1))
    >>> name, index, str(ModulePath(name, index))
    ('h.3', (slice(None, None, None), -1), 'h.3[:, -1]')

    Attributes:
        name: the pattern over module names, before the first of `# @ [ /`.
        call: which call within one step: a number, `"*"` for one site per call, or None. A tuple, a slice or a list in
            its place is a subscript on the value: `ModulePath(name, index)`.
        port: which value of the module.
        chain: the subscripts on the value.
        has_stars: whether a subscript has a `*`, which stands for one site per index.
    """

    name: str
    call: int | str | None = None
    port: Port = OUTPUT
    chain: Chain = ()
    has_stars: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        index: Any = self.call
        if not (index is None or isinstance(index, int | str)):
            object.__setattr__(self, "chain", (_as_step(index), *self.chain))
            object.__setattr__(self, "call", None)
        stars = any(item is STAR for step in self.chain for item in items_of(step))
        object.__setattr__(self, "has_stars", stars)  # a field: Dynamo reads nothing else of a frozen dataclass

    @staticmethod
    def parse(text: str | ModulePath) -> ModulePath:
        """Reads a path.

        Raises:
            PathError: `text` is not written in the path language.
        """
        return text if isinstance(text, ModulePath) else _read(text)

    @cached_property
    def _text(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        return f"{self.name}{call}{self.port}{self.subscripts}"

    @property
    def subscripts(self) -> str:
        """The subscripts as text."""
        return "".join(show_step(step) for step in self.chain)

    @property
    def slice(self) -> tuple[Any, ...] | None:
        """The subscript as Python has it, `value[path.slice]`: a tuple; None without, and of several, each of them."""
        if len(self.chain) != 1:
            return self.chain or None
        (step,) = self.chain
        return step if isinstance(step, tuple) else (step,)

    def __iter__(self) -> Iterator[Any]:
        """So that `name, index = path`."""
        return iter((self.name, self.slice))

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> Any:
        """A copy is read from the text, so that its `*`s are again the one `STAR`."""
        return methodcaller("parse", self._text), (ModulePath,)

    def __repr__(self) -> str:
        return f"ModulePath({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, ModulePath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    @cached_property
    def is_wild(self) -> bool:
        """Whether the name has a `*`: then it may select sites that a forward never reaches."""
        return "*" in ESCAPED.sub("", self.name)

    @property
    def pattern(self) -> Pattern:
        """The name as a pattern over module names."""
        return Pattern.of(self.name)

    def alternatives(self) -> Iterator[ModulePath]:
        """One path per alternative of the braces in the name, so that each of them has to match.

        There may be very many: the first that matches nothing is reason enough to stop.
        """
        return map(self.chosen, self.pattern.choices())

    def alternatives_of(self, name: str) -> list[ModulePath]:
        """Those of the alternatives that match the module name `name`."""
        return list(map(self.chosen, self.pattern.matched(name)))

    def chosen(self, choice: Choice) -> ModulePath:
        """The path with one option in the place of each of its braces."""
        return replace(self, name=self.pattern.text(choice)) if self.pattern.options else self

    def on(self, name: str) -> ModulePath:
        """The same call, port and subscripts of the module called `name`."""
        return replace(self, name=escape(name))

    def matches(self, name: str) -> bool:
        """Whether the name part matches the module name `name`."""
        return bool(self.pattern.matched(name))

    @cached_property
    def plain_name(self) -> str:
        """The name without the backslashes that protect special characters."""
        return unescape(self.name)


@evaluated_while_tracing
def with_chain(text: str, chain: Chain) -> str:
    """The path `text` with other subscripts; where these only fill in its `*`s, the rest stays as it was spelled."""
    path = _parse(text)
    if len(path.chain) == len(chain):
        chain = tuple([new if STAR in items_of(own) else own for own, new in zip(path.chain, chain, strict=True)])
    return str(replace(path, chain=chain))


def _as_step(index: Any) -> Any:
    """`index` as a step of a chain: a tuple of one is its item, and `"*"` stands for each index."""
    if not isinstance(index, tuple):
        return index
    items: tuple[Any, ...] = tuple([STAR if type(item) is str and item == "*" else item for item in index])
    return items[0] if len(items) == 1 else items


# --- reading ----------------------------------------------------------------------------------------------------------

LONGEST_RANGE = 10_000

_NAME = re.compile(r"(?:\\.|[^#@\[\]/\\])*", re.DOTALL)
_CALL = re.compile(r"#([0-9]{1,18}(?![0-9])|\*)")
_GROUP = re.compile(r"\{([^{}]*)\}")


@evaluated_while_tracing
def _read(text: str) -> ModulePath:
    return _parse(text)


@lru_cache(maxsize=4096)
def _parse(text: str) -> ModulePath:
    name, at = _read_name(text)
    call, at = _read_call(text, at)
    port, at = read_port(text, at)
    return ModulePath(name, call, port, read_chain(text, at))


def _read_name(text: str) -> tuple[str, int]:
    found = _NAME.match(text)
    at = 0 if found is None else found.end()
    if text[at : at + 1] == "\\":
        raise fault(text, at + 1, "a character is expected after \\")
    for place, what in _faults(ESCAPED.sub("__", text[:at])):
        raise fault(text, place, what)
    return text[:at], at


def _faults(name: str) -> Iterator[tuple[int, str]]:
    """Where `name`, with its escaped characters blanked out, is not well written, and why."""
    flat = _GROUP.sub(lambda group: "_" * len(group[0]), name)
    yield from ((group.start(), "braces do not nest") for group in _GROUP.finditer(flat))
    yield from ((brace.start(), "this brace has no partner") for brace in re.finditer(r"[{}]", flat))
    yield from ((group.start(), what) for group in _GROUP.finditer(name) for what in _range_faults(group[1]))
    yield from (
        (dot.start(), "a module name is missing beside this dot") for dot in re.finditer(r"\.\.|^\.|\.\Z", flat)
    )
    yield from ((space.start(), "a path has no spaces around it") for space in re.finditer(r"^\s|\s\Z", flat))


def _range_faults(options: str) -> Iterator[str]:
    for numbers in filter(None, map(RANGE.fullmatch, map(str.strip, options.split(",")))):
        first, last = int(numbers[1]), int(numbers[2])
        if first > last:
            yield "this range is empty: its first number is the larger one"
        if last - first >= LONGEST_RANGE:
            yield f"this range has more than {LONGEST_RANGE} numbers"


def _read_call(text: str, at: int) -> tuple[int | str | None, int]:
    found = _CALL.match(text, at)
    if found is None and text[at : at + 1] == "#":
        raise fault(text, at + 1, "a call number, or *, is expected after #")
    return (None, at) if found is None else (_number(found[1]), found.end())


def _number(text: str | None) -> int | str | None:
    return text if text is None or text == EVERY_CALL else int(text)
