"""The tests as a house: one gallery of toy models, and no file that is too long to find something in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import SOURCES as LIBRARY
from torch import nn

TESTS = Path(__file__).parent.parent
SOURCES = {str(path.relative_to(TESTS)): path.read_text() for path in sorted(TESTS.rglob("*.py"))}
FILES = {file: ast.parse(text) for file, text in SOURCES.items()}
GALLERY = {file: tree for file, tree in FILES.items() if file.startswith("gallery/")}
TORCH = {name for name, thing in vars(nn).items() if isinstance(thing, type) and issubclass(thing, nn.Module)}


def classes_in(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def names_of_modules() -> set[str]:
    """The names of all classes, here and in the library, that are modules, directly or by another class."""
    classes = [node for tree in [*FILES.values(), *map(ast.parse, LIBRARY.values())] for node in classes_in(tree)]
    found, before = set(TORCH), 0
    while len(found) > before:
        before = len(found)
        found |= {node.name for node in classes if _has_base_in(node, found)}
    return found


def _has_base_in(node: ast.ClassDef, names: set[str]) -> bool:
    return any(ast.unparse(base).split(".")[-1] in names for base in node.bases)


MODULES = names_of_modules()


def modules_of(tree: ast.Module) -> Iterator[ast.ClassDef]:
    """The modules that a file defines at its top level."""
    yield from (node for node in tree.body if isinstance(node, ast.ClassDef) and _has_base_in(node, MODULES))


TOYS = [(file, node) for file, tree in GALLERY.items() for node in modules_of(tree)]
each_toy = pytest.mark.parametrize(("file", "toy"), TOYS, ids=[f"{Path(file).stem}.{toy.name}" for file, toy in TOYS])


def test_toy_models_stand_in_the_gallery() -> None:
    """A test file may have one inside a function, where it makes sense in that one test alone."""
    strays = {file: [node.name for node in modules_of(tree)] for file, tree in FILES.items() if file not in GALLERY}
    assert {file: names for file, names in strays.items() if names} == {}
    assert len(TOYS) > 80


def test_a_module_is_found_by_whatever_it_is_made_of() -> None:
    bases = ["nn.Module", "torch.nn.Linear", "HookedRootModule", "Mlp", "dict"]
    tree = ast.parse("\n".join(f"class C{i}({base}): pass" for i, base in enumerate(bases)))
    assert [node.name for node in modules_of(tree)] == ["C0", "C1", "C2", "C3"]
    assert list(modules_of(ast.parse("def f():\n    class C(nn.Module): pass"))) == []


@each_toy
def test_a_toy_model_says_in_a_line_what_it_is_for(file: str, toy: ast.ClassDef) -> None:
    assert len((ast.get_docstring(toy) or "").splitlines()) == 1


def test_no_toy_model_is_there_twice() -> None:
    """Under another name, or in another file."""
    found: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    for file, toy in TOYS:
        body = toy.body[1:]  # behind the docstring
        code = "\n".join(ast.unparse(node) for node in [*toy.bases, *body])
        twice += [(found[code], f"{file}: {toy.name}")] if body and code in found else []
        found[code] = f"{file}: {toy.name}"
    assert twice == []


def test_every_toy_model_is_used() -> None:
    used = {node.id for tree in FILES.values() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert [toy.name for _, toy in TOYS if toy.name not in used] == []


def test_no_file_is_too_long() -> None:
    long = {file: len(text.splitlines()) for file, text in SOURCES.items()}
    assert {file: lines for file, lines in long.items() if lines > (300 if file in GALLERY else 700)} == {}


def test_what_is_frozen_stays_so() -> None:
    """`gc.unfreeze` is of all that was ever frozen: later tests that collect garbage would each look through it all."""
    calls = {(file, ast.unparse(node)) for file, tree in FILES.items() for node in ast.walk(tree) if _is_of_gc(node)}
    assert [file for file, call in calls if call == "gc.unfreeze"] == []
    assert ("conftest.py", "gc.freeze") in calls


def _is_of_gc(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gc"
