"""The port of a path: what stands behind its `@`, and the table of the kinds of port that there are.

NOTE [Ports are found, not listed]
Nothing here knows a port by its name. Each file in the room of ports puts its kinds into the table when it is imported,
and the room is imported when the first `@` is read. So a new port is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nicehooks.paths.subscripts import fault

EVERY_CALL = "*"


@dataclass(frozen=True)
class Port:
    """Which value of a module.

    Attributes:
        kind: under which the table knows the kind of port.
        name: of the parameter, or of the function that is called.
        call: which call of the function, or which use of the parameter.
        part: which value of the call, where it has several.
        is_gradient: whether the value is a gradient.
        is_output: whether it is the output of the module.
        is_of_arguments: whether it is all arguments of the module, whose first subscript is a position or a name.
    """

    kind: str = "output"
    name: str = ""
    call: int | str | None = None
    part: str = ""
    is_gradient: bool = field(init=False, repr=False, compare=False)
    is_output: bool = field(init=False, repr=False, compare=False)
    is_of_arguments: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        spelling = spelling_of(self)  # as fields: Dynamo reads nothing else of a frozen dataclass
        object.__setattr__(self, "is_gradient", spelling.is_gradient)
        object.__setattr__(self, "is_output", spelling.is_output)
        object.__setattr__(self, "is_of_arguments", spelling.is_of_arguments)

    def __str__(self) -> str:
        return spelling_of(self).written(self)


class Words(NamedTuple):
    """What stands behind an `@`, taken apart as every port is written: `name [ "#" call ] [ "()" ] { "." part }`.

    Attributes:
        text: the whole path.
        at: where the name begins in it.
        end: where the words end in it.
        name: with the backslashes that protect special characters.
        call: the number of a call, or `"*"`, or None.
        has_brackets: whether there are brackets behind it, as behind a function.
        part: what stands behind the brackets, without its dot.
        part_at: where that begins in the text.
    """

    text: str
    at: int
    end: int
    name: str
    call: int | str | None
    has_brackets: bool
    part: str
    part_at: int


class Spelling:
    """How the ports of one kind are written.

    Attributes:
        kind: the key in the table, which is the `kind` of its ports.
        is_gradient: whether the values of its ports are gradients.
        is_output: whether they are outputs of modules.
        is_of_arguments: whether they are all arguments of modules.
        rank: when it is asked whether some words are its own: before the kinds that take what nobody else wants.
        shown: how a message says what may be written, if anything.
    """

    kind = ""
    is_gradient = False
    is_output = False
    is_of_arguments = False
    rank = 0
    shown = ""

    def read(self, words: Words) -> Port | None:
        """The port that `words` mean; None where they mean none of this kind.

        Raises:
            PathError: they mean one of this kind, but are not well written.
        """
        raise NotImplementedError  # abstract: every kind has its own

    def written(self, port: Port) -> str:
        """The text of `port` in a path, with its `@`."""
        return f"@{port.name or port.kind}"


class OutputSpelling(Spelling):
    """The output of a module, which is written as nothing; `@output` means it too."""

    kind = "output"
    is_output = True

    def read(self, words: Words) -> Port | None:
        return OUTPUT if words.name == self.kind and not words.has_brackets else None

    def written(self, port: Port) -> str:
        return ""


_spellings: dict[str, Spelling] = {"output": OutputSpelling()}
_ROOM = "nicehooks.ports"
_loaded = False


def add_spelling(spelling: Spelling) -> None:
    """Puts a kind of port into the table."""
    _spellings[spelling.kind] = spelling


def spelling_of(port: Port) -> Any:
    """The entry of the table for the kind of `port`."""
    if port.kind not in _spellings:
        _load()
    return _spellings[port.kind]


def all_spellings() -> list[Any]:
    """Every entry of the table, in the order in which they are asked."""
    _load()
    return sorted(_spellings.values(), key=lambda spelling: spelling.rank)


def _load() -> None:
    """Imports every file in the room of ports, once; see NOTE [Ports are found, not listed]."""
    global _loaded
    if _loaded:
        return
    room = importlib.import_module(_ROOM)
    for file in pkgutil.iter_modules(room.__path__, f"{_ROOM}."):
        importlib.import_module(file.name)
    _loaded = True


OUTPUT = Port()

# --- reading ----------------------------------------------------------------------------------------------------------

_AFTER_AT = re.compile(
    r"@(?P<name>(?:\\.|\w)+(?:\.(?:\\.|\w)+)*)(?:#(?P<call>[0-9]{1,18}|\*))?"
    r"(?:(?P<brackets>\(\))(?:\.(?P<part>\w+(?:\.\w+)*))?)?(?![\w.(#\\])",
    re.DOTALL,
)

CALL_OF_PORT = "a call number belongs to the module (h.3#1@input) or to a call (@softmax#1())"


def read_port(text: str, at: int) -> tuple[Port, int]:
    """The port that `text` has at `at`, and where the text goes on.

    Raises:
        PathError: something else than a port stands behind the `@`.
    """
    if text[at : at + 1] != "@":
        return OUTPUT, at
    found = _AFTER_AT.match(text, at)
    if found is None:
        raise no_port(text, at)
    if found["call"] and not found["brackets"]:
        raise fault(text, found.start("call") - 1, CALL_OF_PORT)
    call = int(found["call"]) if found["call"] and found["call"] != EVERY_CALL else found["call"]
    brackets, part = found["brackets"] is not None, found["part"] or ""
    words = Words(text, at + 1, found.end(), found["name"], call, brackets, part, found.start("part"))
    port = next((port for kind in all_spellings() if (port := kind.read(words)) is not None), None)
    if port is None:
        raise no_port(text, at)
    return port, found.end()


def no_port(text: str, at: int) -> Exception:
    """The error that says what may stand behind the `@` at `at`."""
    *first, last = [kind.shown for kind in all_spellings() if kind.shown]
    return fault(text, at + 1, f"a port is expected after @: {', '.join(first)}, or {last}")
