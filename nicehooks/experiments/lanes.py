"""Many interventions in one forward, side by side along the batch, which grows where each of them begins.

NOTE [Lanes]
A lane is as many rows as the model's own batch has examples. A forward begins with one lane, that of the base run.
Where an intervention begins, a copy of the base lane is appended for it, and changed there; what runs before costs it
nothing. That is possible only where all that has rows goes through the arguments or the result of one module, a layer
of a stack, say. So the places where lanes are appended are calls that hold a site of their own each; where they do not
work, calls further out are tried, up to the model itself: there all lanes begin at once. Whether it works is not
decided by what kind of module it is, but by the numbers: every tensor must have as many rows as there are lanes, the
base lane must come out as it did, and a sample of the others as in a forward of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.core.frames import Frame
from nicehooks.core.rules import Action
from nicehooks.core.selection import Group, Site
from nicehooks.core.sessions import Session
from nicehooks.experiments.grids import Cell
from nicehooks.experiments.items import Base, GridItem, Unfit
from nicehooks.experiments.recording import CallsAround, FrameAction, RecordedCall
from nicehooks.experiments.replacements import Replacements
from nicehooks.experiments.runs import Run
from nicehooks.values import trees
from nicehooks.values.trees import Chain, items_of


class Growing:
    """Runs interventions as lanes of one forward; see NOTE [Lanes].

    Args:
        base: the base run.
        replacements: what is put into the cells.
        level: how many calls lie around those that append lanes; 0 is the model itself.
        widens: whether a module that gets fewer rows than there are lanes gets them repeated.
    """

    def __init__(self, base: Base, replacements: Replacements, level: int, widens: bool) -> None:
        self.base = base
        self.replacements = replacements
        self.level = level
        self.widens = widens

    def order(self, item: GridItem) -> tuple[int, ...]:
        """What is run together comes one after the other."""
        return item.time

    def place(self, item: GridItem) -> tuple[int, RecordedCall, str]:
        """When, and at which end of which call, the lane of `item` is appended."""
        if item.call is None:
            raise Unfit(f"nothing calls the module of {str(item.cell.path)!r}")
        if self.replacements.differ_by_call and len(self.base.stems.calls(item.cell.stem)) > 1:
            raise Unfit(f"{str(item.cell.path)!r} is called several times, and what is put there differs between these")
        if item.cell.path.call is not None and not item.cell.path.port.is_output:
            raise Unfit(f"{str(item.cell.path)!r} is what one of several calls is given: its lanes are not told apart")
        call = item.call.around[min(self.level, len(item.call.around) - 1)]
        own = call is item.call and item.cell.path.port.is_output
        return (call.end, call, "after") if own else (call.begin, call, "before")

    def measure(self, items: Sequence[GridItem]) -> Tensor:
        """The metric under each of `items`: `[item]`, or `[item, batch]`.

        Raises:
            Unfit: the model does not work that way.
        """
        placed = sorted([(*self.place(item), at) for at, item in enumerate(items)], key=lambda one: (one[0], one[3]))
        order = [at for *_, at in placed]
        lanes = Lanes(self, placed[0][0], [(call, end) for _, call, end, _ in placed], [items[at] for at in order])
        with CallsAround(self.base.run.model, lanes.actions()):
            output = self.base.run.output()
        metrics = lanes.measured(output)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return metrics[back.to(metrics.device)]


class Lanes:
    """The lanes of one forward.

    Attributes:
        now: how many there are, the base lane included.
        first: the number of the first that is changed.
    """

    first = 1

    def __init__(self, way: Growing, start: int, places: list[tuple[RecordedCall, str]], items: list[GridItem]) -> None:
        self.base = way.base
        self.way = way
        self.items = items
        self.now = 1
        self.counts: Counter[nn.Module] = Counter()
        self.appends = Counter([(call.module, call.number, end) for call, end in places])
        self.calls = {(call.module, call.number): call for call, _ in places}
        self.answers = self.base.answers_by(start, items)
        self.new: list[Tensor] = []  # what was appended to last: made here, so that it may be written into
        self.outer = {around.module for call, _ in places for around in call.around[:-1]}

    def actions(self) -> list[tuple[Any, Action]]:
        """What is done where: first lanes are appended, then values are written into them."""
        sites = {call.module: call.site for call in self.base.recording.calls if self._is_concerned(call)}
        actions: list[tuple[Any, Action]] = [(Group(True, list(sites.values()), True), _Station(self))]
        stems: dict[str, list[tuple[int, GridItem]]] = {}
        for lane, item in enumerate(self.items, self.first):
            stems.setdefault(str(item.cell.stem), []).append((lane, item))
        for of_stem in stems.values():
            cell = of_stem[0][1].cell
            actions.append(([cell.site.at(cell.stem)], _Write(self, of_stem)))
        return actions

    def _is_concerned(self, call: RecordedCall) -> bool:
        key = (call.module, call.number)
        grows = (*key, "before") in self.appends or (*key, "after") in self.appends
        inner = len(call.around) > 1 and call.around[-2].module in self.outer
        return grows or key in self.answers or (self.way.widens and inner)

    def stem(self, path: str) -> Any:
        """The value at the stem `path` in the base run, as far as this forward computes it."""
        return self.base.stems[path]

    def chain_of(self, cell: Cell) -> Chain:
        """The subscripts that lead to `cell` in the value at its stem in this forward."""
        return cell.chain

    def answer(self, call: RecordedCall) -> Any:
        """What is recorded of `call`, for this forward to write into if it likes."""
        return trees.map_tensors(Tensor.clone, call.value)

    def appended(self, tree: Any, count: int, call: RecordedCall | None = None) -> Any:
        """`tree` with `count` more lanes, each a copy of the base lane; `call` is recorded of what returned it."""
        size = self.base.run.batch

        def longer(tensor: Tensor) -> Tensor:
            if not tensor.ndim or tensor.shape[0] != self.now * size:
                return tensor
            first = tensor[:size]
            shape = tensor.shape[1:]
            copies = first.repeat(count, *[1] * len(shape)) if size > 1 else first.expand(count, *shape)
            new = torch.cat([tensor, copies])
            made.append(new)
            return new

        made: list[Tensor] = []
        new = trees.map_tensors(longer, tree)
        self.now += count
        self.new = made
        return new

    def owned(self, tensor: Tensor) -> Tensor:
        """`tensor`, or a copy that may be written into."""
        return tensor.clone() if trees.place_in(self.new, tensor) is None else tensor

    def widened(self, tree: Any) -> Any:
        """`tree` with the tensors that have the rows of one lane repeated for all lanes."""
        size = self.base.run.batch

        def wide(tensor: Tensor) -> Tensor:
            if not tensor.ndim or tensor.shape[0] != size or self.now == 1:
                return tensor
            return repeated(tensor, self.now)

        return trees.map_tensors(wide, tree)

    def measured(self, output: Any) -> Tensor:
        """The metric of each lane but the first."""
        count = len(self.items) + 1
        if self.now != count:
            raise Unfit(f"only {self.now} of {count} lanes were begun")
        metrics = metric_of_lanes(self.base.run, output, count)
        if not is_close(self.base.run, metrics[0], self.base.metric, self.base.metric):
            raise Unfit("the lane in which nothing is changed comes out differently")
        return metrics[1:]


def repeated(rows: Tensor, count: int) -> Tensor:
    """`rows` end to end `count` times; a view, if there is only one."""
    rest = rows.shape[1:]
    return rows.expand(count, *rest) if rows.shape[0] == 1 else rows.repeat(count, *[1] * len(rest))


def metric_of_lanes(run: Run, output: Any, count: int) -> Tensor:
    """The metric of each of `count` lanes in `output`: `[lane]`, or `[lane, batch]`."""
    rows = count * run.batch
    tensors = [leaf for leaf in trees.leaves(output) if isinstance(leaf, Tensor)]
    split = [tensor.ndim > 0 and tensor.shape[0] == rows for tensor in tensors]
    if not any(split):
        raise Unfit(f"the model returns {trees.structure_of(output)}, in which nothing has {rows} rows")
    parts = [t.unflatten(0, (count, run.batch)) if own else t for t, own in zip(tensors, split, strict=True)]

    def of_lane(*leaves: Tensor) -> Tensor:
        one = iter(leaves)
        return run.measured(trees.map_tensors(lambda _: next(one), output))

    try:
        return torch.vmap(of_lane, tuple([0 if own else None for own in split]))(*parts)
    except Exception:  # a metric that looks at numbers, say; if it is wrong, it will say so here
        lanes = [[t[lane] if own else t for t, own in zip(parts, split, strict=True)] for lane in range(count)]
        return torch.stack([of_lane(*lane) for lane in lanes])


def is_close(run: Run, metric: Tensor, expected: Tensor, baseline: Tensor) -> bool:
    """Whether two metrics are the same up to the rounding of what `run` returns, which they were made of."""
    if metric.shape != expected.shape:
        return False
    largest, epsilon = run.scale
    epsilon = max(epsilon, torch.finfo(metric.dtype).eps)
    slack = (256 if epsilon < 1e-4 else 8) * epsilon * max(largest, baseline.abs().max().item())
    far = (metric - expected).abs() - 1e-3 * (expected - baseline).abs()
    return bool(((far <= slack) | (metric == expected) | (metric.isnan() & expected.isnan())).all())


class _Station(FrameAction):
    """Answers calls from the recording, and appends lanes."""

    __slots__ = ("lanes",)

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes

    def before(self, frame: Frame, site: Site) -> None:
        lanes, module = self.lanes, site.module
        number = frame.kept[self] = lanes.counts[module]
        lanes.counts[module] += 1
        call = lanes.answers.get((module, number))
        if call is not None:
            lanes.counts.update([inner.module for inner in call.inside])
            frame.answer = (lanes.answer(call),)
            return
        if lanes.way.widens:
            frame.args, frame.kwargs = lanes.widened((frame.args, frame.kwargs))
        count = lanes.appends[module, number, "before"]
        if count:
            frame.args, frame.kwargs = lanes.appended((frame.args, frame.kwargs), count)

    def after(self, frame: Frame, site: Site) -> None:
        if frame.answer is not None:
            (frame.value,) = frame.answer
        key = site.module, frame.kept[self]
        count = self.lanes.appends[(*key, "after")]
        if count:
            frame.value = self.lanes.appended(frame.value, count, self.lanes.calls[key])


class _Write(Action):
    """Writes what is put into the cells of one stem, each into its own lane."""

    __slots__ = ("items", "lanes")
    verb = "sweep"

    def __init__(self, lanes: Lanes, items: list[tuple[int, GridItem]]) -> None:
        self.lanes = lanes
        self.items = items

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        lanes = self.lanes
        items = [(lane, item) for lane, item in self.items if lane < lanes.now]
        if not items:
            return value
        path = str(items[0][1].cell.stem)
        base = lanes.base.stems[path]
        sizes = iter(_rows_of_lanes(value, lanes.stem(path), lanes.now))
        own = trees.map_tensors(
            lambda tensor: tensor if trees.place_in(lanes.new, tensor) is not None else tensor.clone(), value
        )
        split = trees.map_tensors(lambda tensor: tensor.unflatten(0, (lanes.now, next(sizes))), own)
        for lane, item in items:
            cell, chain = item.cell, lanes.chain_of(item.cell)
            block = trees.map_tensors(lambda tensor, lane=lane: tensor[lane], split)
            region = trees.get(block, chain)
            new = lanes.way.replacements.new(item.alternative, cell, base, region)
            write_lane(block, chain, region, new)
        return own


def _rows_of_lanes(value: Any, base: Any, count: int) -> list[int]:
    """How many rows a lane has in each tensor of `value`, which is `base` in the base run."""
    pairs = list(zip(trees.leaves(value), trees.leaves(base), strict=False))
    for one, other in [pair for pair in pairs if any([isinstance(leaf, Tensor) for leaf in pair])]:
        fits = isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim > 0
        if not fits or one.shape[0] != count * other.shape[0] or one.shape[1:] != other.shape[1:]:
            raise Unfit(f"{trees.structure_of(value)} does not have the rows of {count} lanes")
    return [other.shape[0] for _, other in pairs if isinstance(other, Tensor)]


def write_lane(block: Any, chain: Chain, region: Any, new: Any) -> None:
    """Writes `new` into the `region` at the end of `chain` in `block`, in place."""
    if any([isinstance(item, list) for step in chain for item in items_of(step)]):
        region, new = block, trees.rewrite(block, chain, lambda _: new)  # such a region is no view
    for old, other in zip(trees.leaves(region), trees.leaves(new), strict=True):
        if isinstance(old, Tensor):
            old.copy_(other)
        elif old is not other:
            raise Unfit(f"{trees.structure_of(region)} is not made of tensors that have rows")
