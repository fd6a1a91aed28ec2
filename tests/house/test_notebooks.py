"""The notebooks of docs/examples run, and show what comes out of a run."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import notebooks
import pytest

each_notebook = pytest.mark.parametrize("file", notebooks.NOTEBOOKS, ids=lambda file: file.name)


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_and_its_text_is_what_came_out(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its asserts hold; the words it shows are the same, and its numbers but for rounding."""
    monkeypatch.chdir(tmp_path)
    kept = notebooks.read(file)
    came = notebooks.executed(kept, file.name)
    for ours, theirs in zip(notebooks.shown(came), notebooks.shown(kept), strict=True):
        assert notebooks.same_but_for_rounding(ours, theirs), f"{ours}\n--- but the notebook shows ---\n{theirs}"


@each_notebook
def test_a_notebook_is_kept_as_it_was_run_from_its_first_cell_to_its_last(file: Path) -> None:
    """It checks its own results, shows a picture, has no warnings and nothing of the machine it was run on."""
    notebook, text = notebooks.read(file), file.read_text(encoding="utf-8")
    cells = notebooks.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert notebooks.source_of(cells[-1]).startswith("assert ")
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and max(len(base64.b64decode(picture)) for picture in pictures) < 60_000
    assert re.search(r"/(home|root|tmp|work|Users)/|0x[0-9a-f]{6}|\d+%\|", "".join(notebooks.shown(notebook))) is None
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


@each_notebook
def test_a_notebook_says_what_was_expected_what_came_out_and_leads_to_files_that_are_there(file: Path) -> None:
    cells = notebooks.read(file)["cells"]
    prose = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert re.match("# [^#]", prose) and "**Expected.**" in prose and "## What came out" in prose and "arXiv:" in prose
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose)
    assert links and [link for link in links if not (file.parent / link).exists()] == []


# --- the runner itself ------------------------------------------------------------------------------------------------


def notebook_of(*sources: str, tags: list[str] | None = None) -> dict[str, Any]:
    cells = [{"cell_type": "code", "metadata": {"tags": tags or []}, "source": [source]} for source in sources]
    return {"cells": cells}


def test_the_runner_shows_what_jupyter_shows() -> None:
    """What is printed, the last expression, the figures; one namespace for all cells."""
    came = notebooks.executed(
        notebook_of(
            "x = 1\nprint('a')",
            "from matplotlib import pyplot\nx + 1",
            "_ = pyplot.plot([1, 2])",
        ),
        "n",
    )
    assert notebooks.shown(came) == ["a\n", "2", "<picture>\n"]
    assert [cell["execution_count"] for cell in came["cells"]] == [1, 2, 3]


def test_a_cell_that_fails_is_named() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        notebooks.executed(notebook_of("x = 1", "y = 2\nx / 0"), "n.ipynb")
    place = caught.traceback[-1]
    assert (str(place.path), place.lineno + 1) == ("n.ipynb, cell 2", 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("loss 2.80 of 14", "loss 2.84 of 14", True),
        ("70,651 edges", "70,651 edges", True),
        ("−0.77 → +0.99", "-0.75 → +1.01", True),
        ("loss 2.8", "loss 3.0", False),
        ("+0.77", "-0.77", False),
        ("L18H6  0.91", "L17H6  0.91", False),
        ("loss 2.8", "loss  2.8\n", True),
        ("one 2.8", "two 2.8", False),
    ],
)
def test_texts_are_compared_by_their_words_and_by_their_numbers(ours: str, theirs: str, same: bool) -> None:
    assert notebooks.same_but_for_rounding(ours, theirs) is same


def test_cells_that_are_tagged_are_not_compared() -> None:
    assert notebooks.shown(notebooks.executed(notebook_of("print(1)", tags=["differs"]), "n")) == []
