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
from typing import Any

from nicehooks.paths.subscripts import fault, read_chain
from nicehooks.torch_private import evaluated_while_tracing
from nicehooks.values.trees import STAR, Chain, show_step

EVERY_CALL = "*"


@dataclass(frozen=True)
class Port:
    """Which value of a module.

    Attributes:
        kind: "output", "input", "grad", "input.grad", "parameter", "call", "use" or "use.grad".
        name: of the parameter, or of the function that is called.
        call: which call of the function, or which use of the parameter.
        part: which value of the call: its result (""), its "input", or a step of fused attention (`STEPS`).
    """

    kind: str = "output"
    name: str = ""
    call: int | str | None = None
    part: str = ""

    @property
    def is_of_parameter(self) -> bool:
        """Whether `name` is that of a parameter."""
        return self.kind in ("parameter", "use", "use.grad")

    @property
    def is_of_arguments(self) -> bool:
        """Whether the value is all arguments of the module, whose first subscript is a position or a name."""
        return self.kind in ("input", "input.grad")

    def __str__(self) -> str:
        if self.kind == "output":
            return ""
        number = "" if self.call is None else f"#{self.call}"
        if self.kind.startswith("use"):
            return f"@{self.name}.uses{number}(){self.kind.removeprefix('use')}"
        if self.kind == "call":
            return f"@{self.name}{number}(){'.' if self.part else ''}{self.part}"
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
        has_stars: whether a subscript has a `*`, which stands for one site per index.
    """

    name: str
    call: int | str | None = None
    port: Port = OUTPUT
    chain: Chain = ()
    has_stars: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stars = any(item is STAR for step in self.chain for item in _items(step))
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
        return f"{self.name}{call}{self.port}{self.slice}"

    @property
    def slice(self) -> str:
        """The subscripts as text."""
        return "".join(show_step(step) for step in self.chain)

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> Any:
        """A copy is read from the text, so that its `*`s are again the one `STAR`."""
        return _parse, (self._text,)

    def __repr__(self) -> str:
        return f"ModulePath({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, ModulePath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    @cached_property
    def is_wild(self) -> bool:
        """Whether the name has a `*`: then it may select sites that a forward never reaches."""
        return "*" in _ESCAPED.sub("", self.name)

    def alternatives(self) -> Iterator[ModulePath]:
        """One path per alternative of the braces in the name, so that each of them has to match."""
        return (replace(self, name=name) for name in _without_braces(self.name))

    def on(self, name: str) -> ModulePath:
        """The same call, port and subscripts of the module called `name`."""
        return replace(self, name=escape(name))

    def matches(self, name: str) -> bool:
        """Whether the name part matches the module name `name`."""
        return _pattern(self.name).fullmatch(name) is not None

    @cached_property
    def plain_name(self) -> str:
        """The name without the backslashes that protect special characters."""
        return _unescape(self.name)


@evaluated_while_tracing
def with_chain(text: str, chain: Chain) -> str:
    """The path `text` with other subscripts; where these only fill in its `*`s, the rest stays as it was spelled."""
    path = _parse(text)
    if len(path.chain) == len(chain):
        chain = tuple([new if STAR in _items(own) else own for own, new in zip(path.chain, chain, strict=True)])
    return str(replace(path, chain=chain))


def _items(step: Any) -> tuple[Any, ...]:
    return step if isinstance(step, tuple) else (step,)


# --- module names -----------------------------------------------------------------------------------------------------

LONGEST_RANGE = 10_000

_SPECIAL = re.compile(r"[#@\[\]/{},*\\]|^\s|\s\Z")
_ESCAPED = re.compile(r"\\(.?)", re.DOTALL)
_BRACES = re.compile(r"((?:\\.|[^\\{}])*)\{((?:\\.|[^\\{}])*)\}", re.DOTALL)
_OPTION = re.compile(r"\s*((?:\\.|[^\\,])*?)\s*,", re.DOTALL)
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


@evaluated_while_tracing
def escape(name: str) -> str:
    """`name` with a backslash before each character that the path language gives a meaning."""
    return _SPECIAL.sub(r"\\\g<0>", name)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def _without_braces(name: str) -> Iterator[str]:
    """The names that `name` stands for, one per combination of what is in its braces."""
    braces = _BRACES.match(name)
    if braces is None:
        yield name
        return
    for option in _options(braces[2]):
        yield from (braces[1] + option + rest for rest in _without_braces(name[braces.end() :]))


def _options(text: str) -> Iterator[str]:
    for option in _OPTION.findall(f"{text},"):
        numbers = _RANGE.fullmatch(option)
        yield from [option] if numbers is None else map(str, range(int(numbers[1]), int(numbers[2]) + 1))


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    """The regular expression over module names for a name."""
    return re.compile("|".join(map(_regex, _without_braces(name))), re.DOTALL)


def _regex(name: str) -> str:
    if name == "**":
        return r".*"
    *parents, last = name.split(".")
    before = [r"(?:[^.]+\.)*" if parent == "**" else _segment(parent) + r"\." for parent in parents]
    return "".join(before) + (r".+" if last == "**" else _segment(last))


def _segment(segment: str) -> str:
    if segment == "*":
        return r"[^.]+"
    parts = re.findall(r"\\.?|\*|[^\\*]+", segment, re.DOTALL)
    return "".join([r"[^.]*" if part == "*" else re.escape(_unescape(part)) for part in parts])


# --- reading ----------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(?:\\.|[^#@\[\]/\\])*", re.DOTALL)
_CALL = re.compile(r"#([0-9]{1,18}(?![0-9])|\*)")
_PORT = re.compile(
    r"@(?P<name>\w+(?:\.\w+)*)(?:#(?P<call>[0-9]{1,18}|\*))?"
    r"(?:(?P<call_of>\(\))(?:\.(?P<part>input|scores|pattern))?(?P<grad>\.grad)?)?(?![\w.(#])"
)
_GROUP = re.compile(r"\{([^{}]*)\}")

USES = ".uses"
"""What stands between the name of a parameter and the brackets: `@weight.uses()`."""

PORT = "a port is expected after @: input, grad, input.grad, a parameter, or a call name()"
FUSED_ATTENTION = "scaled_dot_product_attention"
STEPS = ("scores", "pattern")
"""The steps of fused attention that a path can name: before and after its softmax, `[batch, head, query, key]`."""

STEPS_OF_PORT = f"scores and pattern are steps of @{FUSED_ATTENTION}() alone"
GRAD_OF_PORT = "the gradient of a call is that of a parameter's uses alone: @weight.uses().grad"
BRACKETS_OF_USES = "the uses of a parameter are calls, with brackets: @weight.uses()"
INPUT_OF_USES = "the uses of a parameter are results, which have no input"
CALL_OF_PORT = "a call number belongs to the module (h.3#1@input) or to a call (@softmax#1())"


@evaluated_while_tracing
def _read(text: str) -> ModulePath:
    return _parse(text)


@lru_cache(maxsize=4096)
def _parse(text: str) -> ModulePath:
    name, at = _read_name(text)
    call, at = _read_call(text, at)
    port, at = _read_port(text, at)
    return ModulePath(name, call, port, read_chain(text, at))


def _read_name(text: str) -> tuple[str, int]:
    found = _NAME.match(text)
    at = 0 if found is None else found.end()
    if text[at : at + 1] == "\\":
        raise fault(text, at + 1, "a character is expected after \\")
    for place, what in _faults(_ESCAPED.sub("__", text[:at])):
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
    for numbers in filter(None, map(_RANGE.fullmatch, map(str.strip, options.split(",")))):
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


def _read_port(text: str, at: int) -> tuple[Port, int]:
    if text[at : at + 1] != "@":
        return OUTPUT, at
    found = _PORT.match(text, at)
    if found is None:
        raise fault(text, at + 1, PORT)
    if found["call"] and not found["call_of"]:
        raise fault(text, found.start("call") - 1, CALL_OF_PORT)
    if found["part"] in STEPS and found["name"] != FUSED_ATTENTION:
        raise fault(text, found.start("part"), STEPS_OF_PORT)
    if not found["call_of"] and found["name"].endswith(USES):
        raise fault(text, found.end(), BRACKETS_OF_USES)
    if found["grad"] and (found["part"] or not found["name"].endswith(USES)):
        raise fault(text, found.start("grad"), GRAD_OF_PORT)
    if found["part"] and found["name"].endswith(USES):
        raise fault(text, found.start("part") - 1, INPUT_OF_USES)
    return _port(found), found.end()


def _port(found: re.Match[str]) -> Port:
    name = found["name"]
    if found["call_of"] and name.endswith(USES):
        return Port(f"use{found['grad'] or ''}", name.removesuffix(USES), _number(found["call"]))
    if found["call_of"]:
        return Port("call", name, _number(found["call"]), found["part"] or "")
    if name == "output":
        return OUTPUT
    return Port(name) if name in ("input", "grad", "input.grad") else Port("parameter", name)
