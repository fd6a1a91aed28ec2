"""Runs the notebooks of docs/examples, for the tests and for `make notebooks`, which writes what came out into them."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import torch

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def executed(notebook: dict[str, Any], file: str) -> dict[str, Any]:
    """The notebook with the outputs of a run in this process, in one namespace and from the first cell to the last.

    An output is what was printed, what the last expression is, and the figures of `matplotlib.pyplot`, as in Jupyter.
    """
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "notebook"}
    count, cells = 0, list[dict[str, Any]]()
    try:
        with torch.enable_grad(), matplotlib.rc_context():
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    count += 1
                    outputs = _outputs(source_of(cell), names, f"{file}, cell {count}", count)
                    cell = {**cell, "execution_count": count, "outputs": outputs}
                cells.append(cell)
    finally:
        pyplot.close("all")
    return {**notebook, "cells": cells}


def _outputs(source: str, names: dict[str, Any], file: str, count: int) -> list[dict[str, Any]]:
    """What a cell shows."""
    body = ast.parse(source, file).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(ast.Module(body, []), file, "exec", dont_inherit=True), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), file, "eval", dont_inherit=True), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    outputs += [
        {"data": {"image/png": picture}, "metadata": {}, "output_type": "display_data"} for picture in _pictures()
    ]
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _pictures() -> list[str]:
    """The figures that are open, which are closed."""
    from matplotlib import pyplot

    pictures: list[str] = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, dpi=80, bbox_inches="tight", metadata={"Software": None})
        pictures.append(base64.b64encode(file.getvalue()).decode("ascii"))
    pyplot.close("all")
    return pictures


def shown(notebook: dict[str, Any]) -> list[str]:
    """The text that each code cell shows, but for those tagged `differs`, whose words no two machines need share."""
    return [
        "".join(_text(output) for output in cell["outputs"])
        for cell in code_cells(notebook)
        if "differs" not in cell["metadata"].get("tags", [])
    ]


def _text(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    return "".join(output.get("text", data.get("text/plain", ["<picture>\n"] if "image/png" in data else [])))


def same_but_for_rounding(ours: str, theirs: str) -> bool:
    """Whether two texts have the same words, and numbers that differ by at most a twentieth, or by 0.06."""
    if [text.split() for text in NUMBER.split(ours)] != [text.split() for text in NUMBER.split(theirs)]:
        return False
    pairs = zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True)
    return all(abs(a - b) <= max(0.06, 0.05 * max(abs(a), abs(b))) for a, b in (map(_number, pair) for pair in pairs))


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, notebook: dict[str, Any]) -> None:
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    for file in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        write(file, executed(read(file), file.name))
        print(file)


if __name__ == "__main__":
    main()
