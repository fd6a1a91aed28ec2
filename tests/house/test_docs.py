"""Every example runs: in README and docs, page by page, and in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import nicehooks
from nicehooks.anatomies.anatomy import FAMILIES
from nicehooks.paths import ports

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = {"python", "pycon"}
NOT_RUN = {"console", "text", "toml", "yaml", "json", "make", "bibtex", "mermaid"}

FENCE = re.compile(r"^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page, and the line of the page that its text begins at."""

    language: str
    text: str
    line: int


def blocks_of(page: str) -> Iterator[Block]:
    for found in FENCE.finditer(page):
        yield Block(found["language"].strip(), found["text"], page.count("\n", 0, found.start("text")) + 1)


def run_block(block: Block, names: dict[str, Any], file: str) -> None:
    """Runs a block in the namespace `names`; a failure names the line of the page."""
    if re.search(r"^>>> ", block.text, re.MULTILINE):
        test = doctest.DocTestParser().get_doctest(block.text, names, file, file, block.line - 1)
        test.globs = names  # not a copy: what a block defines, the next ones know
        run_doctest(test)
    else:
        exec(compile("\n" * (block.line - 1) + block.text, file, "exec", dont_inherit=True), names)


def run_doctest(test: doctest.DocTest) -> None:
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append, clear_globs=False)
    assert not failed, "".join(said)


def run_page(page: str, file: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language in RUN:
            run_block(block, names, file)


def page_param(page: Path) -> Any:
    takes_long = re.search(r"load_default|from_pretrained|torch\.compile\(", page.read_text())
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if takes_long else [])


@pytest.fixture(autouse=True)
def own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page may add a port of its own, which no other test is to know."""
    known = {spelling.kind: spelling for spelling in ports.all_spellings()}
    monkeypatch.setattr(ports, "_spellings", known)


@pytest.fixture(autouse=True)
def own_families() -> Iterator[None]:
    """A page may describe a class of torch's, of which other tests ask what is found."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


# --- README and docs --------------------------------------------------------------------------------------------------

each_page = pytest.mark.parametrize("page", [page_param(page) for page in PAGES])


@each_page
def test_the_examples_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace; blocks with prompts show their output."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()  # how often code was compiled before is no matter of the page
    run_page(page.read_text(), str(page))


@each_page
def test_every_block_says_what_it_is(page: Path) -> None:
    """So that no example escapes by a misspelt language, or by a fence that is never closed."""
    text = page.read_text()
    assert [block for block in blocks_of(text) if block.language not in RUN | NOT_RUN] == []
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(list(blocks_of(text)))


def test_readme_and_docs_have_examples() -> None:
    names = {page.name for page in PAGES if any(block.language in RUN for block in blocks_of(page.read_text()))}
    assert "README.md" in names
    assert len(names) >= 4  # README, the tutorial, the path language, the laws


@each_page
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", FENCE.sub("", page.read_text()))
    assert [target for target in targets if not (page.parent / target).exists()] == []


NAMED = re.compile(r"[\w./*{}-]*\w\.py\b")
RECIPE = "nicehooks/ports/training.py"  # which docs/house.md adds


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_file_of_python_that_a_page_names_is_there(page: Path) -> None:
    """From the root of the repository, or by the end of its path; a star stands for several."""
    named = set(NAMED.findall(re.sub(r"\]\([^)]*\)", "]", page.read_text())))
    assert [name for name in sorted(named - {RECIPE}) if not is_there(name)] == []
    assert not is_there(RECIPE)


def is_there(name: str) -> bool:
    return any(True for folder in ("nicehooks", "tests", "benchmarks", "docs") for _ in whole_paths(folder, name))


def whole_paths(folder: str, name: str) -> Iterator[Path]:
    """The files of `folder` whose path ends in `name`; the modules under old names are no files to read."""
    for file in (ROOT / folder).rglob(Path(name).name):
        if file.parent.name != "old_names" and file.match(name):
            yield file


CITED = re.compile(r"NOTE\s+\[([^\]]+)\]")
NOTE = re.compile(r"^[# ]*NOTE \[([^\]]+)\]$", re.MULTILINE)


def test_every_note_that_is_cited_is_there() -> None:
    """A note begins with its name, alone on a line."""
    texts = [path.read_text() for path in [*PAGES, *sorted((ROOT / "nicehooks").rglob("*.py"))]]
    cited = {" ".join(name.replace("#", "").split()) for text in texts for name in CITED.findall(text)}
    notes = {name for text in texts for name in NOTE.findall(text)}
    assert sorted(cited - notes) == []
    assert len(notes) > 20


# --- the runner itself ------------------------------------------------------------------------------------------------

PAGE = """\
# A page

```python
x = 1
def double(y):
    return 2 * y
```

```console
$ this is not run
```

```python
>>> double(x)
2
>>> z = double(3)
```

```python
assert (x, z) == (1, 6)
```
"""


def test_a_page_is_run_in_one_namespace() -> None:
    run_page(PAGE, "page.md")
    assert [(block.language, block.line) for block in blocks_of(PAGE)] == [
        ("python", 4),
        ("console", 10),
        ("python", 14),
        ("python", 20),
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "error", "says"),
    [
        ("== (1, 6)", "== (1, 7), 'unequal'", AssertionError, "unequal"),
        ("\n2\n", "\n3\n", AssertionError, 'File "page.md", line 14'),
        (">>> z = double(3)", ">>> z = double(", AssertionError, "SyntaxError"),
        ("x = 1\n", "x = \n", SyntaxError, "line 4"),
        ("x = 1\n", "import warnings; warnings.warn('no')\n", UserWarning, "no"),
    ],
)
def test_a_wrong_example_fails(right: str, wrong: str, error: type[BaseException], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        run_page(PAGE.replace(right, wrong), "page.md")


# --- docstrings -------------------------------------------------------------------------------------------------------

MODULES = [
    nicehooks,
    *(importlib.import_module(m.name) for m in pkgutil.walk_packages(nicehooks.__path__, "nicehooks.")),
]
DOCSTRINGS = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(module)
    if test.examples
}


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_the_examples_of_a_docstring_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    test = DOCSTRINGS[name]
    run_doctest(doctest.DocTest(test.examples, dict(test.globs), name, test.filename, test.lineno, test.docstring))


@pytest.mark.parametrize("name", nicehooks.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """In a sentence; and with an example, unless it is an exception, a warning or a constant."""
    thing = getattr(nicehooks, name)
    is_error = isinstance(thing, type) and issubclass(thing, BaseException)
    if is_error or callable(thing):
        assert inspect.getdoc(thing) not in (None, "")
    if not is_error and callable(thing):
        assert any(key.endswith(f".{name}") for key in DOCSTRINGS)
