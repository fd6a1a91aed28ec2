"""Interventions at single positions of a causal model: what stands before the position is taken from the base run.

NOTE [Positions before the patched one]
In a causal model with a cache of keys and values, nothing before a patched position changes. So the forward begins
there: the tokens before it are left out, and the cache of the base run, cut off there, stands in for them. A few
neighbouring positions of all layers share a forward, as lanes (see NOTE [Lanes]). These have no base lane: the rows
that a new lane begins with are recorded. The output is completed with that of the base run before the metric sees it.
Whether a model is causal, the same check says that says it of every way: a sample is compared with the plain loop.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nicehooks.experiments.grids import Cell
from nicehooks.experiments.items import Base, GridItem, Unfit
from nicehooks.experiments.lanes import Growing, Lanes, metric_of_lanes, repeated
from nicehooks.experiments.recording import CallsAround, RecordedCall
from nicehooks.experiments.replacements import Replacements
from nicehooks.values import trees
from nicehooks.values.trees import Chain

POSITIONS_TOGETHER = 2
"""How many neighbouring positions share a forward."""

BY_POSITION = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
"""The arguments whose second dimension are the positions that a forward computes."""


class FromPosition(Growing):
    """Runs the interventions at each few positions in a forward that begins there.

    See NOTE [Positions before the patched one].
    """

    def __init__(self, base: Base, replacements: Replacements, level: int) -> None:
        super().__init__(base, replacements, level, widens=base.run.batch > 1)
        self.cache = _cache_in(base.run.sample)

    def order(self, item: GridItem) -> tuple[int, ...]:
        return (_start(item), *item.time)

    def measure(self, items: Sequence[GridItem]) -> Tensor:
        """The metric under each of `items`: `[item]`, or `[item, batch]`.

        Raises:
            Unfit: the model does not work that way.
        """
        groups: dict[int, list[int]] = {}
        for at, item in enumerate(items):
            groups.setdefault(_start(item), []).append(at)
        found: dict[int, Tensor] = {}
        for start, group in groups.items():
            found.update(zip(group, self._from(start, [items[at] for at in group]), strict=True))
        return torch.stack([found[at] for at in range(len(items))])

    def _from(self, start: int, items: list[GridItem]) -> Tensor:
        """The metrics of `items`, none of which is before `start`."""
        order = sorted(range(len(items)), key=lambda at: self.place(items[at])[0])
        places = [self.place(items[at]) for at in order]
        if any([end != "after" for *_, end in places]):
            raise Unfit("only results of modules can be replaced from a position on")
        lanes = _LanesFrom(self, start, places, [items[at] for at in order])
        run = self.base.run
        args, kwargs = self._inputs(start)
        with CallsAround(run.model, lanes.actions()):
            metrics = lanes.measured(run.model(*args, **kwargs))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return metrics[back.to(metrics.device)]

    def _inputs(self, start: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs from `start` on, and the cache up to there."""
        run = self.base.run
        args = tuple([value[:, start:] if at == 0 else value for at, value in enumerate(run.args)])
        kwargs = {
            name: value[:, start:] if name in BY_POSITION and isinstance(value, Tensor) else value
            for name, value in run.kwargs.items()
        }
        name, cache = self.cache
        return args, {**kwargs, **({name: _cut_off(cache, start)} if start else {})}


