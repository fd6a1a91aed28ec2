"""The site and the cookbook: every page is found, a page of the cookbook is short, and links are checked."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import nicehooks

ROOT = Path(__file__).parent.parent.parent
COOKBOOK = sorted(path for path in (ROOT / "docs" / "cookbook").glob("*.md") if path.name != "index.md")


def code_lines_of(page: str) -> int:
    """How many lines a reader would have to type: not blank, and no output."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    typed = [block for block in blocks if ">>> " not in block] + [
        "\n".join(line for line in block.splitlines() if line.startswith((">>> ", "... ")))
        for block in blocks
        if ">>> " in block
    ]
    return sum(1 for block in typed for line in block.splitlines() if line.strip())


@pytest.mark.parametrize("page", COOKBOOK, ids=lambda page: page.stem)
def test_a_page_of_the_cookbook_is_short(page: Path):
    assert 5 < code_lines_of(page.read_text()) <= 25


def test_the_cookbook_lists_its_pages():
    listed = re.findall(r"\((\w+\.md)\)", (ROOT / "docs" / "cookbook" / "index.md").read_text())
    assert sorted(listed) == [page.name for page in COOKBOOK]


def test_the_citation_is_of_this_version():
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [nicehooks.__version__]


def test_links_that_lead_nowhere_are_found(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs" / "check_links.py")
    check_links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_links)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<a href="sub/b.html#there">1</a><a href="#gone">2</a><a href="sub/b.html#gone">3</a><a href="c.html">4</a>'
        '<a href="https://example.org/x">5</a><a href="sub/b.html?q=1">6</a><img src="d%20d.png"><a href="#">7</a>'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="there"><a href="../a.html">back</a><a href="a.html">no</a>')
    (tmp_path / "d d.png").touch()
    assert check_links.broken(tmp_path) == [
        "a.html: #gone",
        "a.html: sub/b.html#gone",
        "a.html: c.html",
        "sub/b.html: a.html",
    ]
