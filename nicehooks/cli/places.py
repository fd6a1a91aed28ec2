"""Which places are patched: of a part of the anatomy or of a path, some layers and positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import nn

from nicehooks import capture
from nicehooks.anatomies.residual import residual_stream
from nicehooks.cli.part_names import is_single, parts_by_name, parts_called
from nicehooks.cli.prompts import PromptPairs
from nicehooks.errors import NiceHooksError, SiteNotFound
from nicehooks.experiments.effects import Axis
from nicehooks.experiments.grids import Grid, grid_of, stems_of

HEADS = {"q": 2, "k": 2, "v": 2, "z": 2, "scores": 1, "pattern": 1}
"""The parts that are looked at head by head, with the dimension of their heads; others position by position."""


class NothingToPatch(NiceHooksError, ValueError):
    """Prompts, layers or positions between which there is no effect to measure."""


def sites_of(
    model: nn.Module,
    pairs: PromptPairs,
    what: str,
    layers: Sequence[int] | None,
    positions: Sequence[int] | None,
) -> tuple[list[str], list[Axis]]:
    """The paths to patch: of a part of each of these layers, by positions or heads; else of the path `what`.

    Returns:
        The paths, and the axes that are known of them: a layer or a position alone is an axis, too. An axis without
        labels has those that the effects have.

    Raises:
        NothingToPatch: a layer or position does not exist, or what is patched has no such axis.
    """
    parts = _parts(model, pairs, what)
    if not parts:
        return _of_path(model, pairs, what, {"layer": layers, "position": positions})
    rows = _existing("layer", layers, len(parts))
    axes = [Axis("part", (what,))] if is_single(what) else [Axis("layer", tuple(map(str, rows)))]
    if what in HEADS:
        if positions is not None:
            raise NothingToPatch(NO_AXIS.format(axis="position", what=what, axes="layer, head"))
        return [f"{parts[row]}[{':, ' * HEADS[what]}*]" for row in rows], [*axes, Axis("head", ())]
    _check_positions(model, pairs, what, parts[0])
    columns = _existing("position", positions, len(pairs.tokens))
    paths = [f"{parts[row]}[:, {column}]" for row in rows for column in columns]
    return paths, [*axes, Axis("position", tuple([f"{column} {pairs.tokens[column]}" for column in columns]))]


def is_part(model: nn.Module, what: str) -> bool:
    """Whether `what` is the name of a part, and no path."""
    return what == "resid" or bool(parts_called(model, what))


def _of_path(
    model: nn.Module, pairs: PromptPairs, path: str, asked: dict[str, Sequence[int] | None]
) -> tuple[list[str], list[Axis]]:
    """The cells of the grid of `path` that have the numbers that are `asked` for on these axes."""
    try:
        stems = stems_of(model, path)
    except SiteNotFound as error:
        raise NothingToPatch(NO_SUCH_SITES.format(error=error, parts=", ".join(parts_by_name(model)))) from None
    wanted = {name: numbers for name, numbers in asked.items() if numbers is not None}
    if not wanted:
        return [path], []
    with torch.no_grad(), capture(model, *stems, keep="all") as seen:
        model(**pairs.clean)
    return _narrowed(grid_of(model, path, seen), path, wanted)


def _narrowed(grid: Grid, path: str, wanted: dict[str, Sequence[int]]) -> tuple[list[str], list[Axis]]:
    names = [axis.name for axis in grid.axes]
    for name in wanted:
        if name not in names:
            raise NothingToPatch(NO_AXIS.format(axis=name, what=path, axes=", ".join(names)))
    axes = [Axis(axis.name, _labels_of(axis, wanted[axis.name])) if axis.name in wanted else axis for axis in grid.axes]
    at = dict(zip(product(*[axis.labels for axis in grid.axes]), grid.sites, strict=True))
    return [at[labels] for labels in product(*[axis.labels for axis in axes])], axes


def _labels_of(axis: Axis, numbers: Sequence[int]) -> tuple[str, ...]:
    """The labels of these numbers, of which negative ones count from the end.

    Raises:
        NothingToPatch: one is not there.
    """
    count = len(axis.labels)
    labels = [axis.labels[number] if -count <= number < 0 else str(number) for number in numbers]
    for label in labels:
        if label not in axis.labels:
            raise NothingToPatch(f"there is no {axis.name} {label}: there are {', '.join(axis.labels)}.")
    return tuple(dict.fromkeys(labels))


NO_AXIS = "--{axis}s chooses along an axis that {what} does not have. It has: {axes}."

NO_SUCH_SITES = """\
{error}
  --sites takes a path, or a part: resid, {parts}."""


def _parts(model: nn.Module, pairs: PromptPairs, what: str) -> list[str]:
    """The part `what` of each layer; none where it is the name of no part."""
    if what == "resid":  # which has a way of its own, for models that have no anatomy
        return list(residual_stream(model, pairs.clean)[1])
    return [str(part) for part in parts_called(model, what)]


def _check_positions(model: nn.Module, pairs: PromptPairs, what: str, part: str) -> None:
    """An error where the second dimension of a part does not count positions."""
    with torch.no_grad(), capture(model, part) as values:
        model(**pairs.clean)
    shape = list(getattr(values[part], "shape", ()))
    if len(shape) < 2 or shape[1] != len(pairs.tokens):
        raise NothingToPatch(NOT_BY_POSITIONS.format(what=what, shape=shape, part=part))


NOT_BY_POSITIONS = (
    "{what} has no dimension of positions, it is {shape}. To patch some of it, write its path and a subscript, such as "
    "--sites '{part}[:, 0]'."
)


def _existing(what: str, wanted: Sequence[int] | None, count: int) -> list[int]:
    """`wanted`, counted from the start; an error where there is no such layer or position."""
    wanted = range(count) if wanted is None else wanted
    for number in wanted:
        if not -count <= number < count:
            raise NothingToPatch(f"there is no {what} {number}: they go from 0 to {count - 1}.")
    return [number % count for number in wanted]
