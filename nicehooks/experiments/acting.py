"""The interventions of an experiment as contexts: what users write by hand, and what every result has to equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from nicehooks.contexts.changes import edit
from nicehooks.contexts.patching import patch
from nicehooks.experiments.grids import Cell
from nicehooks.experiments.items import Stems
from nicehooks.experiments.replacements import Replacements
from nicehooks.values import trees


class Intervened(NamedTuple):
    """Where an intervention acts, and which of the alternatives is put there."""

    alternative: int
    cell: Cell


@contextmanager
def intervening(
    model: nn.Module, replacements: Replacements, stems: Stems, places: Sequence[Intervened]
) -> Iterator[None]:
    """The interventions at `places`, all together.

    Args:
        model: any module.
        replacements: what is put there.
        stems: the values of the run without an intervention.
        places: where; no two at the same place.
    """
    values: dict[str, Any] = {}
    with ExitStack() as stack:
        for alternative, cell in places:
            if replacements.is_function(alternative):
                fn = partial(replacements.new, alternative, cell, None)
                stack.enter_context(edit(model, str(cell.path), fn))
            else:
                values.update(_values_of_calls(replacements, alternative, cell, stems))
        if values:
            stack.enter_context(patch(model, values, subspace=replacements.subspace))
        yield


def _values_of_calls(replacements: Replacements, alternative: int, cell: Cell, stems: Stems) -> Mapping[str, Any]:
    """What is patched at a cell, by path: of several calls each has its own value, where it depends on the call."""
    source, calls = replacements.sources[alternative], stems.calls(cell.stem)
    if len(calls) == 1 or not replacements.differ_by_call:
        base = stems[str(cell.stem)]
        return {str(cell.path): source(cell, trees.get(base, cell.chain), base)}
    return {call.of_cell(cell): source(cell, trees.get(call.value, cell.chain), call.value) for call in calls}
