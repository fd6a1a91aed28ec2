"""Module names as text: which characters are protected, and what stands in braces."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nicehooks.torch_private import evaluated_while_tracing

_SPECIAL = re.compile(r"[#@\[\]/{},*\\]|^\s|\s\Z")
ESCAPED = re.compile(r"\\(.?)", re.DOTALL)
_BRACES = re.compile(r"((?:\\.|[^\\{}])*)\{((?:\\.|[^\\{}])*)\}", re.DOTALL)
_OPTION = re.compile(r"((?:\\.|[^\\,])*),", re.DOTALL)
RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


@evaluated_while_tracing
def escape(name: str) -> str:
    """`name` with a backslash before each character that the path language gives a meaning."""
    return _SPECIAL.sub(r"\\\g<0>", name)


def unescape(text: str) -> str:
    """`text` without the backslashes that protect special characters."""
    return ESCAPED.sub(r"\1", text)


def in_braces(text: str) -> tuple[list[str], list[list[str]]]:
    """The text before, between and behind the braces in `text`, and the different options in each."""
    parts: list[str] = []
    options: list[list[str]] = []
    at = 0
    while (braces := _BRACES.match(text, at)) is not None:
        parts.append(braces[1])
        options.append(list(dict.fromkeys(_options(braces[2]))))
        at = braces.end()
    return [*parts, text[at:]], options


def _options(text: str) -> Iterator[str]:
    for written in _OPTION.findall(f"{text},"):
        option = _stripped(written)
        numbers = RANGE.fullmatch(option)
        yield from [option] if numbers is None else map(str, range(int(numbers[1]), int(numbers[2]) + 1))


def _stripped(option: str) -> str:
    """`option` without blanks around it; one that a backslash protects belongs to it."""
    bare = option.strip()
    is_protected = (len(bare) - len(bare.rstrip("\\"))) % 2
    return option.lstrip()[: len(bare) + is_protected]
