"""A page of HTML that stands alone: in a file, or in a frame of a notebook."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from nicehooks.errors import FileMissing, NiceHooksError


class PlotError(NiceHooksError, OSError):
    """A picture cannot be written where it was asked for."""


class Page:
    """One interactive picture, with all that it needs in itself: it loads nothing, from nowhere.

    It follows the colour scheme of the reader's system, is used by pointer, finger and keyboard, and fits a phone. In a
    notebook it shows itself.

    >>> page = Page("effects", "graph", {"edges": []}, "<p>No edges.</p>")
    >>> page
    Page('effects')

    Args:
        title: what stands above it.
        kind: which view it is: the name of its style and script in `assets`.
        data: what the script shows; anything that JSON has, tokens of any text among it.
        body: HTML below the title, safe already.
    """

    def __init__(self, title: str, kind: str, data: Any, body: str = "") -> None:
        self.title = title
        self.kind = kind
        self.data = data
        self.body = body

    def to_html(self, file: str | Path) -> Path:
        """Writes the page to `file`, and returns its path.

        Raises:
            FileMissing: there is no such folder.
            PlotError: the file cannot be written.
        """
        path = Path(file).expanduser()
        check_folder(path)
        try:
            path.write_text(self.document(), encoding="utf-8")
        except OSError as error:
            raise PlotError(f"cannot write {str(path)!r}: {error.strerror or error}.") from None
        return path

    def document(self) -> str:
        """The text of the page."""
        title = html.escape(self.title)
        return DOCUMENT.format(
            title=title,
            style=_asset("page.css") + _asset(f"{self.kind}.css"),
            body=f"<h1>{title}</h1>{self.body}",
            data=_safe_json(self.data),
            script=_asset("page.js") + _asset(f"{self.kind}.js"),
        )

    def _repr_html_(self) -> str:
        """The page in a frame, where style and script are its own; the script makes the frame as high as the page."""
        return FRAME.format(title=html.escape(self.title), document=html.escape(self.document()))

    def __repr__(self) -> str:
        return f"Page({self.title!r})"


def check_folder(path: Path) -> None:
    """Raises `FileMissing` where the directory that `path` should be in is not there."""
    if not path.parent.is_dir():
        raise FileMissing(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}.")


# The policy has the browser refuse whatever would be loaded, should a script ever ask for it.
DOCUMENT = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>{body}</main>
<noscript><p>This page needs its own script to be allowed to run.</p></noscript>
<script id="data" type="application/json">{data}</script>
<script>
{script}</script>
</body>
</html>
"""

FRAME = '<iframe title="{title}" srcdoc="{document}" style="width: 100%; height: 30em; border: 0"></iframe>'


def _asset(name: str) -> str:
    return (files("nicehooks.pictures") / "assets" / name).read_text(encoding="utf-8")


def _safe_json(data: Any) -> str:
    """JSON that no text in it can end: HTML reads a script up to the first `</script`, in a string or not."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
