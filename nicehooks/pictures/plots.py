"""A grid of numbers with labelled axes as a figure of matplotlib: a heat map, bars, or several heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nicehooks.extras import needs
from nicehooks.pictures.grids import Labelled, further_axes, grid_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MULTIPLES = 6
"""How many heat maps stand side by side; where there would be more, one shows their mean."""


def plot_grid(
    values: Tensor,
    axes: Sequence[Labelled],
    ax: Axes | None = None,
    title: str = "",
    spread: Tensor | None = None,
    scale: str = "effect",
) -> Any:
    """A grid of numbers as a figure: bars for one axis, a heat map for two, several of them for more.

    >>> import torch
    >>> ax = plot_grid(torch.eye(2), [("layer", "01"), ("position", ["the", "cat"])])
    >>> ax.get_xlabel(), ax.get_ylabel(), [tick.get_text() for tick in ax.get_xticklabels()]
    ('position', 'layer', ['the', 'cat'])

    Args:
        values: `[*axes]`.
        axes: `(name, labels)` for each dimension of `values`; labels are shown as they are, `$` too.
        ax: where to draw; axes in a figure of its own, which no global state of `matplotlib.pyplot` knows, where it is
            left out. Of more than two axes the mean over the further ones is drawn there.
        title: what stands above it.
        spread: `[*axes]`, the standard deviation of each value, shown on bars.
        scale: what the numbers are.

    Returns:
        The axes of matplotlib; a list of them where there are several heat maps. Their `.figure` has `savefig`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    numbers = values.detach().cpu().double()
    if numbers.dim() < 2:
        labels = axes[0] if axes else ("", [""])
        return bars(ax or plot_axes(len(labels[1]), 12), numbers.reshape(-1), labels, title, spread, scale)
    rows, columns = (axes[axis] for axis in grid_axes(numbers.shape))
    further = further_axes(numbers.shape)
    count = numbers.numel() // max(1, len(rows[1]) * len(columns[1]))
    if ax is None and 1 < count <= MULTIPLES:
        return _multiples(numbers, axes, title, scale)
    if further:
        numbers = numbers.nanmean(further)
        title = f"{title}, mean over {' and '.join([axes[axis][0] for axis in further])}".removeprefix(", ")
    return heat_map_on(ax or plot_axes(len(columns[1]), len(rows[1])), numbers, rows, columns, title, scale)


def heat_map_on(
    ax: Axes,
    values: Tensor,
    rows: Labelled,
    columns: Labelled,
    title: str = "",
    scale: str = "",
    limit: float | None = None,
) -> Axes:
    """Draws `values` `[row, column]` on `ax` as colours, 0 white, one sign red and the other blue.

    Args:
        ax: where to draw.
        values: `[row, column]`.
        rows: what the rows are, and a label for each.
        columns: the same of the columns.
        title: what stands above it.
        scale: what the numbers are; a bar of the colours says so, where it is not empty.
        limit: the number that has the strongest colour; the largest of `values` where it is left out.
    """
    limit = limit or most_of(values)
    if values.numel():
        image = ax.imshow(values.numpy(force=True), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        if scale:
            ax.get_figure(root=True).colorbar(image, ax=ax, label=scale)  # pyright: ignore[reportOptionalMemberAccess]
    ax.set_xticks(*_ticks(columns[1]), rotation=60, ha="right", parse_math=False)
    ax.set_yticks(*_ticks(rows[1]), parse_math=False)
    ax.set(xlabel=columns[0], ylabel=rows[0])
    ax.set_title(title, parse_math=False)
    return ax


def bars(ax: Axes, values: Tensor, labels: Labelled, title: str, spread: Tensor | None, scale: str) -> Axes:
    """Draws `values` `[label]` on `ax` as bars, in the colours of a heat map."""
    colours = ["#2266b8" if value < 0 else "#c2302e" for value in values.tolist()]
    errors = None if spread is None else spread.detach().cpu().double().reshape(-1).tolist()
    ax.bar(range(len(labels[1])), values.tolist(), color=colours, yerr=errors, ecolor="#777777")
    ax.axhline(0, color="#777777", linewidth=0.8)
    ax.set_xticks(*_ticks(labels[1]), rotation=60, ha="right", parse_math=False)
    ax.set(xlabel=labels[0], ylabel=scale)
    ax.set_title(title, parse_math=False)
    return ax


def _multiples(values: Tensor, axes: Sequence[Labelled], title: str, scale: str) -> list[Axes]:
    """A heat map for each index of the further axes, all with one scale of colours."""
    rows, columns = (axes[axis] for axis in grid_axes(values.shape))
    further = further_axes(values.shape)
    named = [[f"{axes[axis][0]} {label}" for label in axes[axis][1]] for axis in further]
    parts = values.permute([*further, *grid_axes(values.shape)]).flatten(0, len(further) - 1)
    figure = _new_figure(len(columns[1]) * len(parts), len(rows[1]))
    places = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for ax, part, words in zip(places, parts, product(*named), strict=True):
        heat_map_on(ax, part, rows, columns, ", ".join(words), limit=most_of(values))
        ax.label_outer(remove_inner_ticks=True)
    figure.colorbar(places[-1].images[0], ax=places, label=scale)
    figure.suptitle(title, parse_math=False)
    return list(places)


def most_of(values: Tensor) -> float:
    """The largest number of either sign; 1 where all are 0."""
    return (values.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if values.numel() else 0.0) or 1.0


def _ticks(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """The places of at most 64 labels, evenly spaced, and these labels."""
    places = list(range(0, len(labels), -(-len(labels) // 64) or 1))
    return places, [str(labels[place]) for place in places]


def plot_axes(columns: int, rows: int) -> Axes:
    """Axes in a figure of their own, with room for so many cells."""
    return _new_figure(columns, rows).add_subplot()


def _new_figure(columns: int, rows: int) -> Figure:
    """A figure that has room for so many cells, up to a size that a screen shows."""
    with needs("plot"):
        from matplotlib.figure import Figure
    return Figure(figsize=(min(24.0, 2.5 + 0.4 * columns), min(16.0, 2.2 + 0.2 * rows)), layout="constrained")
