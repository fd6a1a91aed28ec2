"""What an experiment puts into each cell: one value, or one for each of several alternatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.subspaces import checked_basis, within
from nicehooks.contexts.user_functions import call_user, takes_site
from nicehooks.errors import NotCaptured, TreeMismatch
from nicehooks.experiments.effects import Axis, Effects
from nicehooks.experiments.grids import Cell, Grid
from nicehooks.values import trees

RESAMPLE = "resample"

Source = Callable[[Cell, Any, Any], Any]
"""`source(cell, region, base)`: what is assigned to the `region` of the cell; `base` is its stem in the base run."""


class Replacements(NamedTuple):
    """What is put into each cell.

    Attributes:
        verb: whose they are, for messages.
        values: one for each alternative, as it was given.
        sources: what makes of each what is put into a cell.
        axis: of the alternatives; None where there is one value.
        subspace: a basis, `[d, k]`: only the component within it is replaced; None for all of it.
    """

    verb: str
    values: list[Any]
    sources: tuple[Source, ...]
    axis: Axis | None
    subspace: Tensor | None

    def is_function(self, alternative: int) -> bool:
        """Whether it is a function of what stands in the cell."""
        return isinstance(self.sources[alternative], _ByFunction)

    @property
    def differ_by_call(self) -> bool:
        """Whether they depend on what the base run has in the cell, of which each call has its own."""
        return any([isinstance(source, _FromNextExample) for source in self.sources])

    @property
    def depend_on_region(self) -> bool:
        """Whether what takes the place of a value depends on it."""
        return self.subspace is not None or any(map(self.is_function, range(len(self.sources))))

    def new(self, alternative: int, cell: Cell, base: Any, region: Any) -> Any:
        """What takes the place of `region`, cast and broadcast as in an assignment.

        Args:
            alternative: which one.
            cell: where.
            base: the value at the stem of the cell in the base run.
            region: what stands in the cell in this run.
        """
        try:
            given = self.sources[alternative](cell, region, base)
            new = region if given is None and self.is_function(alternative) else trees.assign(region, given)
            return new if self.subspace is None or trees.is_same(new, region) else within(self.subspace, region, new)
        except TreeMismatch as error:
            raise TreeMismatch(f"{self.verb} at {str(cell.path)!r}: {error}") from None

    def around(self, alternative: int, cell: Cell, base: Any) -> Any:
        """What takes the place of `base`, the value at the stem of a cell, if all its cells get their parts of that.

        None where what a cell gets depends on the cell.
        """
        source = self.sources[alternative]
        if self.subspace is not None or not isinstance(source, _OfStem):
            return None
        try:
            whole = source.whole(cell, base)
            return None if whole is None else trees.assign(base, whole)
        except TreeMismatch:  # it does not fit as a whole, but its parts may
            return None

    def effects(self, each: Tensor, grid: Grid, baseline: Tensor, notes: Sequence[str]) -> Effects:
        """The effects as a grid: `each` is `[item]`, or `[item, batch]`, the cells of one alternative after another."""
        axes = (*([] if self.axis is None else [self.axis]), *grid.axes)
        every = each.reshape(*[len(axis.labels) for axis in axes], *each.shape[1:])
        values, examples = (every.mean(-1), every) if each.ndim > 1 else (every, None)
        return Effects(values, axes, baseline, grid.sites * len(self.sources), examples, notes)


def replacements_of(
    values: Any, regions: Iterable[Any], subspace: Tensor | None, batch: int, verb: str = "sweep"
) -> Replacements:
    """What `values` puts into each cell, within the `subspace`, if `regions` are what stands in the cells.

    Of the inputs, the first dimension has `batch` examples.

    Raises:
        TypeError: it is another text than `"resample"`.
        TreeMismatch: it is a tensor that does not fit there, or the basis of the subspace is none.
    """
    each, axis = _alternatives(values, regions, verb)
    if not each:
        raise TreeMismatch(f"{verb}(model, where, values, …): values has no alternative in it.")
    sources = tuple([_source(one, verb, batch) for one in each])
    return Replacements(verb, each, sources, axis, checked_basis(subspace))


def _alternatives(values: Any, regions: Iterable[Any], verb: str) -> tuple[list[Any], Axis | None]:
    if isinstance(values, list):
        return values, _axis_of([str(one) if isinstance(one, Real) else str(at) for at, one in enumerate(values)])
    if not isinstance(values, Tensor):
        return [values], None
    shapes = {region.shape: region for region in regions if isinstance(region, Tensor)}
    if all([trees.fits(values.shape, shape) for shape in shapes]):
        return [values], None
    if not all([values.ndim == len(shape) + 1 and trees.fits(values.shape[1:], shape) for shape in shapes]):
        unlike = next(region for shape, region in shapes.items() if not trees.fits(values.shape, shape))
        here, there = trees.structure_of(values), trees.structure_of(unlike)
        raise TreeMismatch(NEITHER.format(verb=verb, here=here, there=there))
    return list(values), _axis_of(
        [f"{one.item():.4g}" if one.numel() == 1 else str(at) for at, one in enumerate(values)]
    )


def _axis_of(labels: Sequence[str]) -> Axis:
    """The axis of alternatives: by their numbers, or places; by the places alone where these cannot be told apart."""
    apart = len(set(labels)) == len(labels)
    return Axis("alternative", tuple(labels if apart else [f"#{at}" for at in range(len(labels))]))


NEITHER = (
    "{verb}(model, where, values, …): {here} is neither a value for {there}, nor several along a new first dimension."
)


def _is_user_function(value: Any) -> TypeGuard[Callable[[Any], Any]]:
    return callable(value) and not isinstance(value, Tensor | Mapping)


def _source(value: Any, verb: str, batch: int) -> Source:
    if isinstance(value, str) and value == RESAMPLE:
        return _FromNextExample(verb, batch)
    if isinstance(value, Mapping):
        return _FromCache(cast(Any, value), verb)
    if _is_user_function(value):
        return _ByFunction(value)
    if isinstance(value, str | bytes):
        raise TypeError(NO_TEXT.format(verb=verb, value=value))
    if isinstance(value, Real):
        return _Number(float(value) if not isinstance(value, int) else value)
    return lambda cell, region, base: value


class _ByFunction:
    """What a function of the user's makes of what stands there, as in `edit`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.takes_site = takes_site(fn)

    def __call__(self, cell: Cell, region: Any, base: Any) -> Any:
        return call_user(self.fn, self.takes_site, region, str(cell.path), cell.site)


