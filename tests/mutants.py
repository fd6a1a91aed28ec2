"""Mutants of the library, sampled, each against the tests that run its line: `make mutants N=300`.

The changes are those of cosmic-ray; which tests run a line, coverage has noted (`make mutants` has them in an
environment of its own). Torch is loaded once, and each mutant is tried in a fork that loads the library anew, so that a
mutant costs its tests and no more. What no test kills is printed: it does what the line did, or a test is missing.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import secrets
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import cosmic_ray.plugins as plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from coverage import CoverageData

ROOT = Path(__file__).parent.parent
ROOMS = ("core", "values", "ports", "caches", "contexts")
AT_FIRST, IN_ALL = 60, 400
"""How many tests a mutant meets at first, and how many more where it outlives them."""
PATIENCE = 120
"""Seconds for one test, after which a mutant that makes it wait has died."""


OPERATORS = [
    f"core/{name}"
    for name in (
        "AddNot",
        "ExceptionReplacer",
        "NumberReplacer",
        "RemoveDecorator",
        "ReplaceAndWithOr",
        "ReplaceBreakWithContinue",
        "ReplaceContinueWithBreak",
        "ReplaceFalseWithTrue",
        "ReplaceOrWithAnd",
        "ReplaceTrueWithFalse",
        "ReplaceUnaryOperator_Delete_Not",
        "ReplaceUnaryOperator_USub_UAdd",
        "ZeroIterationForLoop",
        *(
            f"ReplaceBinaryOperator_{pair}"
            for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "BitOr_BitAnd", "BitAnd_BitOr")
        ),
        *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
        *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    )
]
"""One change of each kind: of eleven that turn a sum into something else, one tells as much as all."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the operator of cosmic-ray, and which of the places that it would change."""

    file: str
    line: int
    operator: str
    occurrence: int


def mutants(root: Path) -> Iterator[Mutant]:
    """All that change what runs."""
    for room in ROOMS:
        for path in sorted((root / "nicehooks" / room).glob("*.py")):
            nodes = list(ast_nodes(get_ast(path.read_text())))
            for name in OPERATORS:
                operator = plugins.get_operator(name)()
                places = [place for node in nodes for place in operator.mutation_positions(node)]
                for occurrence, ((line, _), _) in enumerate(places):
                    yield Mutant(str(path.relative_to(root)), line, name, occurrence)


def sampled(root: Path, count: int, seed: int) -> list[Mutant]:
    """Of the places, each as likely as another; then one of the changes there."""
    by_place: dict[tuple[str, int], list[Mutant]] = {}
    for mutant in mutants(root):
        by_place.setdefault((mutant.file, mutant.line), []).append(mutant)
    rng = random.Random(seed)
    places = sorted(by_place)
    rng.shuffle(places)
    chosen = (rng.choice(by_place[place]) for place in places)
    return [
        mutant for mutant, _ in zip((m for m in chosen if code_of(root, m) is not None), range(count), strict=False)
    ]


def code_of(root: Path, mutant: Mutant) -> str | None:
    """The mutated file; None where the change is in annotations or docstrings alone, or is no Python."""
    before = (root / mutant.file).read_text()
    after = mutate_code(before, plugins.get_operator(mutant.operator)(), mutant.occurrence)
    try:
        return after if after is not None and running(after) != running(before) else None
    except SyntaxError:
        return None


