"""What gradients say of every cell of a grid: the change of the value, times the gradient of the metric there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.differentiating import grad_at
from nicehooks.contexts.patching import patch
from nicehooks.core.selection import Where
from nicehooks.errors import TreeMismatch
from nicehooks.experiments.grids import Cell, Grid, grid_of, stems_of
from nicehooks.experiments.replacements import Replacements, replacements_of
from nicehooks.experiments.runs import refuse_steps
from nicehooks.values import trees

Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Experiment:
    """A grid of interventions on one run: a value for each cell, and the metric that they are measured by.

    Attributes:
        model: any module; `args` and `kwargs` are what it is called with.
        replacements: what is put into the cells; `alternative` says which of several.
        metric: of the output, a scalar tensor or `[batch]`.
        grid: the cells, and their axes.
        base: the values around the cells in the run without an intervention.
        baseline: the metric of that run.
        gradients: of the metric, summed over the examples, with respect to the values around the cells.
    """

    model: nn.Module
    replacements: Replacements
    metric: Metric
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grid: Grid
    base: ActivationCache
    baseline: Tensor
    gradients: Mapping[str, Any]
    alternative: int = 0

    def each_alternative(self) -> Iterator[Experiment]:
        """The experiment with each of the alternatives that are put into the cells."""
        for alternative in range(len(self.replacements.sources)):
            yield replace(self, alternative=alternative)

    def base_at(self, cell: Cell) -> Any:
        """The value of a cell in the run without an intervention."""
        return trees.get(_stem_in(self.base, cell), cell.chain)

    def value_at(self, cell: Cell) -> Any:
        """What the intervention makes of the value of a cell."""
        return self.replacements.new(self.alternative, cell, _stem_in(self.base, cell), self.base_at(cell))

    def change_at(self, cell: Cell) -> Any:
        """How far the intervention moves the value of a cell: a tensor, or a tree like the value."""
        base, new = self.base_at(cell), self.value_at(cell)
        moved = iter([leaf for leaf in trees.leaves(new) if isinstance(leaf, Tensor)])
        return trees.map_tensors(lambda old: _moved_by(next(moved), old), base)

    def change_around(self, cell: Cell) -> Tensor | None:
        """`change_at`, of the whole value around a cell; None where each of its cells has to be asked for its own."""
        base = _stem_in(self.base, cell)
        new = self.replacements.around(self.alternative, cell, base) if isinstance(base, Tensor) else None
        return None if new is None else _moved_by(new, base)

    def run(self, changes: Mapping[str, Any]) -> Tensor:
        """The metric of a run with these values patched in."""
        with torch.no_grad(), patch(self.model, changes):
            return self.metric(self.model(*self.args, **self.kwargs)).detach()

    def summed(self, output: Any) -> Tensor:
        """One number to differentiate: the metric of all examples together."""
        return checked_metric(self.metric(output)).sum()


def _moved_by(new: Tensor, old: Tensor) -> Tensor:
    """`new - old`, and 0 where both are the same: of masked scores both are -inf, whose difference is NaN."""
    return (new - old).masked_fill(new == old, 0)


def checked_metric(value: Any) -> Tensor:
    """What a metric returned, if it is a scalar or one number per example.

    Raises:
        TreeMismatch: it is something else.
    """
    if isinstance(value, Tensor) and value.ndim < 2 and value.is_floating_point():
        return value
    raise TreeMismatch(
        f"the metric returned {trees.structure_of(value)}, and not one number, or one per example, [batch].\n"
        "    metric = lambda output: output.logits[:, -1, 42]  # for example"
    )


def experiment_of(
    model: nn.Module,
    where: Where,
    values: Any,
    subspace: Tensor | None,
    metric: Metric,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Experiment:
    """The experiment, after one forward and one backward that give everything that it needs of the base run."""
    refuse_steps(model, "attribute")
    stems, baseline = stems_of(model, where, "attribute"), list[Tensor]()

    def once(output: Any) -> Tensor:
        value = checked_metric(metric(output))
        baseline.append(value.detach())
        return value.sum()

    with capture(model, *stems, keep="all", detach=True, clone=True) as base:
        _, gradients = grad_at(model, stems, once)(*args, **kwargs)
    grid = grid_of(model, where, base, "attribute")
    calls = {str(cell.stem) for cell in grid.cells if cell.stem.call is not None}
    if calls:  # of modules that are called several times, the gradient of each call
        _, gradients = grad_at(model, sorted(calls), once)(*args, **kwargs)
    first = grid.cells[0]
    replacements = replacements_of(values, trees.get(_stem_in(base, first), first.chain), subspace, "attribute")
    return Experiment(model, replacements, metric, args, kwargs, grid, base, baseline[0], gradients)


def _stem_in(base: ActivationCache, cell: Cell) -> Any:
    """The value around a cell, of its own call."""
    calls = base.calls(replace(cell.stem, call=None))
    return calls[-1 if cell.stem.call is None else int(cell.stem.call)]


# --- from gradients to effects ----------------------------------------------------------------------------------------


def first_orders(experiment: Experiment, cells: Sequence[Cell], gradients: Mapping[str, Any]) -> list[Tensor]:
    """The first order of the effect at each of `cells`: a scalar, or `[batch]` where the metric is.

    Where what is put into the cells of one value is one whole value, all of it is multiplied once.
    """
    around: dict[str, Tensor | None] = {}

    def products_at(cell: Cell, slopes: Any) -> list[Tensor]:
        stem = str(cell.stem)
        if stem not in around:
            change = experiment.change_around(cell)
            around[stem] = None if change is None or not isinstance(slopes, Tensor) else _product(change, slopes)
        whole = around[stem]
        return _products_at(experiment, cell, slopes) if whole is None else [trees.get(whole, cell.chain)]

    slopes = [gradients.get(str(cell.stem)) for cell in cells]  # None where the metric does not depend on it
    return [
        torch.zeros_like(experiment.baseline)
        if slope is None
        else sum_per_example(products_at(cell, slope), experiment.baseline)
        for cell, slope in zip(cells, slopes, strict=True)
    ]


def _products_at(experiment: Experiment, cell: Cell, slopes: Any) -> list[Tensor]:
    change = experiment.change_at(cell)
    pairs = zip(trees.leaves(change), trees.leaves(trees.get(slopes, cell.chain)), strict=True)
    products = [_product(moved, slope) for moved, slope in pairs if isinstance(slope, Tensor)]
    if not products:
        raise TreeMismatch(f"{str(cell.path)!r} is {trees.structure_of(change)}, which has no gradient.")
    return products


def _product(moved: Tensor, slope: Tensor) -> Tensor:
    return (moved * slope).to(torch.promote_types(moved.dtype, torch.float32))


def sum_per_example(products: Sequence[Tensor], baseline: Tensor) -> Tensor:
    """The sum of all numbers; for each example where the metric has one for each, and the first dimension counts them.

    A value in which no dimension counts the examples has its sum spread over them: the mean is right in any case.
    """
    batch = len(baseline) if baseline.ndim else 1
    if baseline.ndim and all([product.ndim and len(product) == batch for product in products]):
        return torch.stack([product.flatten(1).sum(1) if product.ndim > 1 else product for product in products]).sum(0)
    return torch.stack([product.sum() for product in products]).sum() / batch + torch.zeros_like(baseline)
