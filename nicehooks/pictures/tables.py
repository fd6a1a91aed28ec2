"""Tables and trees as HTML for notebooks: plain elements, without style or script of their own."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table_html(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is code.

    >>> table_html("one site", ["site", "value"], [("h.0", "Tensor[2] float32")])
    '<table><caption>one site</caption><tr><th>site</th><th>value</th></tr><tr><td><code>h.0</code></td><td>Tensor[2] float32</td></tr></table>'
    """  # noqa: E501
    head = "".join([f"<th>{html.escape(text)}</th>" for text in heads])
    body = "".join([f"<tr>{_code_cell(first)}{''.join(map(_text_cell, rest))}</tr>" for first, *rest in rows])
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def _code_cell(text: str) -> str:
    return f"<td><code>{html.escape(text)}</code></td>"


def _text_cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"


def tree_html(lines: Sequence[tuple[int, str, str]], open_to: int = 2) -> str:
    """A tree whose branches open and close.

    >>> tree_html([(0, "(model)", "Sequential"), (1, "0", "Linear")])
    '<details open><summary><b>(model)</b> Sequential</summary><ul><li><b>0</b> Linear</li></ul></details>'

    Args:
        lines: the depth, name and description of each node, a parent right before its children; the first is the root.
        open_to: the depth below which branches begin closed.
    """
    made: list[str] = []
    ends: list[str] = []  # what closes each branch that is open here
    for index, (depth, name, about) in enumerate(lines):
        while len(ends) > depth:
            made.append(ends.pop())
        said = f"<b>{html.escape(name)}</b> {html.escape(about)}".rstrip()
        item, end = ("<li>", "</li>") if depth else ("", "")
        if index + 1 < len(lines) and lines[index + 1][0] > depth:
            made.append(f"{item}<details{' open' if depth < open_to else ''}><summary>{said}</summary><ul>")
            ends.append(f"</ul></details>{end}")
        else:
            made.append(f"{item}{said}{end}")
    return "".join(made + ends[::-1])
