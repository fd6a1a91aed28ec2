"""The effects of many interventions: a grid of numbers whose axes have labels.

NOTE [Kinds of effects]
Edges, verified effects and some others know more than the numbers of their grid. That goes into files and into other
units with them: `_beside` is what is written into a file, `_take_from` reads it again, and `_take_over` takes it from
effects of the same kind, with each metric `m` as `(m - low) / span`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.caches.cache import ActivationCache
from nicehooks.errors import FileFault, NiceHooksError, TreeMismatch
from nicehooks.experiments.given import count_given, number_given
from nicehooks.extras import needs
from nicehooks.pictures.grids import grid_view
from nicehooks.pictures.pages import Page
from nicehooks.pictures.plots import plot_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
    from typing_extensions import Self


class Axis(NamedTuple):
    """One axis of a grid of effects: what it is ("layer", "position", "head"), and a label for each index."""

    name: str
    labels: tuple[str, ...]


class Effect(NamedTuple):
    """One cell of a grid of effects.

    Attributes:
        site: the path at which the intervention acted.
        labels: the label of the cell on each axis.
        value: the effect.
    """

    site: str
    labels: tuple[str, ...]
    value: float


class Effects:
    """What each of many interventions does to a metric, each alone: the metric under it, minus the metric without.

    >>> import torch
    >>> from nicehooks.experiments.effects import Axis
    >>> axes = [Axis("layer", ("0", "1")), Axis("position", ("the", "cat"))]
    >>> effects = Effects(torch.tensor([[0.0, 2.0], [-3.0, 1.0]]), axes, torch.tensor(5.0))
    >>> effects
    Effects(layer 2 × position 2, from -3 to 2, baseline 5)
    >>> effects.top(1)
    [Effect(site='', labels=('1', 'the'), value=-3.0)]

    Attributes:
        values: `[*axes]`, the mean effect over the examples of the batch.
        axes: an `Axis` for each dimension of `values`.
        baseline: the metric without an intervention: a scalar, or `[batch]`.
        sites: the paths of the cells, in the order of `values.flatten()`; they repeat along an axis of alternatives.
        examples: `[*axes, batch]`, the effect on each example; None where the metric is one number for the whole batch.
        notes: sentences on how the numbers were come by.
    """

    def __init__(
        self,
        values: Tensor,
        axes: Sequence[Axis],
        baseline: Tensor,
        sites: Sequence[str] = (),
        examples: Tensor | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        shape = tuple([len(axis.labels) for axis in axes])
        if tuple(values.shape) != shape:
            raise TreeMismatch(f"a grid of {shape} cells cannot hold effects of shape {tuple(values.shape)}.")
        self.values = values
        self.axes = tuple([Axis(axis[0], tuple(axis[1])) for axis in axes])
        self.baseline = baseline
        self.sites = tuple(sites) or ("",) * values.numel()
        self.examples = examples
        self.notes = tuple(notes)

    @property
    def metrics(self) -> Tensor:
        """`[*axes]`, the mean metric under each intervention: the effect, on top of the baseline."""
        return self.values + self.baseline.mean()

    @property
    def spread(self) -> Tensor | None:
        """`[*axes]`, the standard deviation of the effect over the examples; None where there is one number for all."""
        few = self.examples is None or self.examples.shape[-1] < 2
        return None if few else self.examples.std(dim=-1)  # type: ignore[union-attr]

    def cells(self) -> list[Effect]:
        """Every cell, in the order of `values.flatten()`."""
        return list(map(Effect, self.sites, self._labels(), self.values.flatten().tolist()))

    def top(self, k: int = 10) -> list[Effect]:
        """The `k` largest effects, of either sign, largest first."""
        k = count_given(k, "top(k")
        ranks = self.values.flatten().abs().nan_to_num(-1.0)
        cells = self.cells()
        return [cells[index] for index in ranks.topk(min(k, len(ranks))).indices.tolist()]

    def normalized(self, clean: float | Tensor, corrupted: float | Tensor) -> Self:
        """The effects in parts of the way from the metric `corrupted` to the metric `clean`.

        Where the baseline is the corrupted run, 0 is an intervention that does nothing and 1 one that brings back the
        clean run; where it is the clean run, −1 is one that does all that the corruption does.

        >>> import torch
        >>> effects = Effects(torch.tensor([0.0, 2.0]), [Axis("layer", ("0", "1"))], torch.tensor(-1.0))
        >>> effects.normalized(clean=3.0, corrupted=-1.0).values
        tensor([0.0000, 0.5000])

        Args:
            clean: the metric of the clean run; a mean is taken over a batch.
            corrupted: the metric of the corrupted run.

        Raises:
            TypeError: one is no number.
            NiceHooksError: both are the same, or one is NaN.
        """
        ends = {"clean": clean, "corrupted": corrupted}
        high, low = [_mean_of(value, f"normalized(…, {name}", self.values.dtype) for name, value in ends.items()]
        span = high - low
        if not span.abs() > 0:
            raise NiceHooksError(
                f"the metric is {low.item():.4g} clean and corrupted: there is no way between to measure on."
            )
        span, low = span.to(self.values.device), low.to(self.values.device)
        examples = None if self.examples is None else self.examples / span
        found = type(self)(
            self.values / span, self.axes, (self.baseline - low) / span, self.sites, examples, self.notes
        )
        found._take_over(self, low.item(), span.item())
        return found

    def to_pandas(self) -> DataFrame:
        """A table with a row for each cell: a column for each axis, then `effect`, perhaps `spread`, and `site`.

        Raises:
            MissingExtra: pandas is not installed.
        """
        with needs("pandas"):
            import pandas
        columns: dict[str, Any] = {}
        for axis, labels in zip(self.axes, zip(*self._labels(), strict=True), strict=True):
            columns[axis.name] = list(labels)
        columns["effect"] = self.values.flatten().tolist()
        if self.spread is not None:
            columns["spread"] = self.spread.flatten().tolist()
        return pandas.DataFrame({**columns, "site": list(self.sites)})

    def plot(self, ax: Axes | None = None, title: str = "") -> Any:
        """Draws the effects with matplotlib: bars for one axis, a heat map for two, several heat maps for more.

        Of more than two axes the two longest are rows and columns. Each combination of the others is a heat map of its
        own; where these would be more than six, one heat map has their mean.

        Args:
            ax: the axes of matplotlib to draw on; new ones, in a figure of their own, where it is left out.
            title: what stands above the picture.

        Returns:
            The axes, whose `.figure` has `savefig`; a list of them where there are several heat maps.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        return plot_grid(self.values, self.axes, ax, title, self.spread)

    def to_html(self, file: str | Path, title: str = "effects") -> Path:
        """Writes the effects as an interactive page that needs nothing beside itself, and returns its path.

        The value of a cell is shown under the pointer, a click sorts by a row or a column; the keyboard does both.

        Raises:
            FileMissing: there is no such folder.
            PlotError: the file cannot be written.
        """
        return self._page(title).to_html(file)

    def _page(self, title: str) -> Page:
        return grid_view(self.values, self.axes, title, self.spread, self.sites, [self._summary(), *self.notes])

    def _repr_html_(self) -> str:
        return self._page("effects")._repr_html_()

    def save(self, file: Any) -> None:
        """Writes the effects to a safetensors file, which `Effects.load` reads.

        Raises:
            FileFault: the file cannot be written.
        """
        labels = json.dumps([self.axes, self.sites, self.notes, type(self).__name__])
        content = {"values": self.values, "baseline": self.baseline, "examples": self.examples, "labels": labels}
        ActivationCache({**content, **self._beside()}).save(file)

    @classmethod
    def load(cls, file: Any) -> Self:
        """The effects that `save` has written to `file`, of the kind that they were.

        Raises:
            FileFault: the file cannot be read, or holds something else.
        """
        content = dict(ActivationCache.load(file))
        try:
            axes, sites, notes, kind = json.loads(content["labels"])
            named = [Axis(name, tuple(labels)) for name, labels in axes]
            found = _KINDS[kind](content["values"], named, content["baseline"], sites, content["examples"], notes)
            found._take_from(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise FileFault(f"{str(file)!r} cannot be read: it holds no effects. Effects.save writes them.") from None
        if not isinstance(found, cls):
            raise FileFault(OTHER_KIND.format(file=str(file), kind=kind, wanted=cls.__name__))
        return found

    # What effects of a kind of their own have beside the numbers; see NOTE [Kinds of effects].

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

    def _beside(self) -> dict[str, Any]:
        return {}

    def _take_from(self, content: Mapping[str, Any]) -> None:
        pass

    def _take_over(self, other: Any, low: float, span: float) -> None:
        pass

    def _labels(self) -> Iterator[tuple[str, ...]]:
        """The labels of each cell, in the order of `values.flatten()`."""
        return product(*[axis.labels for axis in self.axes])

    def __repr__(self) -> str:
        return f"Effects({self._summary()})"

    def _summary(self) -> str:
        size = " × ".join([f"{axis.name} {len(axis.labels)}" for axis in self.axes]) or "one"
        there = self.values[~self.values.isnan()]  # what an interrupt has left undone is NaN
        if not there.numel():
            return f"{size}, no cells"
        low, high, base = there.min().item(), there.max().item(), self.baseline.mean().item()
        return f"{size}, from {low:.4g} to {high:.4g}, baseline {base:.4g}"


_KINDS: dict[str, type[Effects]] = {"Effects": Effects}
"""All kinds of effects, by their names."""

OTHER_KIND = "{file!r} holds {kind}, and not {wanted}: {kind}.load reads it."


def _mean_of(metric: Any, what: str, dtype: torch.dtype) -> Tensor:
    """The mean of the metric of a run; `what` is the call as it is written, up to the argument."""
    given = metric if isinstance(metric, Tensor) else torch.tensor(number_given(metric, what))
    mean = given.to(dtype).mean()
    if mean.isnan():
        raise NiceHooksError(f"{what}={metric!r}): the metric of this run is NaN, so there is no way to measure on.")
    return mean


def is_grid(labels: Sequence[Sequence[str]]) -> bool:
    """Whether cells with these labels fill a grid: each combination of the labels of its axes is there once.

    >>> is_grid([("0", "a"), ("0", "b"), ("1", "a"), ("1", "b")]), is_grid([("0", "a"), ("1", "b")])
    (True, False)
    """
    axes = [set(column) for column in zip(*labels, strict=True)]
    return len(set(map(tuple, labels))) == len(labels) == math.prod(map(len, axes))
