"""`probe`: what can be read off activations by a linear function, on examples that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        TreeMismatch: there are not as many labels as rows, or a value is not `[example, d]`.
        MissingExtra: scikit-learn is not installed.
    """
    with needs("probe"):
        import sklearn as sklearn
    found, known, groups = _looked_at(values, labels, rows, seed)
    fitting = _Fitting(known, groups, held_out, seed, strength)
    return {key: fitting.fitted(key, value) for key, value in found.items()}


def _looked_at(values: Any, labels: Any, rows: int, seed: int) -> tuple[dict[str, Tensor], Any, Tensor]:
    """What is looked at, with its labels, and what belongs together."""
    if not isinstance(values, ActivationStore):
        tensors = {str(key): value.detach().cpu() for key, value in values.items()}
        count = len(next(iter(tensors.values()), ()))
        return tensors, _as_many(labels, count), torch.arange(count)
    places = order_of(len(values), True, seed, (0, 1), rows, 0)
    chosen = values.rows(places)
    if callable(labels):
        known: Any = labels(chosen)
    elif isinstance(labels, Mapping):
        known = [labels[int(sample)] for sample in chosen.sample]
    else:
        known = _labels_at(_as_many(labels, len(values)), places)
    return dict(chosen), _as_many(known, len(chosen.sample)), chosen.sample


def _labels_at(labels: Any, places: Tensor) -> Any:
    return labels[places] if isinstance(labels, Tensor) else [labels[place] for place in places.tolist()]


def _as_many(labels: Any, count: int) -> Any:
    if len(labels) != count:
        raise TreeMismatch(f"probe takes a label for each row: there are {len(labels)} labels for {count} rows.")
    return labels


class _Fitting:
    """One way of dividing the rows, for all places."""

    def __init__(self, labels: Any, groups: Tensor, held_out: float, seed: int, strength: float) -> None:
        import numpy
        from sklearn.model_selection import GroupShuffleSplit

        known = (
            torch.as_tensor(labels).cpu() if not isinstance(labels, list) or not isinstance(labels[0], str) else None
        )
        self.numbers = known is not None and known.is_floating_point()
        self.labels: Any = numpy.asarray(labels if known is None else known.numpy())
        split = GroupShuffleSplit(1, test_size=held_out, random_state=seed)
        self.train, self.test = next(split.split(self.labels, self.labels, groups.numpy()))
        self.shuffled = self.labels[self.train][numpy.random.default_rng(seed).permutation(len(self.train))]
        self.strength = strength

    def fitted(self, key: str, value: Tensor) -> Probe:
        """The probe at one place."""
        if value.ndim != 2 or len(value) != len(self.labels):
            raise TreeMismatch(f"{key!r} has the shape {list(value.shape)}: probe takes [{len(self.labels)}, d].")
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
