"""The path language: text that says which values of a model are meant.

    path  =  modules  [ "#" call ]  [ "@" port ]  { "[" index "]" | "/" heads }

This file knows nothing of any model: it turns text into `ModulePath`s and back, and tells which module names a path
matches. `selection.py` brings paths and models together.
"""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from nicehooks.errors import PathError
from nicehooks.trees import STAR, Chain, Heads, show_step

EVERY_CALL = "*"

_SPECIAL = r"#@\[\]/{},*\\"
_NAME = re.compile(r"(?:\\.|[^#@\[\]/\\])*")
_CALL = re.compile(r"#(\d+|\*)")
_PORT = re.compile(r"@(?P<name>[A-Za-z_0-9][\w.]*?)(?P<tail>\.grad)?(?:#(?P<call>\d+|\*))?(?P<paren>\(\))?(?P<arg>\.input)?(?![\w.(#])")
_HEADS = re.compile(r"/(\d+)")
_BRACE = re.compile(r"(?<!\\)\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Port:
    """Which value of a module: `kind` is "output", "input", "grad", "input.grad", "parameter" or "call"."""

    kind: str = "output"
    name: str = ""
    call: int | str | None = None
    argument: bool = False

    def __str__(self) -> str:
        if self.kind == "output":
            return ""
        if self.kind == "call":
            number = "" if self.call is None else f"#{self.call}"
            return f"@{self.name}{number}(){'.input' if self.argument else ''}"
        return f"@{self.name or self.kind}"


OUTPUT = Port()


@dataclass(frozen=True, eq=False)
class ModulePath:
    """A path, taken apart.

    >>> path = ModulePath.parse("h.3.attn@input[0]/12[:, :, 7]")
    >>> path.name, path.port.kind, path.slice
    ('h.3.attn', 'input', '[0]/12[:, :, 7]')
    >>> ModulePath.parse(str(path)) == path
    True

    Attributes:
        name: the pattern over module names, before the first of `# @ [ /`.
        call: which call within one step: a number, `"*"` for one site per call, or None.
        port: which value of the module.
        chain: the subscripts on the value.
    """

    name: str
    call: int | str | None = None
    port: Port = OUTPUT
    chain: Chain = ()

    @staticmethod
    def parse(text: str | ModulePath) -> ModulePath:
        """Reads a path.

        Raises:
            PathError: `text` is not written in the path language.
        """
        return text if isinstance(text, ModulePath) else _parse(text)

    @cached_property
    def _text(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        return f"{self.name}{call}{self.port}{self.slice}"

    @property
    def slice(self) -> str:
        """The subscripts as text."""
        return "".join(show_step(step) for step in self.chain)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"ModulePath({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, ModulePath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    @cached_property
    def is_wild(self) -> bool:
        """Whether the name has a `*`: then it may select sites that a forward never reaches."""
        return re.search(r"(?<!\\)\*", self.name) is not None

    @cached_property
    def has_stars(self) -> bool:
        """Whether a subscript has a `*`, which stands for one site per index."""
        return any(item is STAR for step in self.chain for item in _items(step))

    def alternatives(self) -> list[ModulePath]:
        """One path per alternative of the braces in the name, so that each of them has to match."""
        return [replace(self, name=name) for name in _without_braces(self.name)]

    def on(self, name: str) -> ModulePath:
        """The same call, port and subscripts of the module called `name`."""
        return replace(self, name=escape(name))

    def matches(self, name: str) -> bool:
        """Whether the name part matches the module name `name`."""
        return any(_pattern(alternative).fullmatch(name) for alternative in _without_braces(self.name))

    @property
    def plain_name(self) -> str:
        """The name without the backslashes that protect special characters."""
        return re.sub(r"\\(.)", r"\1", self.name)


def escape(name: str) -> str:
    """`name` with a backslash before each character that the path language gives a meaning."""
    return re.sub(f"([{_SPECIAL}])", r"\\\1", name)


def expand_stars(path: ModulePath, sizes: Any) -> list[ModulePath]:
    """One path per combination of indices for the `*`s; `sizes` has one range per `*`, in order."""
    found: list[ModulePath] = []
    for indices in itertools.product(*sizes):
        chosen = iter(indices)
        chain = tuple(_fill(step, chosen) for step in path.chain)
        found.append(replace(path, chain=chain))
    return found


def _fill(step: Any, chosen: Any) -> Any:
    if isinstance(step, tuple):
        return tuple(next(chosen) if item is STAR else item for item in step)
    return next(chosen) if step is STAR else step


def _items(step: Any) -> tuple[Any, ...]:
    return step if isinstance(step, tuple) else (step,)


# --- module names -----------------------------------------------------------------------------------------------------


def _without_braces(name: str) -> list[str]:
    brace = _BRACE.search(name)
    if brace is None:
        return [name]
    before, after = name[: brace.start()], name[brace.end() :]
    return [full for option in _options(brace[1]) for full in _without_braces(before + option + after)]


def _options(text: str) -> list[str]:
    options: list[str] = []
    for option in text.split(","):
        numbers = _RANGE.fullmatch(option.strip())
        if numbers is None:
            options.append(option.strip())
        else:
            options += [str(number) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    return options


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    """The regular expression over module names for a name without braces."""
    if name == "**":
        return re.compile(r".*", re.DOTALL)
    segments = name.split(".")
    text = ""
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        if segment != "**":
            text += _segment(segment) + ("" if last else r"\.")
        else:
            text += r".+" if last else r"(?:[^.]+\.)*"
    return re.compile(text, re.DOTALL)


def _segment(segment: str) -> str:
    if segment == "*":
        return r"[^.]+"
    parts = re.split(r"(\\.|\*)", segment)
    return "".join(r"[^.]*" if part == "*" else re.escape(re.sub(r"\\(.)", r"\1", part)) for part in parts)


# --- reading ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _parse(text: str) -> ModulePath:
    name = _NAME.match(text)
    at = name.end() if name is not None else 0
    _check_name(text, text[:at])
    call = _CALL.match(text, at)
    if call is None and text[at : at + 1] == "#":
        raise _error(text, at + 1, "a call number, or *, is expected after #")
    path = ModulePath(text[:at], None if call is None else _number(call[1]))
    at = at if call is None else call.end()
    if text[at : at + 1] == "@":
        path, at = _parse_port(text, at, path)
    return replace(path, chain=_parse_chain(text, at))


def _number(text: str) -> int | str:
    return EVERY_CALL if text == "*" else int(text)


def _check_name(text: str, name: str) -> None:
    bare = re.sub(r"\\.", "__", name)
    for bracket in re.finditer(r"[{}]", _BRACE.sub(lambda brace: "_" * len(brace[0]), bare)):
        raise _error(text, bracket.start(), "this brace has no partner")
    for empty in re.finditer(r"\.\.|^\.|\.$", _BRACE.sub(lambda brace: "_" * len(brace[0]), bare)):
        raise _error(text, empty.start(), "a module name is missing beside this dot")
    for space in re.finditer(r"^\s|\s$", name):
        raise _error(text, space.start(), "a path has no spaces around it")


def _parse_port(text: str, at: int, path: ModulePath) -> tuple[ModulePath, int]:
    found = _PORT.match(text, at)
    if found is None:
        raise _error(text, at + 1, "a port is expected after @: input, grad, input.grad, a parameter, or a call name()")
    name, end = found["name"] + (found["tail"] or ""), found.end()
    if found["paren"]:
        call = None if found["call"] is None else _number(found["call"])
        return replace(path, port=Port("call", name, call, found["arg"] is not None)), end
    if found["call"]:
        raise _error(text, found.start("call") - 1, "a call number belongs to the module (h.3#1@input) or to a call (@softmax#1())")
    if name in ("input", "grad", "input.grad"):
        return replace(path, port=Port(name)), end
    if name == "output":
        return path, end
    return replace(path, port=Port("parameter", name)), end


def _parse_chain(text: str, at: int) -> Chain:
    chain: list[Any] = []
    while at < len(text):
        heads = _HEADS.match(text, at)
        if heads is not None:
            if int(heads[1]) == 0:
                raise _error(text, at + 1, "the number of heads is at least 1")
            chain.append(Heads(int(heads[1])))
            at = heads.end()
        elif text[at] == "[":
            end = _closing_bracket(text, at)
            chain.append(_parse_index(text, at + 1, end))
            at = end + 1
        else:
            raise _error(text, at, "one of # @ [ / is expected here, in this order")
    return tuple(chain)


def _closing_bracket(text: str, at: int) -> int:
    depth, quote = 0, ""
    for position in range(at, len(text)):
        char = text[position]
        if quote:
            quote = "" if char == quote and text[position - 1] != "\\" else quote
        elif char in "'\"":
            quote = char
        elif char in "[]":
            depth += 1 if char == "[" else -1
            if depth == 0:
                return position
    raise _error(text, at, "this bracket is never closed")


def _parse_index(text: str, start: int, end: int) -> Any:
    pieces = _split_items(text, start, end)
    if not pieces:
        raise _error(text, start, "an index is expected between the brackets")
    items = [_parse_item(text, begin, stop) for begin, stop in pieces]
    many = len(items) > 1 or text[start:end].rstrip().endswith(",")
    return tuple(items) if many else items[0]


def _split_items(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Where the items between commas are; commas in quotes and in inner brackets do not count."""
    cuts, depth, quote = [start - 1], 0, ""
    for position in range(start, end):
        char = text[position]
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "," and depth == 0:
            cuts.append(position)
        depth += (char == "[") - (char == "]") if not quote else 0
    pieces = [(a + 1, b) for a, b in itertools.pairwise([*cuts, end])]
    if pieces and not text[slice(*pieces[-1])].strip():
        pieces.pop()
    return pieces


def _parse_item(text: str, begin: int, stop: int) -> Any:
    item = text[begin:stop].strip()
    if item == "*":
        return STAR
    if item == "...":
        return Ellipsis
    if ":" in item and item[0] not in "'\"":
        bounds = [_parse_bound(text, begin, bound.strip()) for bound in item.split(":")]
        if len(bounds) > 3:
            raise _error(text, begin, "a slice has at most three parts")
        return slice(*bounds)
    try:
        value = ast.literal_eval(item)
    except (ValueError, SyntaxError):
        value = item = ()
    whole = isinstance(value, list) and all(type(number) is int for number in value)
    if type(value) in (int, str) or value is None or whole:
        return value
    raise _error(text, begin, "an index is an integer, a slice, a quoted key, None, ..., * or a list of integers")


def _parse_bound(text: str, begin: int, bound: str) -> int | None:
    if not bound:
        return None
    try:
        return int(bound)
    except ValueError:
        raise _error(text, begin, "the bounds of a slice are integers") from None


def _error(text: str, at: int, what: str) -> PathError:
    return PathError(f"{what}\n    {text}\n    {' ' * at}^")
