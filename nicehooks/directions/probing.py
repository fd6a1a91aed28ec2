"""`probe`: what can be read off activations by a linear function, on examples that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nicehooks.caches.arguments import BadArgument, whole_number
from nicehooks.directions.labels import known_labels
from nicehooks.errors import TreeMismatch
from nicehooks.extras import needs
from nicehooks.harvesting.activation_store import ActivationStore
from nicehooks.harvesting.shuffling import order_of


@dataclass(frozen=True)
class Probe:
    """A linear probe of one place.

    Attributes:
        score: how well it does on examples that were held out: the part that is right, or R² of numbers.
        control: the same where the labels it was fitted to were shuffled: what there is to win by chance.
        direction: what it looks for, `[d]`, or `[class, d]` for more than two classes; for the values as they are.
        bias: what is added.
        classes: the labels, in order; None of numbers.
        held_out: how many rows were held out.
    """

    score: float
    control: float
    direction: Tensor
    bias: Tensor
    classes: list[Any] | None
    held_out: int

    def __call__(self, values: Tensor) -> Tensor:
        """What it says of values `[…, d]`: logits, or numbers."""
        return values.to(self.direction.dtype) @ self.direction.t() + self.bias

    def __repr__(self) -> str:
        return f"Probe(score={self.score:.3f}, control={self.control:.3f}, held_out={self.held_out})"


def probe(
    values: ActivationStore | Mapping[str, Tensor],
    labels: Any,
    *,
    held_out: float = 0.25,
    rows: int = 20_000,
    seed: int = 0,
    strength: float = 1.0,
) -> dict[str, Probe]:
    """Fits a linear probe at each place, and says how well it does on examples that it has not seen.

    >>> import torch
    >>> x = torch.randn(400, 8)
    >>> found = probe({"h.3": x}, x[:, 2] > 0)
    >>> found["h.3"].score > 0.9, abs(found["h.3"].control - 0.5) < 0.2
    (True, True)
    >>> int(found["h.3"].direction.abs().argmax())
    2

    A probe can find what a model does not use, and a large one what only its labels have (Hewitt and Liang 2019,
    https://arxiv.org/abs/1909.03368): hence the control, and a function that is linear.

    Args:
        values: a store, or a cache of tensors `[example, d]`.
        labels: a label for each row or example: a tensor or a list; of a store also a mapping from the numbers of its
            samples, or a function of some `StoredRows` that returns theirs. Truth values, whole numbers and text are
            classes; floating numbers are predicted.
        held_out: which part is held out; all rows of a sample are, or none.
        rows: how many rows of a store are looked at, at most; they are chosen at random.
        seed: of that choice, of who is held out, and of the control.
        strength: how little the weights are pulled towards zero, `C` of scikit-learn's `LogisticRegression`.

    Returns:
        A `Probe` by the path of each place.

    Raises:
        TreeMismatch: there are not as many labels as rows, all of them are the same, or a value is not `[example, d]`,
            or not finite.
        BadArgument: a number makes no sense.
        MissingExtra: scikit-learn is not installed.
    """
    if not 0 < held_out < 1 or not strength > 0:
        raise BadArgument(f"held_out={held_out}, strength={strength}: the one is between 0 and 1, the other above 0")
    rows, seed = whole_number(rows, "rows", 2), whole_number(seed, "seed", 0)
    with needs("probe"):
        import sklearn as sklearn
    found, known, groups = _looked_at(values, labels, rows, seed)
    fitting = _Fitting(known, groups, held_out, seed, strength)
    return {key: fitting.fitted(key, value) for key, value in found.items()}


def _looked_at(values: Any, labels: Any, rows: int, seed: int) -> tuple[dict[str, Tensor], Any, Tensor]:
    """What is looked at, with its labels, and what belongs together."""
    if not isinstance(values, ActivationStore):
        tensors = _tensors_of(values)
        count = len(next(iter(tensors.values()), ()))
        return tensors, known_labels(labels, count), torch.arange(count)
    places = order_of(len(values), True, seed, (0, 1), rows, 0)
    chosen = values.rows(places)
    if callable(labels):
        known: Any = labels(chosen)
    elif isinstance(labels, Mapping):
        missing = sorted(set(chosen.sample.tolist()) - set(labels))
        if missing:
            raise TreeMismatch(f"probe takes a label for each sample: there is none for sample {missing[0]}.")
        known = [labels[sample] for sample in chosen.sample.tolist()]
    else:
        known = known_labels(labels, len(values))[places.numpy()]
    return dict(chosen), known_labels(known, len(chosen.sample)), chosen.sample


def _tensors_of(values: Any) -> dict[str, Tensor]:
    """The tensors of a cache."""
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise TreeMismatch('probe takes a store, or a cache of tensors: probe({"h.3": values}, labels)')
    return {str(key): value.detach().cpu() for key, value in values.items()}


class _Fitting:
    """One way of dividing the rows, for all places."""

    def __init__(self, labels: Any, groups: Tensor, held_out: float, seed: int, strength: float) -> None:
        import numpy
        from sklearn.model_selection import GroupShuffleSplit

        self.labels: Any = labels
        self.numbers = labels.dtype.kind == "f"
        samples = len(groups.unique())
        if not 1 <= math.ceil(held_out * samples) < samples:
            raise TreeMismatch(f"probe holds out {held_out} of the samples: with {samples} of them none would be left.")
        split = GroupShuffleSplit(1, test_size=held_out, random_state=seed)
        self.train, self.test = next(split.split(self.labels, self.labels, groups.numpy()))
        kinds = numpy.unique(self.labels[self.train])
        if len(kinds) < 2:
            raise TreeMismatch(f"probe has nothing to tell apart: all {len(self.train)} rows it fits are {kinds[0]}.")
        self.shuffled = self.labels[self.train][numpy.random.default_rng(seed).permutation(len(self.train))]
        self.strength = strength

    def fitted(self, key: str, value: Tensor) -> Probe:
        """The probe at one place."""
        if value.ndim != 2 or len(value) != len(self.labels):
            raise TreeMismatch(f"{key!r} has the shape {list(value.shape)}: probe takes [{len(self.labels)}, d].")
        if value.is_complex() or not value.shape[1] or not value.double().isfinite().all():
            raise TreeMismatch(f"{key!r} has values that are no finite numbers, or none at all: probe cannot fit them.")
        x: Any = value.double().numpy()
        real, control = self._fit(x, self.labels[self.train]), self._fit(x, self.shuffled)
        score, chance = (float(one.score(x[self.test], self.labels[self.test])) for one in (real, control))
        scaler, linear = real[0], real[-1]
        weight = torch.as_tensor(linear.coef_).reshape(-1, value.shape[1]) / torch.as_tensor(scaler.scale_)
        bias = torch.as_tensor(linear.intercept_).reshape(-1) - weight @ torch.as_tensor(scaler.mean_)
        one = len(weight) == 1
        classes = None if self.numbers else linear.classes_.tolist()
        return Probe(
            score,
            chance,
            weight[0].float() if one else weight.float(),
            bias[0].float() if one else bias.float(),
            classes,
            len(self.test),
        )

    def _fit(self, x: Any, labels: Any) -> Any:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        linear = Ridge(1 / self.strength) if self.numbers else LogisticRegression(C=self.strength, max_iter=1000)
        return make_pipeline(StandardScaler(), linear).fit(x[self.train], labels)
