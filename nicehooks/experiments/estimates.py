"""What gradients say of every cell of a grid: the change of the value, times the gradient of the metric there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.contexts.capturing import capture
from nicehooks.contexts.differentiating import grad_at
from nicehooks.core.selection import Where
from nicehooks.errors import SiteNotReached, TreeMismatch
from nicehooks.experiments.acting import Intervened, intervening
from nicehooks.experiments.grids import Cell, Grid, grid_of, stems_of
from nicehooks.experiments.items import StemCall, Stems
from nicehooks.experiments.replacements import Replacements, replacements_of
from nicehooks.experiments.runs import Run, refuse_steps, repeatable
from nicehooks.values import trees

Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Experiment:
    """A grid of interventions on one run: a value for each cell, and the metric that they are measured by.

    Attributes:
        run: the model, its inputs, and the metric of its output, a scalar tensor or `[batch]`.
        replacements: what is put into the cells; `alternative` says which of several.
        grid: the cells, and their axes.
        stems: the values around the cells in the run without an intervention.
        baseline: the metric of that run.
        gradients: of the metric, summed over the examples, with respect to the values around the cells, by the paths of
            `calls_of`.
    """

    run: Run
    replacements: Replacements
    grid: Grid
    stems: Stems
    baseline: Tensor
    gradients: Mapping[str, Any]
    alternative: int = 0

    @property
    def model(self) -> nn.Module:
        """The model of the run."""
        return self.run.model

    def each_alternative(self) -> Iterator[Experiment]:
        """The experiment with each of the alternatives that are put into the cells."""
        for alternative in range(len(self.replacements.sources)):
            yield replace(self, alternative=alternative)

    def calls_of(self, cell: Cell) -> list[StemCall]:
        """The value around a cell in each call in which the intervention acts."""
        return self.stems.calls(cell.stem)

    def new_in(self, cell: Cell, base: Any) -> Any:
        """What the intervention makes of the value of a cell, in a call in which the value around it is `base`."""
        region = trees.get(base, cell.chain)
        if self.replacements.is_function(self.alternative):
            region = trees.map_tensors(Tensor.clone, region)  # it may write into what it is given
        return self.replacements.new(self.alternative, cell, base, region)

    def change_in(self, cell: Cell, base: Any) -> Any:
        """How far the intervention moves the value of a cell: a tensor, or a tree like the value."""
        new = self.new_in(cell, base)
        moved = iter([leaf for leaf in trees.leaves(new) if isinstance(leaf, Tensor)])
        return trees.map_tensors(lambda old: _moved_by(next(moved), old), trees.get(base, cell.chain))

    def change_around(self, cell: Cell, base: Any) -> Tensor | None:
        """`change_in`, of the whole value around a cell; None where each of its cells has to be asked for its own."""
        new = self.replacements.around(self.alternative, cell, base) if isinstance(base, Tensor) else None
        return None if new is None else _moved_by(new, base)

    def measured(self, places: Sequence[Intervened]) -> Tensor:
        """The metric of a run with the interventions at `places`, all together."""
        with torch.no_grad(), intervening(self.model, self.replacements, self.stems, places):
            return self.run.measured(self.run.output()).detach()

    def gradients_at(self, sites: Sequence[str]) -> Mapping[str, Any]:
        """The gradients of the metric, summed over the examples, at `sites`."""
        args, kwargs = self.run.given()
        return grad_at(self.model, sites, lambda output: self.run.differentiable(output).sum())(*args, **kwargs)[1]


def _moved_by(new: Tensor, old: Tensor) -> Tensor:
    """`new - old`, and 0 where both are the same: of masked scores both are -inf, whose difference is NaN."""
    return (new - old).masked_fill(new == old, 0)


def experiment_of(
    run: Run, where: Where, values: Any, subspace: Tensor | None, verb: str, check: bool = True
) -> Experiment:
    """The experiment, after one forward and one backward that give everything that it needs of the base run.

    Of modules that are called several times, a second one gives the gradient of each call.
    """
    model = run.model
    refuse_steps(model, verb)
    run.refuse_no_examples(verb)
    stems, baseline = stems_of(model, where, verb), list[Tensor]()

    def once(output: Any) -> Tensor:
        value = run.differentiable(output)
        baseline.append(value.detach())
        run.sample = trees.map_tensors(Tensor.detach, output)
        return value.sum()

    args, kwargs = run.given()
    with capture(model, *stems, keep="all", detach=True, clone=True) as base, repeatable(model, verb, check):
        gradients, unreached = _as_far_as_reached(lambda: grad_at(model, stems, once)(*args, **kwargs)[1])
    if unreached is not None and not baseline:  # the forward itself has raised it
        raise unreached
    grid, seen = grid_of(model, where, base, verb), Stems(base)
    _refuse_whole_numbers(grid, seen, verb)
    regions = (trees.get(seen[str(cell.stem)], cell.chain) for cell in grid.cells)
    replacements = replacements_of(values, regions, subspace, run.batch, verb)
    experiment = Experiment(run, replacements, grid, seen, baseline[0], gradients)
    return replace(experiment, gradients={**gradients, **_of_calls(experiment)})


def _refuse_whole_numbers(grid: Grid, seen: Stems, verb: str) -> None:
    for stem in dict.fromkeys([str(cell.stem) for cell in grid.cells]):
        tensors = [leaf for leaf in trees.leaves(seen[stem]) if isinstance(leaf, Tensor)]
        if tensors and not any(map(trees.has_fractions, tensors)):
            raise TreeMismatch(NO_FRACTIONS.format(verb=verb, stem=stem, value=trees.structure_of(seen[stem])))


NO_FRACTIONS = (
    "{verb} at {stem!r}: {value} is of whole numbers, which have no gradient.\n"
    "    sweep(model, where, …)  # has the exact effects"
)


def _of_calls(experiment: Experiment) -> Mapping[str, Any]:
    """The gradients of single calls that are not known yet; those on which the metric does not depend have none.

    Raises:
        SiteNotReached: it depends on no call of a cell.
    """
    known = experiment.gradients
    calls = [[call.path for call in experiment.calls_of(cell)] for cell in experiment.grid.cells]
    missing = list(dict.fromkeys([call for of_cell in calls for call in of_cell if call not in known]))
    if not missing:
        return {}
    found, unreached = _as_far_as_reached(lambda: experiment.gradients_at(missing))
    if unreached is not None:
        each = [_as_far_as_reached(lambda call=call: experiment.gradients_at([call]))[0] for call in missing]
        found = {call: gradient for one in each for call, gradient in one.items()}
    for of_cell in calls:
        if unreached is not None and not any([call in found or call in known for call in of_cell]):
            raise unreached
    return found


def _as_far_as_reached(
    gradients: Callable[[], Mapping[str, Any]],
) -> tuple[Mapping[str, Any], SiteNotReached | None]:
    """What `gradients` returns, or nothing, and why: the last call of a module may have none, and others have some."""
    try:
        return gradients(), None
    except SiteNotReached as error:
        return {}, error


# --- from gradients to effects ----------------------------------------------------------------------------------------


def first_orders(experiment: Experiment, cells: Sequence[Cell], gradients: Mapping[str, Any]) -> list[Tensor]:
    """The first order of the effect at each of `cells`, a scalar, or `[batch]` where examples can be told apart.

    Where what is put into the cells of one value is one whole value, all of it is multiplied once. The intervention
    acts in each call, so the effects of the calls add up.
    """
    around: dict[str, Tensor | None] = {}

    def products_in(cell: Cell, call: StemCall) -> list[Tensor]:
        slopes = gradients.get(call.path)
        if slopes is None:  # the metric does not depend on it
            return []
        if call.path not in around:
            change = experiment.change_around(cell, call.value)
            around[call.path] = None if change is None or not isinstance(slopes, Tensor) else _product(change, slopes)
        whole = around[call.path]
        return _products_in(experiment, cell, call.value, slopes) if whole is None else [trees.get(whole, cell.chain)]

    def products_at(cell: Cell) -> list[Tensor]:
        return [one for call in experiment.calls_of(cell) for one in products_in(cell, call)]

    return [sum_per_example(products_at(cell), experiment.baseline) for cell in cells]


def _products_in(experiment: Experiment, cell: Cell, base: Any, slopes: Any) -> list[Tensor]:
    change = experiment.change_in(cell, base)
    pairs = zip(trees.leaves(change), trees.leaves(trees.get(slopes, cell.chain)), strict=True)
    products = [_product(moved, slope) for moved, slope in pairs if isinstance(slope, Tensor)]
    if not products:
        raise TreeMismatch(f"{str(cell.path)!r} is {trees.structure_of(change)}, which has no gradient.")
    return products


def _product(moved: Tensor, slope: Tensor) -> Tensor:
    return (moved * slope).to(torch.promote_types(moved.dtype, torch.float32))


def sum_per_example(products: Sequence[Tensor], baseline: Tensor) -> Tensor:
    """The sum of all numbers; for each example where the metric has one for each, and the first dimension counts them.

    Where no dimension counts the examples it is the mean over them, a scalar.
    """
    if not products:
        return torch.zeros_like(baseline)
    batch = len(baseline) if baseline.ndim else 1
    if baseline.ndim and all([product.ndim and len(product) == batch for product in products]):
        return torch.stack([product.flatten(1).sum(1) if product.ndim > 1 else product for product in products]).sum(0)
    return torch.stack([product.sum() for product in products]).sum() / batch
