"""What the library says, read from its source: the text of every error and warning, with … where a value stands."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter

HOUSE = Path(__file__).parent.parent / "nicehooks"
OPEN = "…"
"""A part of a text that only a run can tell."""

PYTHONS = {"AttributeError", "TypeError", "ValueError"}


@dataclass
class Source:
    """Everything in the library by its name.

    Attributes:
        constants: the module-level assignments.
        attributes: what classes set an attribute to.
        functions: the functions and methods of a name.
        kinds: the names of the errors and warnings.
    """

    constants: dict[str, ast.expr] = field(default_factory=dict)
    attributes: dict[str, list[ast.expr]] = field(default_factory=dict)
    functions: dict[str, list[ast.FunctionDef]] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)


@cache
def source() -> Source:
    found, bases = Source(kinds={"NiceHooksError", "NiceHooksWarning"}), dict[str, set[str]]()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
                for name, value in _assignments(node.body):
                    found.attributes.setdefault(name, []).append(value)
        found.constants |= dict(_assignments(tree.body))
    for _ in bases:
        found.kinds |= {name for name, of in bases.items() if of & found.kinds}
    return found


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and node.value is not None:
                yield target.id, node.value


@cache
def trees() -> dict[Path, ast.Module]:
    return {file.relative_to(HOUSE): ast.parse(file.read_text()) for file in sorted(HOUSE.rglob("*.py"))}


@cache
def scopes() -> dict[ast.AST, Path]:
    """Every file and function, and the file that it is in."""
    return {
        scope: file
        for file, tree in trees().items()
        for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)))
    }


# --- where something is said ------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Message:
    """A text, and the kind of the error or warning that says it."""

    kind: str
    text: str


def messages() -> dict[Message, str]:
    """Every message, and where it is said."""
    found: dict[Message, str] = {}
    for scope, file in scopes().items():
        for kind, text, line in said_in(scope):
            found.setdefault(Message(kind, text), f"{file}:{line}")
    return found


def said_in(scope: ast.AST) -> Iterator[tuple[str, str, int]]:
    for node in _own(scope):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = _name(node.func)
        if name in source().kinds | PYTHONS and not name.startswith("_"):
            kind, said = name, node.args[0]
        elif name in ("warn_caller", "warn") and len(node.args) > 1 and _name(node.args[1]) in source().kinds:
            kind, said = _name(node.args[1]), node.args[0]
        else:
            continue
        for text in texts(said, scope):
            # without a letter, it hands on what is said elsewhere; with a field, it is a template that a subclass fills
            if any(letter.isalpha() for letter in text) and "!r}" not in text:
                yield kind, text, node.lineno


@cache
def _own(scope: ast.AST) -> list[ast.AST]:
    """What is in `scope`, but not in a function inside of it."""
    found: list[ast.AST] = []
    todo = [scope]
    while todo:
        inside = [child for child in ast.iter_child_nodes(todo.pop()) if not isinstance(child, ast.FunctionDef)]
        found += inside
        todo += inside
    return found


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


# --- what it says -----------------------------------------------------------------------------------------------------


def texts(node: ast.expr | None, scope: ast.AST, seen: frozenset[str] = frozenset()) -> list[str]:
    """All that an expression may say; `seen` are the functions that it was followed through."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return _joined([texts(part, scope, seen) for part in parts])
        case ast.FormattedValue(value=ast.Name() | ast.Call() as value) if _says_more(value, scope):
            return [text for text in texts(value, scope, seen) if _is_sentence(text)] or [OPEN]
        case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[ast.List(elts=lines)]):
            return ["\n".join(choice) for choice in itertools.product(*[texts(line, scope, seen) for line in lines])]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined([texts(left, scope, seen), texts(right, scope, seen)])
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts(body, scope, seen), *texts(orelse, scope, seen)]
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            return ["".join(_filled(text)) for text in texts(template, scope, seen)]
        case ast.Call(func=ast.Name(id="explained"), args=[ast.Constant(value=str(topic)), *_]):
            return _returned(topic.rpartition(".")[2], seen) or [OPEN]
        case ast.Call(func=function) if _name(function) not in seen:
            return _returned(_name(function), seen | {_name(function)}) or [OPEN]
        case ast.Name(id=name) if name in source().constants:
            return texts(source().constants[name], scope, seen)
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in source().attributes:
            return [text for value in source().attributes[name] for text in texts(value, scope, seen) if text] or [OPEN]
        case ast.Name(id=name) if name not in seen:
            return _assigned(name, scope, seen) or _given(name, scope, seen) or [OPEN]
        case _:
            return [OPEN]


