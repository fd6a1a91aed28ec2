"""`attribute`: the effects of a whole grid of interventions from a few gradients, and exact ones where it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.core.selection import Where
from nicehooks.errors import UnsupportedModule
from nicehooks.experiments.corrections import corrected
from nicehooks.experiments.estimates import Experiment, Metric, experiment_of, first_orders
from nicehooks.experiments.given import check_model_and_metric, count_given
from nicehooks.experiments.runs import Run
from nicehooks.experiments.straight_lines import along_the_line
from nicehooks.experiments.telling import Tell, Telling, teller
from nicehooks.experiments.verifying import Attribution


def attribute(
    model: nn.Module,
    where: Where,
    values: Any,
    metric: Metric,
    *args: Any,
    method: str = "gradient",
    points: int = 10,
    subspace: Tensor | None = None,
    check: bool = True,
    progress: Telling = False,
    **kwargs: Any,
) -> Attribution:
    """What each of many interventions would do to a metric, each alone, from a few gradients.

    It is the grid of `sweep`, estimated: the change of the value at a site, times the gradient of the metric there
    (attribution patching, Nanda 2023). One forward and one backward serve the whole grid.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> clean, corrupted = torch.ones(1, 4), torch.zeros(1, 4)
    >>> with capture(model, "{1,3}") as acts:
    ...     _ = model(clean)
    >>> effects = attribute(model, "{1,3}[:, *]", acts, lambda output: output.sum(), corrupted)
    >>> effects.axes
    (Axis(name='layer', labels=('1', '3')), Axis(name='neuron', labels=('0', '1', '2')))
    >>> exact = effects.verify(6)
    >>> exact.spent, torch.allclose(exact.values[1], effects.values[1], atol=1e-6)  # what follows the second is linear
    (1.0, True)

    Args:
        model: any module.
        where: what to intervene on, as for `sweep`: `"h.*[:, *]"` is layers × positions.
        values: what takes the place of the values there, as for `sweep`: a cache from another run or of means, a
            number, a tensor, a function of the value, `"resample"`, or several alternatives, which are the first axis.
        metric: `metric(output)` is a scalar tensor, or one number per example, `[batch]`.
        args: what the model is called with, in the run that is intervened on.
        method: `"gradient"`; `"integrated"`, along the straight line from the value to what replaces it (Sundararajan
            et al. 2017), `points` gradients for each module; `"atp*"`, for transformers that `anatomy` knows, with
            the two corrections of AtP* (Kramár et al. 2024): for queries and keys the softmax of the attention is
            computed anew, and the gradient is taken once for each layer with what that layer adds left out, so that
            effects that cancel each other are seen. Its sizes are means of sizes, with the sign of the estimate that
            leaves nothing out.
        points: how many gradients `"integrated"` takes along each line.
        subspace: an orthonormal basis, `[d, k]`, of the last dimension: only the component within it is replaced.
        check: refuses a model that draws random numbers, as with dropout in training mode.
        progress: shows how far it is, in gradients; or a function of how many there are, and of how many there will be.
        kwargs: what the model is called with.

    Raises:
        NotCaptured: `values` has none for a site.
        SiteNotReached: the metric does not depend on a site.
        SweepMismatch: the model draws random numbers.
        TreeMismatch: the metric is no number, or one per example; a value does not fit.
        UnsupportedModule: `method` is none of these, or `"atp*"` of a model that `anatomy` does not know.
    """
    if method not in ESTIMATES:
        known = ", ".join(map(repr, ESTIMATES))
        raise UnsupportedModule(f"attribute(…, method={method!r}): the methods are {known}.")
    check_model_and_metric(model, metric, "attribute")
    points = count_given(points, "attribute(…, points", 1)
    experiment = experiment_of(Run(model, metric, args, kwargs), where, values, subspace, "attribute", check)
    tell, count = teller(progress, "attribute"), len(experiment.replacements.sources)
    estimates = [
        effect
        for at, one in enumerate(experiment.each_alternative())
        for effect in ESTIMATES[method](one, points, _behind(tell, at, count))
    ]
    baseline, notes = experiment.baseline, [NOTES_ON_ESTIMATES[method]]
    if any([one.ndim < baseline.ndim for one in estimates]):
        estimates = [one.mean() for one in estimates]
        notes.append("examples are not told apart: in the values of some cells the first dimension is not the batch")
    each = torch.stack(estimates).to(torch.promote_types(baseline.dtype, torch.float32)).detach()
    if each.isnan().any() and not baseline.isnan().any():
        notes.append(NOTE_ON_NAN.format(count=int(each.isnan().reshape(len(each), -1).any(1).sum())))
    effects = experiment.replacements.effects(each, experiment.grid, baseline, notes)
    found = Attribution(effects.values, effects.axes, effects.baseline, effects.sites, effects.examples, effects.notes)
    found.experiment = experiment
    return found


def _behind(tell: Tell, before: int, count: int) -> Tell:
    """Tells of one of `count` equal parts, `before` of which are done."""
    return lambda done, total: tell(before * total + done, count * total)


def _by_gradient(experiment: Experiment, points: int, tell: Tell) -> list[Tensor]:
    return first_orders(experiment, experiment.grid.cells, experiment.gradients)


ESTIMATES: dict[str, Callable[[Experiment, int, Tell], list[Tensor]]] = {
    "gradient": _by_gradient,
    "integrated": along_the_line,
    "atp*": lambda experiment, points, tell: corrected(experiment, tell),
}

NOTE_ON_NAN = (
    "{count} effects are NaN: what stands there, or what replaces it, is infinite, as masked scores are, and no "
    "gradient says what a finite change would do"
)

NOTES_ON_ESTIMATES = {
    "gradient": "estimated from one gradient: the change of the value times the slope of the metric",
    "integrated": "estimated from the gradients along a straight line, which all cells of one value go together",
    "atp*": "estimated by AtP*: attention of changed queries and keys computed anew, gradients with a layer left out",
}
