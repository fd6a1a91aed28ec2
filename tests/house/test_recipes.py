"""The recipes of docs/house.md, tried: a file for a port, dropped into the package, is all that a new port takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import HOUSE

ROOT = HOUSE.parent
PAGE = (ROOT / "docs" / "house.md").read_text()


def code_below(heading: str) -> str:
    """The first block of Python under a heading of the page."""
    found = re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package in it, and in that the port of the recipe."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(HOUSE, folder / "nicehooks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "nicehooks" / "ports" / "training.py").write_text(code_below("A new port in one file"))
    return folder


def in_a_new_python(package: Path, code: str) -> str:
    """What `code` prints, where the package is the one in the folder `package`."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, cwd=package, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


MODEL = """
import nicehooks, torch
from torch import nn
from nicehooks import capture, describe, patch, select
print(nicehooks.__file__)
model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
model[1].eval()
"""


def test_a_new_port_is_one_file(package: Path) -> None:
    """It is captured, found in the cache, listed, and its mistakes are told, with no other change."""
    said = in_a_new_python(
        package,
        MODEL
        + """
with capture(model, "**@training", "0") as acts:
    print(str(describe(model)).count("@training"))
    model(torch.ones(1, 2))
print({key: value for key, value in acts.items() if isinstance(value, bool)})
print(acts["1@training"], [str(site) for site in select(model, "*@training")])
""",
    )
    where, count, values, found = said.splitlines()
    assert Path(where).parent == package / "nicehooks"
    assert int(count) >= 1
    assert values == "{'@training': True, '0@training': True, '1@training': False, '1.0@training': False}"
    assert found == "False ['0@training', '1@training']"


def test_without_the_file_there_is_no_such_port(package: Path) -> None:
    """So that it is the file that does it."""
    said = in_a_new_python(
        ROOT, MODEL + 'try: select(model, "*@training")\nexcept nicehooks.SiteNotFound: print("none")'
    )
    where, found = said.splitlines()
    assert (Path(where).parent, found) == (HOUSE, "none")