def _joined(parts: list[list[str]]) -> list[str]:
    return ["".join(choice) for choice in itertools.islice(itertools.product(*parts), 64)]


def _filled(template: str) -> Iterator[str]:
    for literal, name, _, _ in Formatter().parse(template):
        yield literal
        if name is not None:
            yield OPEN


def _says_more(value: ast.Name | ast.Call, scope: ast.AST) -> bool:
    """Whether a value inside of a text is text of ours itself, and not what a caller gave."""
    is_given = isinstance(value, ast.Name) and value.id in _parameters(scope)
    return not is_given or any(isinstance(node, ast.Return) and _is_error(node.value) for node in _own(scope))


def _is_error(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in source().kinds


def _is_sentence(text: str) -> bool:
    return len(text.replace(OPEN, " ").split()) >= 4


def _returned(name: str, seen: frozenset[str]) -> list[str]:
    """What the library's own function of this name gives back, where it gives text."""
    functions = source().functions.get(name, [])
    returns = [(node.value, of) for of in functions for node in _own(of) if isinstance(node, ast.Return)]
    return [text for value, of in returns for text in texts(value, of, seen) if text != OPEN]


def _assigned(name: str, scope: ast.AST, seen: frozenset[str]) -> list[str]:
    """What a variable of `scope` is set to, and what is added to it behind."""
    found: list[str] = []
    for node in _own(scope):
        if isinstance(node, ast.Assign) and any(_name(target) == name for target in node.targets):
            found += texts(node.value, scope, seen | {name})
        elif isinstance(node, ast.AugAssign) and _name(node.target) == name:
            found += [OPEN + text for text in texts(node.value, scope, seen | {name}) if text != OPEN]
    return found


def _given(name: str, scope: ast.AST, seen: frozenset[str]) -> list[str]:
    """What the callers of the function `scope` give for its parameter."""
    names = _parameters(scope)
    if name not in names or not isinstance(scope, ast.FunctionDef) or scope.name in seen:
        return []
    at = names.index(name) - (names[0] == "self")
    found: list[str] = []
    for call, of in calls().get(scope.name, []):
        # another file may have another private function of this name
        if not scope.name.startswith("_") or scopes()[of] == scopes()[scope]:
            found += _argument(call, of, name, at, seen | {scope.name})
    return found


def _argument(call: ast.Call, of: ast.AST, name: str, at: int, seen: frozenset[str]) -> list[str]:
    named = [keyword.value for keyword in call.keywords if keyword.arg == name]
    given = named or call.args[at : at + 1]
    return [text for value in given for text in texts(value, of, seen) if text != OPEN]


def _parameters(scope: ast.AST) -> list[str]:
    if not isinstance(scope, ast.FunctionDef):
        return []
    return [parameter.arg for parameter in (*scope.args.args, *scope.args.kwonlyargs)]


@cache
def calls() -> dict[str, list[tuple[ast.Call, ast.AST]]]:
    """The calls of what has a name, and the functions that they are in."""
    found: dict[str, list[tuple[ast.Call, ast.AST]]] = {}
    for scope in scopes():
        for node in _own(scope):
            if isinstance(node, ast.Call):
                found.setdefault(_name(node.func), []).append((node, scope))
    return found


# --- the page that shows them -----------------------------------------------------------------------------------------

PAGE = HOUSE.parent / "docs" / "errors.md"
HEADING = "## Every message\n"


def section() -> str:
    """The last section of the page: every message, under the names of those that say it."""
    kinds: dict[str, list[str]] = {}
    for message in sorted(messages()):
        kinds.setdefault(message.text, []).append(message.kind)
    by_kind: dict[str, list[str]] = {}
    for text, names in kinds.items():
        by_kind.setdefault(", ".join(f"`{name}`" for name in names), []).append(text)
    blocks = [f"{names}\n\n```text\n" + "\n\n".join(by_kind[names]) + "\n```\n" for names in sorted(by_kind)]
    return "\n".join([HEADING, INTRODUCTION, *blocks])


INTRODUCTION = """\
What the library can say, word for word, with … where a name or a value stands. `make messages` writes this list from
the source, and a test holds it against the source.
"""


def rest() -> str:
    """The page up to that section."""
    return PAGE.read_text().partition(HEADING)[0]


if __name__ == "__main__":
    PAGE.write_text(f"{rest().rstrip()}\n\n{section()}")
