"""Integrated gradients of activations: the gradient along the straight line from the value to what replaces it.

Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", with the value of a module in the place of the
input: all cells of one value move together, so that their effects add up to that of replacing all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nicehooks.contexts.patching import patch
from nicehooks.experiments.estimates import Experiment, first_orders
from nicehooks.experiments.grids import Cell
from nicehooks.experiments.telling import Tell
from nicehooks.values import trees


def along_the_line(experiment: Experiment, points: int, tell: Tell) -> list[Tensor]:
    """The effect at each cell, from `points` gradients for each value that cells are part of; told one by one."""
    found: dict[str, Tensor] = {}
    values = _cells_by_value(experiment.grid.cells).values()
    for at, cells in enumerate(values):
        for number in range(points):
            gradients = _gradients_at(experiment, cells, (number + 0.5) / points)
            for cell, whole in zip(cells, first_orders(experiment, cells, gradients), strict=True):
                part = whole / points
                found[str(cell.path)] = found[str(cell.path)] + part if str(cell.path) in found else part
            tell(at * points + number + 1, len(values) * points)
    return [found[str(cell.path)] for cell in experiment.grid.cells]


def _cells_by_value(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(str(cell.stem), []).append(cell)
    return found


def _gradients_at(experiment: Experiment, cells: Sequence[Cell], share: float) -> Any:
    """The gradients at the value around `cells`, where all of them have gone `share` of the way."""
    calls = experiment.calls_of(cells[0])
    changes = {call.of_cell(cell): _between(experiment, cell, call.value, share) for cell in cells for call in calls}
    with patch(experiment.model, changes):
        return experiment.gradients_at([call.path for call in calls if call.path in experiment.gradients])


def _between(experiment: Experiment, cell: Cell, base: Any, share: float) -> Any:
    moves = iter([leaf for leaf in trees.leaves(experiment.change_in(cell, base)) if isinstance(leaf, Tensor)])
    return trees.map_tensors(lambda old: torch.add(old, next(moves), alpha=share), trees.get(base, cell.chain))
