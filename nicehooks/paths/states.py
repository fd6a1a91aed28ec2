"""The graph of a pattern over module names: what each character of a name leads to.

NOTE [One graph for all alternatives]
The options of a brace are one trie: those that begin alike share the way until they differ, so that reading a character
costs the same for two options and for ten thousand. Whatever has a wildcard begins with a state of its own, so nothing
that is added later changes what it means.
"""

from __future__ import annotations

import re

from nicehooks.paths.names import unescape

_TOKEN = re.compile(r"\\.?|\*|[^\\*]+", re.DOTALL)
INSIDE = "?"
"""What stands beside a text in the place of a dot (or of nothing): it begins or ends in the middle of a segment."""


class State:
    """How far a name has been read.

    Attributes:
        chars: where each character leads.
        other: where every character but a dot leads, too, if anywhere.
        segment: where by way of `other` a whole segment leads, whatever it is, if that is known.
        free: where it goes on without a character, and the option of a brace that is at its end there.
        accepts: whether a name may end here.
    """

    __slots__ = ("_literal", "accepts", "chars", "free", "other", "segment")

    def __init__(self) -> None:
        self.chars: dict[str, State] = {}
        self.other: State | None = None
        self.segment: State | None = None
        self.free: list[tuple[State, int | None]] = []
        self.accepts = False
        self._literal: tuple[str, State] | bool | None = None

    @property
    def literal(self) -> tuple[str, State] | None:
        """The only segment that may follow, and where it leads; None if there may be several."""
        if self._literal is None:
            self._literal = self._find_literal() or False
        return self._literal or None  # type: ignore[return-value]

    def _find_literal(self) -> tuple[str, State] | None:
        text, state = "", self
        while state.other is None and not state.free:
            if not state.chars or list(state.chars) == ["."]:
                return text, state
            if state.accepts or len(state.chars) > 1:
                return None
            ((char, state),) = state.chars.items()
            text += char
        return None

    def then(self, char: str) -> State:
        """Where `char` leads; from now on it leads somewhere."""
        return self.chars.setdefault(char, State())

    def freely(self) -> State:
        """A new state that is reached from here without a character."""
        state = State()
        self.free.append((state, None))
        return state


def graph_of(parts: list[str], options: list[list[str]]) -> State:
    """The first state of the pattern with these `options` in the braces between these `parts`."""
    parts, options, lefts = _with_dots(parts, options)
    first = state = State()
    for number, texts in enumerate(options):
        state = _add_text(state, parts[number], lefts[number], INSIDE)
        left = parts[number][-1:] or lefts[number]
        is_last = number == len(options) - 1 and not parts[-1]
        right = "" if is_last else "." if parts[number + 1][:1] == "." else INSIDE
        state = _add_options(state, texts, left, right)
    _add_text(state, parts[-1], lefts[-1], "").accepts = True
    return first


def _with_dots(parts: list[str], options: list[list[str]]) -> tuple[list[str], list[list[str]], list[str]]:
    """`{**,a}.b` as `{**.,a.}b`: a `**` may stand for no segment, and then its dot is none either.

    Also what stands before each of the parts.
    """
    parts, options, lefts = [*parts], [*options], ["", *[INSIDE] * len(options)]
    for number, texts in enumerate(options):
        if parts[number + 1][:1] == "." and any(text.split(".")[-1] == "**" for text in texts):
            options[number] = [f"{text}." for text in texts]
            parts[number + 1] = parts[number + 1][1:]
            lefts[number + 1] = "."
    return parts, options, lefts


def _add_options(state: State, texts: list[str], left: str, right: str) -> State:
    after = State()
    for number, text in enumerate(texts):
        _add_text(state, text, left, right).free.append((after, number))
    return after


def _add_text(state: State, text: str, left: str, right: str) -> State:
    """Adds `text`, without braces, behind `state`, and gives the state at its end."""
    first, *others = text.split(".")
    swallowed = False
    state, swallowed = _add_segment(state, first, left, "." if others else right)
    for number, segment in enumerate(others, 1):
        state = state if swallowed else state.then(".")
        state, swallowed = _add_segment(state, segment, ".", "." if number < len(others) else right)
    return state


def _add_segment(state: State, segment: str, left: str, right: str) -> tuple[State, bool]:
    """The state at the end of `segment`; and whether a dot behind it is read there already."""
    whole = left != INSIDE and right != INSIDE
    if segment == "**" and whole and right == ".":
        return _add_segments(state), True
    if segment == "**" and whole:
        return _add_rest(state, or_nothing=left == ""), False
    if segment == "*" and whole:
        state = state.freely()
        state.other = state.segment = end = State()
        end.other = end
        return end, False
    for token in _TOKEN.findall(segment):
        if token == "*":
            state = state.freely()
            state.other = state
            continue
        for char in unescape(token):
            state = state.then(char)
    return state, False


def _add_segments(state: State) -> State:
    """`**.`: any number of segments, each with its dot."""
    state = state.freely()
    state.other = state.segment = inside = State()
    inside.other = inside
    inside.chars["."] = state
    return state


def _add_rest(state: State, or_nothing: bool) -> State:
    """`**` at the end: one or more segments; as a whole pattern, the empty name too."""
    state = state.freely()
    state.other = state.segment = inside = State()
    inside.other = inside.segment = inside
    inside.chars["."] = inside
    end = inside.freely()
    if or_nothing:
        state.free.append((end, None))
    return end