class WithoutNotes(ast.NodeTransformer):
    """Takes annotations and docstrings away, and `strict=` of `zip`, which says what is true in any case."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def running(code: str) -> str:
    return ast.dump(WithoutNotes().visit(ast.parse(code)))


# --- which tests ------------------------------------------------------------------------------------------------------


def tests_of(data: CoverageData, root: Path, mutant: Mutant, rng: random.Random) -> list[str]:
    """The tests that run the line of `mutant`, of many files at first; those of its file if it runs on import alone."""
    by_line = data.contexts_by_lineno(str(root / mutant.file))
    found = {test for test in by_line.get(mutant.line, []) if test}
    found = found or {test for tests in by_line.values() for test in tests if test}
    ordered = sorted(found)
    rng.shuffle(ordered)
    rank: Counter[str] = Counter()
    ranks = {}
    for test in ordered:
        file = test.partition("::")[0]
        ranks[test] = rank[file]
        rank[file] += 1
    return sorted(ordered, key=ranks.__getitem__)


def rounds(tests: list[str]) -> list[list[str]]:
    """A few at first, of few files (each has to be loaded); the rest then."""
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))[:8]
    first = [test for test in tests if test.partition("::")[0] in files][:AT_FIRST]
    then = [test for test in tests if test not in set(first)][:IN_ALL]
    return [part for part in (first, then) if part]


# --- a mutant and its tests -------------------------------------------------------------------------------------------


def is_killed(folder: Path, mutant: Mutant, tests: list[str]) -> bool:
    path = folder / mutant.file
    before, after = path.read_text(), code_of(folder, mutant)
    assert after is not None
    path.write_text(after)
    for part in rounds(tests):
        path.write_text(after)
        try:
            failed = to_failure(folder, part)
        finally:
            path.write_text(before)
        if failed:
            assert not to_failure(folder, failed), f"these fail without a mutant, too: {failed}"
            return True
    return False


def to_failure(folder: Path, tests: list[str]) -> list[str]:
    """The tests as far as the first that fails; all where none can be said to; no tests where all pass."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        run_tests(folder, tests, FirstFailure(writer))
    os.close(writer)
    name, hangs = listen(reader)
    if hangs:
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return tests[: tests.index(name) + 1] if name in tests else tests if code else []


@dataclass(frozen=True)
class FirstFailure:
    """A plugin of pytest that writes the name of a test that fails, and a dot for each part of one that does not."""

    writer: int

    def pytest_runtest_logreport(self, report: Any) -> None:
        os.write(self.writer, f"\n{report.nodeid}\n".encode() if report.failed else b".")


def listen(reader: int) -> tuple[str, bool]:
    """What `FirstFailure` has named, if anything, and whether it was not heard of for too long."""
    said, hangs = b"", False
    with open(reader, "rb", buffering=0) as file:
        while not (hangs := not select.select([file], [], [], PATIENCE)[0]) and (more := file.read(4096)):
            said += more
    return said.decode().partition("\n")[2].partition("\n")[0], hangs


def run_tests(folder: Path, tests: list[str], plugin: object) -> None:
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.dont_write_bytecode = True
    try:
        # plugins that `load` has imported along are not rewritten, which pytest warns of
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore:Module already imported"]
        code = int(pytest.main([*options, *tests], [plugin]))
    except BaseException:
        code = 1
    os._exit(code)


def load() -> None:
    """What every test needs but the library itself."""
    import torch._decomp.decompositions_for_jvp
    import torch._dynamo

    for family in ("bert", "gpt2", "llama", "mamba", "t5"):
        import_module(f"transformers.models.{family}.modeling_{family}")

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutants of the library against its tests.")
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage", help="with a context for each test")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that the coverage is of")
    parser.add_argument("--minutes", type=float, default=600, help="stop after as long")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="the first of how many parts")
    wanted = parser.parse_args()
    seed = secrets.randbelow(10**6) if wanted.seed is None else wanted.seed
    print(f"seed {seed}", flush=True)
    load()
    data = CoverageData(str(wanted.coverage))
    data.read()
    part, parts = wanted.part
    folder = Path(f"/tmp/mutants-{os.getpid()}")
    shutil.copytree(wanted.root, folder, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__"))
    end, results = time.monotonic() + 60 * wanted.minutes, Counter[str]()
    for mutant in sampled(folder, wanted.count, seed)[part::parts]:
        if time.monotonic() > end:
            break
        tests = tests_of(data, wanted.root, mutant, random.Random(seed))
        fate = "not run" if not tests else "killed" if is_killed(folder, mutant, tests) else "ALIVE"
        results[fate] += 1
        print(json.dumps([fate, mutant.file, mutant.line, mutant.operator, mutant.occurrence]), flush=True)
        if fate != "killed":
            print(change(folder, mutant), flush=True)
    shutil.rmtree(folder)
    print(dict(results))


def change(root: Path, mutant: Mutant) -> str:
    before, after = (root / mutant.file).read_text(), code_of(root, mutant) or ""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
    return "\n".join(list(lines)[2:])


if __name__ == "__main__":
    main()