class _LanesFrom(Lanes):
    """The lanes of a forward that begins at a position: without one for the base run."""

    first = 0

    def __init__(
        self, way: FromPosition, start: int, places: list[tuple[int, RecordedCall, str]], items: list[GridItem]
    ) -> None:
        super().__init__(way, places[0][0], [(call, end) for _, call, end in places], items)
        self.start = start
        self.begun = False
        self.answers = {key: call for key, call in self.answers.items() if self._has_positions(call)}
        self.appends = Counter(self.appends)

    def _has_positions(self, call: RecordedCall) -> bool:
        tensors = [leaf for leaf in trees.leaves(call.value) if isinstance(leaf, Tensor)]
        length = length_of(self.base)
        return all([tensor.ndim > 1 and tensor.shape[1] == length for tensor in tensors])

    def answer(self, call: RecordedCall) -> Any:
        return trees.map_tensors(lambda tensor: tensor[:, self.start :].clone(), call.value)

    def appended(self, tree: Any, count: int, call: RecordedCall | None = None) -> Any:
        if call is None or not self._has_positions(call):
            raise Unfit("what a module returns has no positions in its second dimension")
        recorded = iter([leaf for leaf in trees.leaves(call.value) if isinstance(leaf, Tensor)])
        self.new = []

        def longer(tensor: Tensor) -> Tensor:
            rows = next(recorded)[:, self.start :]
            if tensor.shape[1:] != rows.shape[1:]:
                raise Unfit(f"{trees.structure_of(tensor)} came from position {self.start} on")
            copies = repeated(rows, count)
            new = torch.cat([tensor, copies]) if self.begun else copies.clone(memory_format=torch.contiguous_format)
            self.new.append(new)
            return new

        longer_tree = trees.map_tensors(longer, tree)
        self.now = self.now + count if self.begun else count
        self.begun = True
        return longer_tree

    def stem(self, path: str) -> Any:
        return trees.map_tensors(lambda tensor: tensor[:, self.start :], super().stem(path))

    def chain_of(self, cell: Cell) -> Chain:
        (_, position, *rest), *steps = cell.chain
        return ((slice(None), position - self.start, *rest), *steps)

    def measured(self, output: Any) -> Tensor:
        if self.now != len(self.items):
            raise Unfit(f"only {self.now} of {len(self.items)} lanes were begun")
        return metric_of_lanes(self.base.run, self._completed(output), len(self.items))

    def _completed(self, output: Any) -> Any:
        """`output` with what the base run returned for the positions before."""
        before = trees.leaves(self.base.run.sample)
        if len(before) != len(trees.leaves(output)):
            raise Unfit(f"the model returns {trees.structure_of(output)} from position {self.start} on")
        each = iter([leaf for leaf in before if isinstance(leaf, Tensor)])
        length = length_of(self.base)

        def complete(tensor: Tensor) -> Tensor:
            base = next(each)
            if tensor.shape[1:] == base.shape[1:]:
                return tensor
            if base.ndim < 2 or base.shape[1] != length or tensor.shape[1] != length - self.start:
                raise Unfit(f"{trees.structure_of(tensor)} came out from position {self.start} on")
            return torch.cat([repeated(base[:, : self.start], self.now), tensor], 1)

        return trees.map_tensors(complete, output)


def _start(item: GridItem) -> int:
    """Where the forward of `item` begins. The first subscript of its cell is `[:, 5]`, and may go on behind that."""
    step: Any = item.cell.chain[0]
    return step[1] // POSITIONS_TOGETHER * POSITIONS_TOGETHER


def forwards_for(base: Base) -> int:
    """How many forwards the positions of the inputs need."""
    return -(-length_of(base) // POSITIONS_TOGETHER)


def fits_positions(base: Base, items: Sequence[GridItem]) -> bool:
    """Whether every one of `items` is at a position, and the base run has left a cache that can be cut off there."""
    run = base.run
    named = {name for name, value in run.kwargs.items() if isinstance(value, Tensor)}
    plain = not run.has_state and named <= {*BY_POSITION, "attention_mask"} and len(run.args) <= 1
    if not plain or not run.inputs or run.inputs[0].ndim < 2 or _cache_in(run.sample)[1] is None:
        return False
    length = length_of(base)
    return all([_is_at_position(base, item.cell, length) and item.call is not None for item in items])


def length_of(base: Base) -> int:
    """How many positions the inputs have."""
    return base.run.inputs[0].shape[1]


def _is_at_position(base: Base, cell: Cell, length: int) -> bool:
    step = cell.chain[0] if cell.chain else ()
    if not isinstance(step, tuple) or len(step) < 2 or step[0] != slice(None) or type(step[1]) is not int:
        return False
    stem = base.stems[str(cell.stem)]
    plain = not cell.stem.chain and cell.path.port.is_output and isinstance(stem, Tensor) and stem.ndim > 2
    return plain and stem.shape[1] == length and step[1] >= 0


def _cache_in(output: Any) -> tuple[str, Any]:
    """The cache of keys and values in the output of a model, and the name of the argument that takes it."""
    for name, value in output.items() if isinstance(output, Mapping) else ():
        layers = getattr(value, "layers", None)
        if layers and all([_is_plain_layer(layer) for layer in layers]):
            return name, value
    return "", None


def _is_plain_layer(layer: Any) -> bool:
    """Whether a layer of a cache holds every key and value that there was, `[batch, head, position, head_dim]`."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return type(layer).__name__ == "DynamicLayer" and isinstance(keys, Tensor) and isinstance(values, Tensor)


def _cut_off(cache: Any, length: int) -> Any:
    """A cache of the first `length` positions of `cache`, whose layers are repeated for the lanes that come."""
    short = copy.copy(cache)
    short.layers = [_cut_layer(layer, length) for layer in cache.layers]
    return short


def _cut_layer(layer: Any, length: int) -> Any:
    short = copy.copy(layer)
    short.keys, short.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    short.__class__ = _widening(type(layer))
    return short


_kinds: dict[type, type] = {}


def _widening(kind: Any) -> type:
    """A kind of cache layer that repeats what it holds for as many lanes as bring new keys."""

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        lanes = keys.shape[0] // self.keys.shape[0]
        if lanes > 1:
            self.keys, self.values = repeated(self.keys, lanes), repeated(self.values, lanes)
        return kind.update(self, keys, values, *args, **kwargs)

    return _kinds.setdefault(kind, type(f"Widening{kind.__name__}", (kind,), {"update": update}))
