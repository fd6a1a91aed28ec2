"""How `make docs` makes the site: the Markdown that is there, the notebooks, and the docstrings."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import nicehooks

ROOT = Path(__file__).parent.parent

project = "nicehooks"
author = "The nicehooks authors"
version = release = nicehooks.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The root of the repository is the source, so that links work here as they do in a checkout.
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/README.md", "benchmarks/peers/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = ["docs/conf.py"]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext", ".ipynb": "myst-nb"}

nb_execution_mode = "off"  # the tests run the examples; a notebook is shown with the outputs that it was saved with
myst_heading_anchors = 4
default_role = "code"  # in docstrings, one backtick on each side is code
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = napoleon_use_ivar = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
pygments_style, pygments_dark_style = "friendly", "monokai"
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = f"nicehooks {version}"
html_show_sphinx = html_show_copyright = False
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
html_theme_options = {"navigation_with_keys": True}

CONTENTS = {
    "First steps": ["tutorial", "tour"],
    "How to": ["cookbook/index", "cookbook/*", "examples/*"],
    "Concepts": ["paths", "laws", "transforms", "anatomy", "errors"],
    "Moving over": ["from_*"],
    "Reference": ["api", "../benchmarks/README", "../benchmarks/peers/README"],
    "The house": ["house", "../CONTRIBUTING", "../CHANGELOG"],
}
"""The parts of the site, and their pages; what is in none of them comes last."""


def pages(patterns: list[str]) -> list[str]:
    """The documents that patterns stand for, as names that a table of contents in `docs/` takes."""
    found: list[str] = []
    for pattern in patterns:
        folder = ROOT / "docs"
        files = [path for suffix in source_suffix for path in sorted(folder.glob(pattern + suffix))]
        found += ["/" + str(path.resolve().relative_to(ROOT).with_suffix("")) for path in files]
    return list(dict.fromkeys(found))


def contents() -> dict[str, list[str]]:
    """The parts of the site with their pages."""
    parts = {caption: pages(patterns) for caption, patterns in CONTENTS.items()}
    known = {page for part in parts.values() for page in part} | {"/docs/index"}
    parts["More"] = [page for page in pages(["*"]) if page not in known]
    return {caption: part for caption, part in parts.items() if part}


def add_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """Gives the start page its tables of contents, which would be noise where the page is read as plain Markdown."""
    if document == root_doc:
        for caption, part in contents().items():
            options = f":hidden:\n:caption: {caption}\n"
            source[0] += f"\n\n```{{toctree}}\n{options}\n" + "\n".join(part) + "\n```\n"


TITLES = {
    "contexts": "Contexts and functions",
    "caches": "What was captured",
    "core": "Sites",
    "paths": "Paths",
    "values": "Values",
    "ports": "Attention as steps",
    "anatomies": "The parts of transformers",
    "experiments": "Experiments",
    "models": "A model to begin with",
    "installed": "Versions",
    "errors": "Errors and warnings",
    "compat": "Hooks by path",
}
"""What the rooms are called on the page, in this order."""


class PublicNames(SphinxDirective):
    """Every public name, under the room that it comes from."""

    def run(self) -> list[nodes.Node]:
        room_of = rooms_of_names()
        rooms: dict[str, list[str]] = {title: [] for title in TITLES.values()}
        for name in nicehooks.__all__:
            room = room_of[name]
            rooms.setdefault(TITLES.get(room, room.capitalize()), []).append(name)
        lines: list[str] = []
        for title, names in rooms.items():
            lines += ["", title, "-" * len(title)] if names else []
            for name in names:
                lines += ["", *entry(name)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def rooms_of_names() -> dict[str, str]:
    """The room of each public name: where `nicehooks/public.py` takes it from."""
    tree = ast.parse((ROOT / "nicehooks" / "public.py").read_text())
    lines = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {each.name: f"{line.module}.".split(".")[1] for line in lines for each in line.names}


def entry(name: str) -> list[str]:
    """The directive that shows the docstring of a public name."""
    thing = getattr(nicehooks, name)
    if inspect.isfunction(thing):
        return [f".. autofunction:: nicehooks.{name}"]
    if not inspect.isclass(thing):
        return [f".. autodata:: nicehooks.{name}", "   :no-value:"]
    return [f".. autoclass:: nicehooks.{name}", *(["   :members:"] if not issubclass(thing, BaseException) else [])]


def markdown_to_rest(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written as Markdown: links, indented code, code with a letter right behind it, as in `dict`s."""
    shown = [*code_blocks(lines)]
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) or code else inline(line) for line, code in shown]


def code_blocks(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """The lines, and whether each is code: what is indented below text, with the directive that says so put before it.

    What is indented below a field, such as `:param x:`, is text.
    """
    margin, code = "", False
    for above, line in pairwise(["", *lines]):
        begins = not above.strip() and line.startswith("    ") and not margin.startswith((":", ".."))
        if begins and not code and not line.lstrip().startswith(">>>"):
            yield from [(".. code-block:: python", True), ("", True)]
            code = True
        elif line.strip() and not line.startswith("    "):
            margin, code = line, False
        yield line, code


def inline(line: str) -> str:
    """Links and code within a line."""
    line = re.sub(r"\[([^\]`]+)\]\((https?://[^)\s]+)\)", r"`\1 <\2>`__", line)
    pieces = re.split(r"(`[^`]*`)", line)
    ends = ["\\ " if piece[-1:] == "`" and rest[:1].isalpha() else "" for piece, rest in pairwise([*pieces, ""])]
    return "".join(map("".join, zip(pieces, ends, strict=True)))


def redirect(app: Sphinx, error: Exception | None) -> None:
    """The site is entered at its root."""
    if error is None and app.builder.format == "html":
        to = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(
            f'{to}<title>nicehooks</title><a href="docs/index.html">nicehooks</a>'
        )


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.add_directive("public-names", PublicNames)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", markdown_to_rest)
    app.connect("build-finished", redirect)
