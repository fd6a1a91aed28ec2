"""`sweep`: the exact effect of an intervention at each of many sites, each alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.core.selection import Where, select_groups
from nicehooks.errors import NiceHooksError
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.given import check_model_and_metric, count_given
from nicehooks.experiments.grids import Cell, Grid, grid_of, stems_of
from nicehooks.experiments.items import Base, GridItem, Stems
from nicehooks.experiments.lanes import Growing
from nicehooks.experiments.positions import FromPosition, fits_positions
from nicehooks.experiments.prompts import Prompts, refuse_dependent
from nicehooks.experiments.recording import RecordedCall, Recording
from nicehooks.experiments.replacements import Replacements, replacements_of
from nicehooks.experiments.runs import Run, refuse_steps, repeatable
from nicehooks.experiments.scheduling import Schedule
from nicehooks.experiments.singly import Mapped, OneByOne
from nicehooks.experiments.spreading import SpreadSweep, spread
from nicehooks.experiments.telling import Telling
from nicehooks.paths.ports import EVERY_CALL
from nicehooks.values import trees

Engine = Literal["auto", "positions", "growing", "batch", "vmap", "loop", "ray"]


def sweep(
    model: nn.Module,
    where: Where,
    values: Any,
    metric: Callable[[Any], Any],
    *args: Any,
    subspace: Tensor | None = None,
    engine: Engine = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    check: bool = True,
    progress: Telling = False,
    resume: Effects | None = None,
    workers: int = 2,
    worker_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Effects:
    """What an intervention at each site of `where` does to a metric, each alone.

    The result equals that of the plain loop, up to rounding; it is only faster:

        for path in paths:
            with patch(model, {path: values[path]}):
                metric(model(*args, **kwargs)) - baseline

    This is activation patching (Vig et al. 2020, https://arxiv.org/abs/2004.12265; Meng et al. 2022,
    https://arxiv.org/abs/2202.05262) where `values` are the activations of another run, and ablation where they are a
    constant or means.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    >>> with capture(model, "*") as clean:
    ...     _ = model(torch.ones(1, 4))
    >>> effects = sweep(model, "{0..1}[:, *]", clean, lambda output: output[:, 0], torch.zeros(1, 4))
    >>> effects.axes
    (Axis(name='layer', labels=('0', '1')), Axis(name='neuron', labels=('0', '1', '2')))

    Args:
        model: any module. It is run without gradients, and should be in evaluation mode.
        where: paths, sites, parts, … (see `select`). What differs between them gives the axes: `"h.*[:, *]"` is
            layers × positions.
        values: what is put there: a cache of activations or of means, of which each site gets its own region; a number;
            a tensor that broadcasts to the region; a function of the region, as in `edit`; `"resample"`, the value that
            the next example of the batch has there. A tensor with one more dimension, or a list of any of these, is
            several alternatives: they are the first axis.
        metric: of what the model returns: one number for each example of the batch, or one for all.
        subspace: an orthonormal basis, `[d, k]`, of the last dimension: only the component within it is replaced, as in
            `patch`.
        args: the model's inputs, the first tensor of which has the batch for its first dimension.
        engine: `"growing"`, one forward whose batch grows where each intervention begins; `"positions"`, in a causal
            language model, forwards that begin at the position in question, with the keys and values before it from a
            cache; `"batch"`, all side by side in one batch; `"vmap"`, those of one module together, for any module;
            `"loop"`, one after the other. In all but `"batch"` what runs before an intervention begins is not run
            again. By itself the first one that works, and where a part of the grid says so, the positions. `"ray"`
            spreads the cells and the examples over `workers` of a Ray cluster, each of which takes a way by itself.
            Every worker has all examples where these depend on each other, which a note says: with one number for all
            as the metric, with `"resample"`, where a function, the model or the metric makes something else of some of
            them than of all. A metric that knows an answer for each of them takes it from a `functools.partial`.
        chunk_size: how many interventions run at once, at most; by itself as many as fit into some memory.
        check: compares a random sample with the plain loop.
        progress: shows how far it is; or a function of what is done and of how much there is.
        resume: what an earlier call of the same sweep has returned when it was interrupted: what is done there is not
            done again.
        workers: of the engine `"ray"`, how many there are, each with a copy of the model.
        worker_options: of each, as `ray.remote` takes them: `{"num_gpus": 1}`, say.
        kwargs: more inputs.

    Returns:
        The effects. After an interrupt (`KeyboardInterrupt`) what is not done is NaN, and a note says so.

    Raises:
        SiteNotFound: `where` selects nothing.
        NotCaptured: `values` is a cache that has no value for a site.
        TreeMismatch: a value does not fit its site, or the metric is not one number for each example.
        SweepMismatch: runs of the model differ from each other, as with dropout in training mode, or under an
            intervention with `steps=`.
    """
    check_model_and_metric(model, metric, "sweep")
    chunk_size = chunk_size if chunk_size == "auto" else count_given(chunk_size, "sweep(…, chunk_size", 1)
    refuse_steps(model, "sweep")
    run = Run(model, metric, args, kwargs)
    run.refuse_no_examples("sweep")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        base, seen = _recorded(run, where, check)
        grid = grid_of(model, where, seen)
        regions = (trees.get(base.stems[str(cell.stem)], cell.chain) for cell in grid.cells)
        replacements = replacements_of(values, regions, subspace, run.batch)
        items = _items_to_run(grid, replacements, base.recording)
        ways = [] if engine == "ray" else ways_of(engine, base, replacements, items)
        schedule = Schedule(base, items, ways, chunk_size, check, progress)
        if engine == "auto":
            schedule.later = _from_positions(base, replacements, items)
        schedule.resume(resume)
        if engine == "ray":
            # Of a view all that it is a view of would go to the workers.
            each = [one.clone() if isinstance(one, Tensor) else one for one in replacements.values]
            in_one = partial(sweep, subspace=subspace, chunk_size=chunk_size, check=check)
            metrics = spread(
                schedule,
                SpreadSweep(
                    partial(_over_rows, in_one, model, where, each, metric, args, kwargs),
                    lambda found, baseline: replacements.effects(found - baseline, grid, baseline, []),
                    partial(refuse_dependent, base, replacements, schedule.asked),
                ),
                workers,
                worker_options or {},
            )
        else:
            metrics = schedule.run(OneByOne(base, replacements, answers=False))
    return replacements.effects(metrics - base.metric, grid, base.metric, schedule.notes)


def _over_rows(
    in_one: Callable[..., Effects],
    model: nn.Module,
    where: Where,
    values: list[Any],
    metric: Callable[[Any], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: Prompts,
    resume: Effects,
) -> Effects:
    """The sweep over some examples of the batch: `in_one` is `sweep` in one process, with its settings."""
    of_rows = rows.of_function(metric)
    return in_one(model, where, rows.of(values), of_rows, *rows.of(args), resume=resume, **rows.of(kwargs))


def _recorded(run: Run, where: Where, check: bool) -> tuple[Base, ActivationCache]:
    """The base run."""
    sites = [site for group in select_groups(run.model, where, "sweep") for site in group.sites]
    for site in sites:
        if site.path.port.is_gradient:
            raise NiceHooksError(f"sweep at {str(site)!r}: what replaces a gradient does not change the output.")
    recording = Recording(run.model, sites)
    start = time.perf_counter()
    with (
        repeatable(run.model, "sweep", check),
        recording.context,
        capture(run.model, *stems_of(run.model, where), keep="all", clone=True) as seen,
    ):
        output = run.output()
    seconds = time.perf_counter() - start
    metric = run.measured(output)
    stems = Stems(seen)
    run.sample = output
    return Base(run, recording, stems, metric, seconds, reuses=True), seen


def _items_to_run(grid: Grid, replacements: Replacements, recording: Recording) -> list[GridItem]:
    calls: dict[nn.Module, list[RecordedCall]] = {}
    for call in recording.calls:
        calls.setdefault(call.module, []).append(call)

    def first(cell: Cell) -> RecordedCall | None:
        of = calls.get(cell.site.module, [])
        number: Any = cell.path.call or 0
        return of[number] if number < len(of) and number != EVERY_CALL and cell.comes_by else None

    firsts = [first(cell) for cell in grid.cells]
    count = len(grid.cells)
    return [
        GridItem(alternative * count + at, alternative, cell, call)
        for alternative in range(len(replacements.sources))
        for at, (cell, call) in enumerate(zip(grid.cells, firsts, strict=True))
    ]


def ways_of(engine: Engine, base: Base, replacements: Replacements, items: list[GridItem]) -> list[tuple[str, Any]]:
    """The ways to run `items`, by name, best first.

    Raises:
        ValueError: there is no such engine.
    """
    one = OneByOne(base, replacements, answers=True)
    ways: dict[str, list[Any]] = {
        "positions": _from_positions(base, replacements, items),
        "growing": [Growing(base, replacements, level, wide) for level, wide in _levels(base, items)],
        "batch": [Growing(base, replacements, 0, wide) for wide in (False, True)],
        "vmap": [Mapped(base, replacements)],
        "loop": [one],
        "loop without reuse": [OneByOne(base, replacements, answers=False)],
    }
    if engine != "auto" and engine not in ways:
        raise ValueError(f"engine={engine!r}: it is 'auto', 'positions', 'growing', 'batch', 'vmap', 'loop' or 'ray'")
    last = ("loop", "loop without reuse")
    chosen = ("growing", "vmap", *last) if engine == "auto" else last if engine == "loop" else (engine,)
    found = [(name, way) for name in chosen for way in ways[name]]
    if not found:
        raise NiceHooksError(NO_POSITIONS if engine == "positions" else NOT_IN_A_CALL.format(engine=engine))
    return found


NOT_IN_A_CALL = (
    "sweep(…, engine={engine!r}) begins where a module is called, and none of these places is in a call: they are "
    "parameters.\n    engine='auto' finds a way that fits."
)


NO_POSITIONS = (
    "sweep(…, engine='positions') is for a causal model that returns its cache of keys and values (use_cache=True), "
    "and for positions of what its layers return ('h.*[:, *]').\n    engine='auto' finds a way that fits."
)


def _from_positions(base: Base, replacements: Replacements, items: list[GridItem]) -> list[Any]:
    if not fits_positions(base, items):
        return []
    return [FromPosition(base, replacements, _levels(base, items)[0][0])]


def _levels(base: Base, items: list[GridItem]) -> list[tuple[int, bool]]:
    """At which level lanes may begin, deepest first: each site in a call of its own, if there are several."""
    around = [item.call.around for item in items if item.call is not None]
    common = 0
    for calls in zip(*around, strict=False):
        if any([call is not calls[0] for call in calls]):
            break
        common += 1
    deepest = common if len(set(around)) > 1 else common - 1
    widths = (True,) if base.run.batch > 1 else (False, True)
    return [(level, wide) for level in range(deepest, -1, -1) for wide in widths]
