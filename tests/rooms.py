"""The files of the house by their rooms, what each imports, and how much of it is code."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import nicehooks

HOUSE = Path(nicehooks.__file__).parent
SOURCES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts): path.read_text()
    for path in sorted(HOUSE.rglob("*.py"))
    if path.stem != "__init__" and path.parent.name != "old_names"
}
FILES = {file: ast.parse(text) for file, text in SOURCES.items()}
"""Every file but the `__init__`s, by its dotted path behind `nicehooks.`."""

DOORS = {"hookpoints", "hooktrees"}
"""The files that hold the public names of two surfaces, and nothing else."""

ORDER = [
    "errors",
    "extras",
    "installed",
    "pictures",
    "torch_private",
    "torch_private_tensors",
    "moved",
    "values",
    "paths",
    "core",
    "ports",
    "caches",
    "contexts",
    "teaching",
    "anatomies",
    "experiments",
    "harvesting",
    "autoencoders",
    "directions",
    "servers",
    "models",
    "compat",
    "cli",
    "public",
    "doors",
]
"""From the ground up."""


def room_of(file: str) -> str:
    """The room of `file`; a file beside the rooms is one of its own."""
    room = file.split(".")[0]
    return "doors" if room in DOORS else room


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every import below `tree`, wherever it stands: the module, and the name taken from it, if any."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def neighbours(tree: ast.AST) -> set[str]:
    """The files of the house that `tree` imports from, at whatever line; "" for the package itself."""
    found: set[str] = set()
    for module, name in imports_of(tree):
        if module.split(".")[0] == "nicehooks":
            inner = module.removeprefix("nicehooks").lstrip(".")
            whole = f"{inner}.{name}".strip(".")
            found.add(whole if whole in FILES else inner)
    return found


class _WithoutTypes(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def runs(file: str) -> ast.AST:
    """What of `file` is there when it runs: not what only a type checker imports."""
    return _WithoutTypes().visit(ast.parse(SOURCES[file]))


IMPORTS = {file: neighbours(runs(file)) for file in FILES}


def closure(files: Iterable[str]) -> set[str]:
    """`files`, and what they import, and what that imports: all that a reader of `files` meets."""
    found: set[str] = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        if file in FILES and file not in found:
            found.add(file)
            todo += IMPORTS[file]
    return found


def code_lines(file: str) -> int:
    """How many lines of `file` are code: not blank, no comment, no docstring."""
    text: set[int] = set()
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(SOURCES[file].splitlines(), 1)
    return sum(1 for number, line in lines if number not in text and line.strip() and not line.lstrip().startswith("#"))


def top_level_names(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a file defines; one that only gives another file's thing its own name (`f = other.f`) does not."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            same = node.value.attr if isinstance(node.value, ast.Attribute) else ""
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            yield from (name for name in names if name != same)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from top_level_names(node.body)
            yield from top_level_names(getattr(node, "orelse", []))
