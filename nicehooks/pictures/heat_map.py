"""A heat map of a grid of effects, with its axes labelled, as a picture in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from nicehooks.extras import needs
from nicehooks.pictures.pages import PlotError, check_folder
from nicehooks.pictures.plots import heat_map_on, most_of, plot_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    row_title: str = "layer",
    column_title: str = "position",
    scale_title: str = "effect",
) -> Figure:
    """A grid of numbers as colours, 0 white, one sign red and the other blue.

    Args:
        values: `[row, column]`.
        rows: what stands beside each row.
        columns: what stands under each column, tokens for example; shown as they are, `$` too.
        title: what stands above it.
        row_title: what the rows are.
        column_title: what the columns are.
        scale_title: what the numbers are.

    Returns:
        A figure of its own, which no global state of `matplotlib.pyplot` knows.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    axes = plot_axes(len(columns), len(rows))
    limit = max(1.0, most_of(values))
    heat_map_on(axes, values, (row_title, rows), (column_title, columns), title, scale_title, limit)
    return cast("Figure", axes.figure)


def save(figure: Figure, file: str | Path) -> Path:
    """Writes `figure` in the format that the name of `file` says, and returns its path.

    Raises:
        PlotError: `file` cannot be written, or its name says no known format.
    """
    path = check_file(file)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PlotError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    return path


def check_file(file: str | Path) -> Path:
    """The path of a picture that can be written; worth asking before a long run.

    Raises:
        FileMissing: there is no such directory.
        PlotError: the name says no known format.
        MissingExtra: matplotlib is not installed.
    """
    with needs("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    path = Path(file).expanduser()
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise PlotError(f"cannot write {str(path)!r}: its name should end in .{', .'.join(sorted(known))}.")
    check_folder(path)
    return path
