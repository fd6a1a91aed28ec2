"""The subscripts at the end of a path, read: text such as `[1][:, -1]/12` becomes a chain.

`trees.show_step` writes a step of a chain as text again, and what it writes is read here as the same step.
"""

from __future__ import annotations

import ast
import itertools
import re
from typing import Any

from nicehooks.errors import PathError
from nicehooks.values.regions import STAR, Chain, Heads, Rows

_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_MARK = re.compile(rf"{_QUOTED.pattern}|[\[\],'\"]", re.DOTALL)
_HEADS = re.compile(r"/([0-9]{1,18})(?![0-9])")
_ROWS = re.compile(r"/rows(?!\w)")
_BY_NAME = {"*": STAR, "...": Ellipsis, "None": None}

ORDER = "one of # @ [ / is expected here, in this order"
INDEX = "an index is an integer, a slice, a quoted key, None, ..., * or a list of integers"


def fault(text: str, at: int, what: str) -> PathError:
    """The error that says what is wrong in `text`, with a caret under the place."""
    return PathError(f"{what}\n    {text}\n    {' ' * at}^")


def read_chain(text: str, at: int) -> Chain:
    """The chain that `text` has from `at` to its end.

    >>> read_chain("h[0][:, -1]", 1)
    (0, (slice(None, None, None), -1))

    Raises:
        PathError: something else than subscripts and heads is there.
    """
    chain: list[Any] = []
    while at < len(text):
        if text[at] not in "[/":
            raise fault(text, at, ORDER)
        step, at = _read_subscript(text, at) if text[at] == "[" else _read_split(text, at)
        chain.append(step)
    return tuple(chain)


def _read_split(text: str, at: int) -> tuple[Heads | Rows, int]:
    rows = _ROWS.match(text, at)
    return _read_heads(text, at) if rows is None else (Rows(), rows.end())


def _read_heads(text: str, at: int) -> tuple[Heads, int]:
    found = _HEADS.match(text, at)
    if found is None:
        raise fault(text, at + 1, "the number of heads is expected after /")
    if int(found[1]) == 0:
        raise fault(text, at + 1, "the number of heads is at least 1")
    return Heads(int(found[1])), found.end()


def _read_subscript(text: str, at: int) -> tuple[Any, int]:
    """The subscript whose bracket opens at `at`, and where the text goes on."""
    *commas, end = _commas_and_end(text, at)
    pieces = [(before + 1, after) for before, after in itertools.pairwise([at, *commas, end])]
    if not text[slice(*pieces[-1])].strip():  # behind a last comma, or in empty brackets
        pieces.pop()
    if not pieces:
        raise fault(text, at + 1, "an index is expected between the brackets")
    items = tuple([_read_item(text, begin, stop) for begin, stop in pieces])
    return items if commas else items[0], end + 1


def _commas_and_end(text: str, at: int) -> list[int]:
    """Where the bracket that opens at `at` has commas of its own, and at last where it closes."""
    commas: list[int] = []
    depth = 0
    for mark in _MARK.finditer(text, at):
        depth += (mark[0] == "[") - (mark[0] == "]")
        if depth == 0:
            return [*commas, mark.start()]
        if mark[0] in ("'", '"'):  # the rest is inside a string that does not end
            break
        if mark[0] == "," and depth == 1:
            commas.append(mark.start())
    raise fault(text, at, "this bracket is never closed")


def _read_item(text: str, begin: int, stop: int) -> Any:
    item = text[begin:stop].strip()
    at = stop - len(text[begin:stop].lstrip())
    if item in _BY_NAME:
        return _BY_NAME[item]
    if ":" in item and item[0] not in "'\"[":
        return _read_slice(text, at, item)
    try:
        return _read_value(item)
    except (ValueError, SyntaxError):
        raise fault(text, at, INDEX) from None


def _read_value(item: str) -> int | str | list[int]:
    if _QUOTED.fullmatch(item):
        return ast.literal_eval(item)
    return _read_list(item[1:-1]) if item[:1] == "[" else int(item)


def _read_list(inner: str) -> list[int]:
    numbers = inner.split(",")
    if not numbers[-1].strip():
        numbers.pop()
    return [int(number) for number in numbers]


def _read_slice(text: str, at: int, item: str) -> slice:
    try:
        bounds = [int(bound) if bound.strip() else None for bound in item.split(":")]
    except ValueError:
        raise fault(text, at, "the bounds of a slice are integers") from None
    if len(bounds) > 3:
        raise fault(text, at, "a slice has at most three parts")
    if bounds[2:] == [0]:
        raise fault(text, at, "the step of a slice is not zero")
    return slice(*bounds)
