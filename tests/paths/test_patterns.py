"""Patterns over module names: what they match, against regular expressions, and that no pattern is tried twice."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nicehooks import ActivationCache, PathError, SiteNotFound, select
from nicehooks.paths import patterns
from nicehooks.paths.patterns import Pattern

SEGMENTS = {
    "a": ["a"],
    "ab": ["ab"],
    "*": ["*"],
    "**": ["**"],
    "a*": ["a*"],
    "*b*": ["*b*"],
    "{a,b}": ["a", "b"],
    "{ab,a}b": ["abb", "ab"],
    "{a,b}*": ["a*", "b*"],
    "{9..11}": ["9", "10", "11"],
    "{**,a}": ["**", "a"],
    "{b.a, a}": ["b.a", "a"],
    "{a,a}": ["a"],
    "x{,y}": ["x", "xy"],
    "\\*": ["\\*"],
}
"""Each with the alternatives that it stands for."""


def regex(option: str) -> str:
    """What one alternative means, as a regular expression."""
    if option == "**":
        return ".*"
    *parents, last = option.split(".")
    before = "".join(r"([^.]+\.)*" if parent == "**" else segment(parent) + r"\." for parent in parents)
    return before + (".+" if last == "**" else segment(last))


def segment(text: str) -> str:
    if text == "*":
        return "[^.]+"
    return "".join("[^.]*" if part == "*" else re.escape(part[-1:]) for part in re.findall(r"\\.|.", text))


names = st.lists(st.sampled_from(["a", "b", "ab", "abb", "9", "10", "11", "x", "xy", "*", "bab"]), max_size=4)


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(SEGMENTS)), min_size=1, max_size=4), names)
def test_a_pattern_matches_what_its_alternatives_match(segments: list[str], name: list[str]) -> None:
    pattern, text = Pattern(".".join(segments)), ".".join(name)
    options = [".".join(option) for option in itertools.product(*(SEGMENTS[segment] for segment in segments))]
    assert [pattern.text(choice) for choice in pattern.choices()] == options
    matched = [pattern.text(choice) for choice in pattern.matched(text)]
    assert matched == [option for option in options if re.fullmatch(regex(option), text)]


def tower(width: int) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Identity()) for _ in range(width)])


WORK = {
    "{0..9999}.{0..9999}.b": "0.0.b",
    ".".join(["**"] * 12) + ".z": ".".join(["**"] * 12) + ".z",
    "*a" * 20 + "b": "*a" * 20 + "b",
    "{0..9999}": "20",
    ".".join(["{0..9999}"] * 6): "0.0.0.0.0.0",
}
"""Patterns, and which of their alternatives is the first to match nothing in a tower of 20."""


@pytest.mark.parametrize("path", WORK)
def test_the_work_of_matching_is_that_of_one_walk(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant number of states for each character, and the alternative that fails is said."""
    work = 0
    closed = Pattern._closed

    def counting(self: Pattern, reading: object) -> object:
        nonlocal work
        found = closed(self, reading)
        work += len(found)
        return found

    monkeypatch.setattr(Pattern, "_closed", counting)
    with pytest.raises(SiteNotFound) as caught:
        select(tower(20), path)
    assert str(caught.value).startswith(f"no module matches {WORK[path]!r} in Sequential.")
    assert work < 41 * 8 * (path.count(".") + path.count("*") + 4)


def test_many_alternatives_are_all_found_in_their_order() -> None:
    found = [str(site) for site in select(tower(300), "{299,0..298}.0")]
    assert found == ["299.0", *(f"{n}.0" for n in range(299))]


def test_a_range_costs_no_more_than_the_names_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    along = Pattern.along

    def counting(self: Pattern, *args: object) -> object:
        nonlocal steps
        steps += 1
        return along(self, *args)

    monkeypatch.setattr(Pattern, "along", counting)
    assert len(select(tower(500), "{0..499}.0")) == 500
    assert steps <= 1000


def test_braces_that_multiply_the_ways_to_match_are_refused() -> None:
    """2^20 combinations of options match the same name."""
    model = nn.Sequential()
    model.add_module("a" * 60, nn.ReLU())
    with pytest.raises(PathError, match="overlap"):
        select(model, "{a,aa}*" * 20)
    assert len(select(model, "{a,aa}*" * 4)) == 1
    assert patterns.OVERLAP > 1


def test_matching_in_a_cache_enumerates_no_combinations() -> None:
    cache = ActivationCache({f"{n}.{m}": n for n in range(10) for m in range(10)})
    assert list(cache.select("{0..9}.{9..9}")) == [f"{n}.9" for n in range(10)]
    with pytest.raises(SiteNotFound, match=r"'0\.10' is not in this cache"):
        cache.select("{0..9999}.{0..9999}")
    with pytest.raises(SiteNotFound, match=r"'0\.0\.0\.0\.0'"):
        cache.select(".".join(["{0..9999}"] * 5))
