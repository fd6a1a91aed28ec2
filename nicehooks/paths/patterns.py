"""Which module names a pattern matches: one walk along the name, whatever its wildcards and braces.

NOTE [One walk, no backtracking]
Reading a name is keeping the set of states that its characters lead to, so nothing is tried twice. Names are read one
segment after the other: who walks through a model carries the set along, and leaves out what no name leads to.

NOTE [Choices]
Behind a brace, a state is paired with the numbers of the options that led to it, its choice. So one walk tells which
combination of options each name belongs to, and nobody enumerates all combinations: there may be 10^8. Options with
wildcards can match one name in as many ways as there are combinations; beyond `OVERLAP` the pattern is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache

from nicehooks.errors import PathError
from nicehooks.paths.names import in_braces
from nicehooks.paths.states import State, graph_of

Choice = tuple[int, ...]
"""Which option of each brace, by its number among the different ones."""

Reading = tuple[tuple[State, Choice], ...]
"""The states that a name has led to so far, each with the choice on the way; empty where no name goes on so."""

OVERLAP = 64
"""In how many ways, on average, a name may go through one state, once there are more than a thousand."""


class Pattern:
    """A pattern over module names.

    >>> pattern = Pattern.of("h.{0..2}.*")
    >>> pattern.matched("h.1.attn"), pattern.matched("h.3.attn")
    ([(1,)], [])
    >>> pattern.text((1,))
    'h.1.*'

    Attributes:
        parts: the text before, between and behind the braces.
        options: the different options of each brace.
        start: where reading a name begins.
    """

    def __init__(self, text: str) -> None:
        self._shown = text
        self.parts, self.options = in_braces(text)
        self.start: Reading = self._closed([(graph_of(self.parts, self.options), ())])

    @staticmethod
    @lru_cache(maxsize=256)
    def of(text: str) -> Pattern:
        """The pattern that `text` is."""
        return Pattern(text)

    def text(self, choice: Choice) -> str:
        """The pattern with these options in the place of the braces."""
        chosen = [options[number] for options, number in zip(self.options, choice, strict=True)]
        return "".join([*itertools.chain(*zip(self.parts, chosen, strict=False)), self.parts[-1]])

    def choices(self) -> Iterator[Choice]:
        """Every combination of options, in order; there may be very many."""
        return itertools.product(*[range(len(options)) for options in self.options])

    def matched(self, name: str) -> list[Choice]:
        """The combinations of options that `name` belongs to, in order."""
        reading = self.start
        if name:
            for number, segment in enumerate(name.split(".")):
                reading = self.along(self.dotted(reading) if number else reading, segment)
                if not reading:
                    return []
        return sorted(self.accepted(reading))

    # reading a name bit by bit

    def accepted(self, reading: Reading) -> list[Choice]:
        """The combinations of options whose names end here."""
        return list(dict.fromkeys([choice for state, choice in reading if state.accepts]))

    def dotted(self, reading: Reading) -> Reading:
        """Where a dot leads."""
        return self._stepped(reading, ".")

    def along(self, reading: Reading, segment: str) -> Reading:
        """Where a whole segment leads from its beginning."""
        ends: list[tuple[State, Choice]] = []
        running: list[tuple[State, Choice]] = []
        for state, choice in reading:
            literal = state.literal
            if literal is not None:
                ends += [(literal[1], choice)] if literal[0] == segment else []
            elif state.segment is None:
                running.append((state, choice))
            else:
                ends.append((state.segment, choice))
                if segment[:1] in state.chars:
                    begun = self._closed([(state.chars[segment[:1]], choice)])
                    ends += self._run(begun, segment[1:])
        return self._closed([*ends, *self._run(tuple(running), segment)])

    def only_segment(self, reading: Reading) -> str | None:
        """The only segment that may follow; empty where none may, None where there may be several."""
        ways = [state.literal for state, _ in reading if state.chars or state.other is not None]
        segments = {None if way is None else way[0] for way in ways} or {""}
        return segments.pop() if len(segments) == 1 else None

    def _run(self, reading: Reading, text: str) -> Reading:
        for char in text:
            if not reading:
                break
            reading = self._stepped(reading, char)
        return reading

    def _stepped(self, reading: Reading, char: str) -> Reading:
        found: list[tuple[State, Choice]] = []
        for state, choice in reading:
            if char in state.chars:
                found.append((state.chars[char], choice))
            if state.other is not None and char != ".":
                found.append((state.other, choice))
        return self._closed(found) if found else ()

    def _closed(self, reading: Iterable[tuple[State, Choice]]) -> Reading:
        """`reading`, and what is reached from there without a character."""
        found = dict.fromkeys(reading)
        queue = list(found)
        for state, choice in queue:
            for after, option in state.free:
                pair = (after, choice if option is None else (*choice, option))
                if pair not in found:
                    found[pair] = None
                    queue.append(pair)
        if len(queue) > 1000 and len(queue) > OVERLAP * len({state for state, _ in queue}):
            raise PathError(OVERLAPPING.format(path=self._shown))
        return tuple(queue)


OVERLAPPING = (
    "the alternatives in these braces overlap: one name is matched in thousands of ways\n"
    "    {path}\n"
    "  Write the braces without a *, or a list of paths."
)
