"""A grid of effects as tables in the terminal, and a progress bar while it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from nicehooks.extras import needs

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

ROW_WIDTH, COLUMN_WIDTH = 8, 5
"""The least that the label of a row, and a number with a blank, take up."""


def check() -> None:
    """Raises `MissingExtra` where rich is not installed; worth asking before a long run."""
    with needs("cli"):
        import rich as rich


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as a function of how much is done and of how much there is."""
    from rich.console import Console
    from rich.progress import Progress

    shown = Progress(console=Console(stderr=True))
    task = shown.add_task(description, total=None)

    def show(done: int, count: int) -> None:
        shown.start()  # not before there is something to show: an error may come first
        shown.update(task, completed=done, total=count)

    try:
        yield show
    finally:
        shown.stop()


def print_table(values: Tensor, rows: Sequence[str], columns: Sequence[str], corner: str) -> None:
    """Prints a grid of effects as coloured percentages, in several tables where the terminal is too narrow for one.

    Args:
        values: `[row, column]`, 1 for 100%.
        rows: what stands beside each row.
        columns: what stands above each column.
        corner: what the rows are.
    """
    from rich.console import Console

    console = Console(highlight=False)
    for part in _columns_at_a_time(len(columns), (console.width - ROW_WIDTH) // COLUMN_WIDTH):
        with console.capture() as shown:  # printed by itself: rich leaves the program where a pipe is closed
            console.print(_one_table(values[:, part], rows, columns[part], corner))
        print(shown.get(), end="")


def _columns_at_a_time(count: int, most: int) -> Iterator[slice]:
    """`count` columns in as few tables as there must be, of about the same width."""
    tables = -(-count // max(1, most))
    width = -(-count // tables)
    return (slice(start, start + width) for start in range(0, count, width))


def _one_table(values: Tensor, rows: Sequence[str], columns: Sequence[str], corner: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(corner, justify="right", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", min_width=COLUMN_WIDTH - 1, overflow="fold")
    for row, effects in zip(rows, values.tolist(), strict=True):
        table.add_row(Text(row), *map(_cell, effects))
    return table


def _cell(effect: float) -> Text:
    """A percentage on a ground that is red for a large effect, and blue for a large negative one."""
    from rich.text import Text

    fade = round(255 * (1 - min(1.0, abs(effect))))
    ground = (255, fade, fade) if effect > 0 else (fade, fade, 255)
    style = "" if abs(effect) < 0.05 else f"black on rgb({','.join(map(str, ground))})"
    return Text(f"{100 * effect:.0f}".replace("-0", "0") if abs(effect) < 0.005 else f"{100 * effect:.0f}", style)
