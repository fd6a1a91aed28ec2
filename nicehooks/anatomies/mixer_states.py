"""The state that a mixer hands on to the next step, where it is a value: found in two steps of a short generation.

NOTE [The state of a mixer]
For the next step, Mamba and its kin keep what a layer knows of the past. A forward that keeps nothing has no such
value, so a model with mixers is checked in a forward that keeps what it has read, on all positions but the last, and
runs once more, on the last one with what was kept: three forwards with the one in which its parts were found.
The state is what one call in the mixer writes into the cache, at the same place both times. The last inputs of a
convolution are kept, too, and are no state: a step only moves them by one position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.anatomies.layouts import Layout
from nicehooks.anatomies.noted_values import Key, key_of
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.recording import Record, record_forward
from nicehooks.anatomies.short_inputs import forward_parameters
from nicehooks.anatomies.tables import Lacks
from nicehooks.values.trees import structure_of


class _StepOfTwo(NamedTuple):
    """One step: what happened, and what was kept after it, by where it is in what is kept."""

    record: Record
    kept: dict[str, Tensor]


class TwoSteps:
    """The two steps of a short generation; a model that does not run in steps on these inputs has less than two."""

    def __init__(self, model: nn.Module, run: nn.Module, inputs: Any) -> None:
        is_plain = isinstance(inputs, Mapping) and set(inputs) <= {"input_ids", "use_cache"}
        self._ids: Tensor | None = inputs.get("input_ids") if is_plain else None
        self._model, self._run = model, run
        self._cache: dict[str, Any] = {}
        self._was_tried = False
        self._done: list[_StepOfTwo] = []

    def first(self) -> Any:
        """Runs the model on all positions but the last; its output."""
        self._was_tried = True
        if self._ids is None:
            raise ValueError(NO_STEPS_OF_MIXERS)
        return self._step(self._ids[:, :-1])

    def both(self) -> tuple[_StepOfTwo, _StepOfTwo] | None:
        """Both steps; runs what has not run. None where the model does not run in steps."""
        with suppress(Exception):  # whatever a model may raise that is no model of steps
            if not self._was_tried:
                self.first()
            if self._ids is not None and self._cache:
                self._step(self._ids[:, -1:])
        return (self._done[0], self._done[1]) if len(self._done) == 2 else None

    def _step(self, ids: Tensor) -> Any:
        output, record = record_forward(self._model, self._run, {"input_ids": ids, "use_cache": True, **self._cache})
        given = output if isinstance(output, dict) else {}
        name = next((one for one in forward_parameters(self._run) if given.get(one) is not None), None)
        if name is not None:
            self._cache = {name: given[name]}
            self._done.append(_StepOfTwo(record, dict(_kept_in_cache(given[name]))))
        return output


def has_mixers(layouts: Sequence[Layout]) -> bool:
    """Whether a layer of them mixes positions otherwise than by attention."""
    return any(places.has("mixer_out") for layout in layouts for places in layout.layers)


def find_mixer_states(layouts: Sequence[Layout], two: TwoSteps) -> None:
    """Writes into `layouts` where the states of their mixers are, or why they are no values."""
    steps = two.both()
    keys = [] if steps is None else [_states_after(step, steps) for step in steps]
    for layout in layouts:
        for places in layout.layers:
            if not places.has("mixer_out"):
                continue
            found = None if steps is None else [_writes(step, places, keys[at]) for at, step in enumerate(steps)]
            if found is None:
                places.put("mixer_state", Lacks(NO_STEPS_OF_MIXERS))
                continue
            both = [path for path in found[0] if path in found[1]]
            places.put("mixer_state", f"{both[0]}.input[1]" if len(both) == 1 else Lacks(NO_MIXER_STATE))
            if len(both) == 1:
                places.passed["mixer_state"] = "it is in the cache after each of two steps"
                layout.shapes["mixer_state"] = structure_of(found[0][both[0]])


def _kept_in_cache(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Copies of the tensors in a cache: a tree of containers and of objects of its own."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim > 1:
            yield path, value.detach().clone()
        return
    if depth > 6 or isinstance(value, nn.Module | type):
        return
    inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    if isinstance(value, tuple | list):
        inner = dict(enumerate(value))
    for name, one in inner.items():
        yield from _kept_in_cache(one, f"{path}.{name}", depth + 1)


def _states_after(step: _StepOfTwo, steps: tuple[_StepOfTwo, _StepOfTwo]) -> set[Key]:
    """The keys of what is kept after `step` that the second of `steps` makes anew, and does not only move."""
    first, second = (one.kept for one in steps)
    same = [path for path in first if path in second and first[path].shape == second[path].shape]
    return {key_of(step.kept[path]) for path in same if not _is_moved(first[path], second[path])}


def _is_moved(before: Tensor, after: Tensor) -> bool:
    return torch.equal(before, after) or any(
        size > 1 and torch.equal(before.narrow(dim, 1, size - 1), after.narrow(dim, 0, size - 1))
        for dim, size in enumerate(before.shape)
    )


def _writes(step: _StepOfTwo, places: PartPlaces, states: set[Key]) -> dict[str, Tensor]:
    """The calls in a layer that write one of `states`, by their paths, with what they write."""
    return {
        step.record.path(call): call.outputs[0].tensor
        for call in step.record.calls
        if call.function == "copy_"
        and f"{call.owner}.".startswith(f"{places.block}.")
        and call.outputs
        and call.outputs[0].key in states
    }


NO_STEPS_OF_MIXERS = (
    "it is looked for in two steps with a cache, and the model does not run in steps on the input that its parts are "
    "looked for on"
)

NO_MIXER_STATE = (
    "no call in it writes one value into the cache, at the same place in each step, from which the next step goes on: "
    "it may be several, or be inside of a kernel"
)