class _OfStem(ABC):
    """A source that gives each cell its part of a whole value at its stem."""

    @abstractmethod
    def __call__(self, cell: Cell, region: Any, base: Any) -> Any:
        """See `Source`."""

    @abstractmethod
    def whole(self, cell: Cell, base: Any) -> Any:
        """What the cells of the stem of `cell` get their parts of; None where there is no such value."""


class _Number(_OfStem):
    """The same number everywhere."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __call__(self, cell: Cell, region: Any, base: Any) -> Any:
        return self.number

    def whole(self, cell: Cell, base: Any) -> Any:
        return self.number


class _FromNextExample(_OfStem):
    """What the next example of the batch has there; the last one has what the first has."""

    def __init__(self, verb: str, batch: int) -> None:
        self.verb = verb
        self.batch = batch

    def __call__(self, cell: Cell, region: Any, base: Any) -> Any:
        return trees.get(self.whole(cell, base), cell.chain)

    def whole(self, cell: Cell, base: Any) -> Any:
        path = str(cell.path)
        if self.batch < 2:
            raise TreeMismatch(NO_NEXT.format(verb=self.verb, path=path, count=self.batch))

        def next_one(tensor: Tensor) -> Tensor:
            if not (cell.comes_by and tensor.ndim) or tensor.shape[0] != self.batch:
                shape = trees.structure_of(tensor)
                raise TreeMismatch(NO_EXAMPLES.format(verb=self.verb, path=path, shape=shape, count=self.batch))
            return torch.roll(tensor, -1, 0)

        return trees.map_tensors(next_one, base)


def _spread_over(base: Any, whole: Any) -> Any:
    """`whole` with the shape of `base`, where it is a tensor that broadcasts to it: a mean over positions, say."""
    both = isinstance(whole, Tensor) and isinstance(base, Tensor)
    return (
        whole.expand(base.shape)
        if both and whole.shape != base.shape and trees.fits(whole.shape, base.shape)
        else whole
    )


class _FromCache(_OfStem):
    """The value that a cache has at the path of a cell."""

    def __init__(self, values: Mapping[str, Any], verb: str) -> None:
        self.verb = verb
        of_paths = isinstance(values, ActivationCache)
        self.cache = values if of_paths else ActivationCache({str(path): value for path, value in values.items()})
        self.stems: dict[str, Any] = {}

    def __call__(self, cell: Cell, region: Any, base: Any) -> Any:
        whole = self.whole(cell, base)
        if whole is None:
            return self._directly(cell)
        return trees.get(_spread_over(base, whole), cell.chain)

    def whole(self, cell: Cell, base: Any) -> Any:
        stem = str(cell.stem)
        if stem not in self.stems:
            self.stems[stem] = self.cache.get(stem)
        return self.stems[stem]

    def _directly(self, cell: Cell) -> Any:
        try:
            return self.cache[str(cell.path)]
        except NotCaptured as error:
            raise NotCaptured(NO_VALUE.format(verb=self.verb, path=str(cell.path), error=error)) from None


NO_TEXT = "{verb}(model, where, values, …) takes a number, a tensor, a cache, a function or 'resample', not {value!r}."

NO_NEXT = "{verb} at {path!r}: 'resample' takes the value of the next example, and there is {count} in the batch."

NO_EXAMPLES = (
    "{verb} at {path!r}: 'resample' takes the value of the next example, and the first dimension of {shape} is not "
    "that of the {count} examples.\n    values=lambda value: value.roll(-1, 1)  # if they are in the second, say"
)

NO_VALUE = "{verb}(model, where, values, …) has no value for {path!r}: {error}"
