"""The rooms of the house: what each may import, how much there is to read, and that no name means two things."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from graphlib import TopologicalSorter

import pytest
from rooms import FILES, HOUSE, IMPORTS, ORDER, SOURCES, closure, code_lines, room_of, top_level_names

import nicehooks

ROOMS = [room for room in ORDER if any(room_of(file) == room for file in FILES)]
PAGE = (HOUSE.parent / "docs" / "house.md").read_text()


def files_of(room: str) -> set[str]:
    return {file for file in FILES if room_of(file) == room}


def rooms_below(room: str) -> set[str]:
    """The rooms that the files of `room` import from; "" for the package itself."""
    return {room_of(other) for file in files_of(room) for other in IMPORTS[file]} - {room}


# --- imports go down --------------------------------------------------------------------------------------------------


def test_every_file_stands_in_a_room_that_has_its_place() -> None:
    assert {room_of(file) for file in FILES} <= set(ORDER)
    assert len(ROOMS) >= 14


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_below_it(room: str) -> None:
    """At whatever line the import stands. Only the command uses the package by its public names."""
    allowed = set(ORDER[: ORDER.index(room)]) | ({""} if room == "cli" else set())
    assert rooms_below(room) <= allowed


@pytest.mark.parametrize("room", ROOMS)
def test_the_files_of_a_room_import_each_other_in_no_circle(room: str) -> None:
    files = files_of(room)
    order = list(TopologicalSorter({file: IMPORTS[file] & files for file in files}).static_order())
    assert set(order) == files


@pytest.mark.parametrize("room", ["core", "caches", "contexts"])
def test_these_rooms_know_no_port_by_its_name(room: str) -> None:
    assert [file for file in sorted(files_of(room)) if any(room_of(other) == "ports" for other in IMPORTS[file])] == []


def test_no_port_is_told_by_its_kind() -> None:
    """What a port is like, it says itself: see NOTE [Ports are found, not listed]."""
    found = [f"{file}:{line}" for file, tree in FILES.items() for line in asks_for_kind(tree)]
    assert found == []


def asks_for_kind(tree: ast.AST) -> list[int]:
    """The lines that compare the kind of a port with something written out, or look how it begins or ends."""
    found: list[int] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            written = any(isinstance(part, ast.Constant | ast.Tuple | ast.Set | ast.List) for part in sides)
            found += [node.lineno] if written and any(map(_is_kind_of_port, sides)) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            about = node.func.attr in ("startswith", "endswith") and _is_kind_of_port(node.func.value)
            found += [node.lineno] if about else []
        elif isinstance(node, ast.Match) and _is_kind_of_port(node.subject):
            found.append(node.lineno)
    return found


def _is_kind_of_port(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "kind" and "port" in ast.unparse(node.value).lower()


@pytest.mark.parametrize(
    "line",
    [
        "site.path.port.kind == 'grad'",
        "'input' != port.kind",
        "path.port.kind in ('grad', 'input.grad')",
        "port.kind not in {'grad'}",
        "port.kind.startswith('input')",
        "self.port.kind.endswith('grad')",
        "match port.kind:\n    case 'grad': pass",
    ],
)
def test_a_test_of_the_kind_is_found(line: str) -> None:
    assert asks_for_kind(ast.parse(line)) == [1]


# --- how much there is to read ----------------------------------------------------------------------------------------

LONG = {
    "caches.cache": "one class, whose methods are its public face",
    "contexts.capturing": "the shortest way from an output to a cache stands beside the long one",
    "contexts.changes": "edit and the verbs that are made of it, with their docstrings",
    "contexts.intervention": "the life of a context is told in one place",
    "core.selection": "names, sites and the messages that say the nearest names",
    "core.sessions": "who is active, in eager and in traced code, which must agree line by line",
    "core.tap": "the tap and its binding, where the shortest way through it is written out",
    "ports.calls": "the calls of functions and of methods, which share their rule",
    "values.nodes": "each sort of container, taken apart and put together",
    "torch_private_tensors": "every touch of a private API of torch that works on tensors, each with its date",
}
"""Files outside of `compat` with more than 300 lines, and why; each is to be shorter one day."""


def test_a_file_has_at_most_300_lines() -> None:
    long = {file for file, text in SOURCES.items() if room_of(file) != "compat" and len(text.splitlines()) > 300}
    assert long - set(LONG) == set()


READING = 2500
"""How many lines of code one reads at most to understand an intervention, from the errors up."""


def reading(*files: str) -> int:
    met = closure(files)
    print(*(f"{code_lines(file):6}  {file}" for file in sorted(met, key=code_lines, reverse=True)), sep="\n")
    total = sum(map(code_lines, met))
    print(f"{total:6}  in {len(met)} files")
    return total


def test_an_intervention_can_be_read_from_the_errors_up() -> None:
    assert reading("contexts.intervention") <= READING


def test_lines_of_code_are_counted_without_words() -> None:
    assert code_lines("core.register") < len(SOURCES["core.register"].splitlines()) / 2


# --- names ------------------------------------------------------------------------------------------------------------


def defined_twice() -> dict[str, list[str]]:
    """The top-level names that two files define, with the files."""
    places: dict[str, list[str]] = {}
    for file, tree in FILES.items():
        for name in dict.fromkeys(top_level_names(tree.body)):
            places.setdefault(name, []).append(file)
    return {name: files for name, files in places.items() if len(files) > 1 and name != "__all__"}


def test_no_top_level_name_means_two_things() -> None:
    assert defined_twice() == {}


def test_no_public_name_hides_a_room() -> None:
    """`import nicehooks.x` and `nicehooks.x` would be two things."""
    inside = {path.stem for path in HOUSE.iterdir()}
    assert inside & set(nicehooks.__all__) == set()


# --- the map ----------------------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| `(\w+)[^`]*`[^|]*\|[^|]*\|([^|]*)\|$", re.MULTILINE)


def test_the_map_shows_what_each_room_imports() -> None:
    shown = {room: set(re.findall(r"`(\w+)`", below)) for room, below in ROW.findall(PAGE)}
    there = {room: rooms_below(room) - {""} for room in ROOMS if room != "doors"}
    doors = {door: {room_of(other) for other in IMPORTS[door]} for door in sorted(files_of("doors"))}
    assert shown == {**there, **doors}
    assert list(shown) == [*there, *doors]


@pytest.mark.parametrize("room", sorted({path.parent for path in HOUSE.rglob("__init__.py")} - {HOUSE}))
def test_a_room_says_in_a_few_lines_what_it_knows(room: object) -> None:
    name = ".".join(["nicehooks", *room.relative_to(HOUSE).parts])  # type: ignore[attr-defined]
    text = inspect.cleandoc(importlib.import_module(name).__doc__ or "")
    assert "Knows" in text or "needs" in text
    assert len(text.splitlines()) <= 5
