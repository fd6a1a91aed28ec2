"""Effects in files, of the kind that the name of the file says: a heat map, an interactive page, or a table."""

from __future__ import annotations

import csv
from pathlib import Path

from nicehooks.experiments.effects import Effects
from nicehooks.pictures.heat_map import check_file, save
from nicehooks.pictures.pages import PlotError, check_folder


def check_output(file: str) -> None:
    """Asks whether `file` can be written; worth asking before a long run.

    Raises:
        FileMissing: there is no such directory.
        PlotError: the name says no known format.
        MissingExtra: matplotlib is not installed, and a heat map is asked for.
    """
    if Path(file).suffix in (".html", ".csv"):
        check_folder(Path(file).expanduser())
    else:
        check_file(file)


def check_page(file: str) -> None:
    """Asks whether a page can be written to `file`.

    Raises:
        FileMissing: there is no such directory.
        PlotError: the name is not that of a page.
    """
    if Path(file).suffix != ".html":
        raise PlotError(f"cannot write {file!r}: this is a page, whose name should end in .html.")
    check_folder(Path(file).expanduser())


def write_output(effects: Effects, file: str, title: str) -> str:
    """Writes `effects` to `file`, and says so in a sentence.

    Raises:
        PlotError: the file cannot be written.
    """
    if Path(file).suffix == ".html":
        return f"The page is in {effects.to_html(file, title)}"
    if Path(file).suffix == ".csv":
        return f"The table is in {_write_table(effects, Path(file).expanduser())}"
    drawn = effects.plot(title=title)
    return f"The heat map is in {save((drawn[0] if isinstance(drawn, list) else drawn).figure, file)}"


def _write_table(effects: Effects, path: Path) -> Path:
    """A row for each cell: its labels, the effect, and its site."""
    try:
        with path.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow([*[axis.name for axis in effects.axes], "effect", "site"])
            writer.writerows([[*cell.labels, cell.value, cell.site] for cell in effects.cells()])
    except OSError as error:
        raise PlotError(f"cannot write {str(path)!r}: {error.strerror or error}.") from None
    return path
