"""Exact effects where estimates are largest, and what the estimates may have missed elsewhere."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError, SweepMismatch
from nicehooks.experiments.acting import Intervened
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.estimates import Experiment
from nicehooks.experiments.given import count_given
from nicehooks.experiments.lanes import is_close
from nicehooks.experiments.scheduling import CHANGES


class Attribution(Effects):
    """Effects that were estimated from gradients; `verify` makes the largest of them exact."""

    experiment: Experiment | None = None

    def verify(self, k: int = 10, samples: int = 64, seed: int = 0) -> Verified:
        """The same grid, with exact effects at the `k` cells whose estimates are largest.

        What the estimates may have missed among the other cells is tested as in AtP* (Kramár et al. 2024): random
        halves of them are patched, all cells of a half together, and the effect of each cell is told from the halves
        that have it and those that do not. So the bound holds for the effect of a cell on average over such halves.

        What is verified already can be verified further: then the cells that are exact stay so, and `k` more become so.

        Args:
            k: how many cells; each costs one run of the model.
            samples: how many random halves are patched, one run each; with 0, nothing is said of the other cells.
            seed: of the halves.

        Returns:
            The effects. Their attributes say which are `exact`, what share of the runs of a whole sweep was `spent`,
            and what is known of those `missed`.

        Raises:
            TypeError, ValueError: `k` or `samples` is no number of them.
            NiceHooksError: the effects are from a file, or were normalized: there is no model to run.
            SweepMismatch: a second run of the model differs from the first.
        """
        count_given(k, "verify(k")
        count_given(samples, "verify(…, samples")
        if self.experiment is None:
            raise NiceHooksError(NO_MODEL_TO_VERIFY)
        return verified(self, self.experiment, k, samples, seed)


NO_MODEL_TO_VERIFY = (
    "verify runs the model, which effects from a file, or in other units, do not have any more. Verify first:\n"
    "    attribute(model, …).verify(k).normalized(clean, corrupted)"
)


class Verified(Attribution):
    """Effects of which the largest are exact.

    Attributes:
        exact: `[*axes]`, which of them are.
        spent: the runs of the model that it took, as a share of those of a whole sweep.
        missed: what is known of the cells that are not exact; None if nothing was asked.
    """

    exact: Tensor
    spent: float
    missed: Missed | None

    def _beside(self) -> dict[str, Any]:
        if self.missed is None:
            return {"exact": self.exact, "beside": json.dumps([self.spent])}
        bound, effects, errors, *rest = self.missed
        said = json.dumps([self.spent, bound, *rest])
        return {"exact": self.exact, "missed": torch.stack([effects, errors]), "beside": said}

    def _take_from(self, content: Mapping[str, Any]) -> None:
        self.exact = content["exact"]
        self.spent, *rest = json.loads(content["beside"])
        bound, *more = rest or [None]
        self.missed = Missed(bound, *content["missed"], *more) if rest else None

    def _take_over(self, other: Verified, low: float, span: float) -> None:
        self.exact, self.spent = other.exact, other.spent
        self.missed = None if other.missed is None else other.missed.scaled(1 / span)


class Missed(NamedTuple):
    """What random halves of the cells that were not verified say of them; see `Attribution.verify`.

    Attributes:
        bound: no such cell has an effect larger than this, with `confidence`.
        effects: `[*axes]`, the effect of each such cell on average over the halves; NaN where it was verified.
        errors: `[*axes]`, the standard errors of these.
        confidence: the probability with which the bound holds for a cell.
        samples: how many halves there were.
    """

    bound: float
    effects: Tensor
    errors: Tensor
    confidence: float
    samples: int

    def scaled(self, factor: float) -> Missed:
        """The same of effects that are `factor` times as large."""
        size = abs(factor)
        effects, errors = self.effects * factor, self.errors * size
        return self._replace(bound=self.bound * size, effects=effects, errors=errors)


CONFIDENCE = 0.95


def verified(estimates: Attribution, experiment: Experiment, k: int, samples: int, seed: int) -> Verified:
    """`estimates` with exact effects at the `k` largest, beside those that are exact; see `Attribution.verify`."""
    alternatives = range(len(experiment.replacements.sources))
    places = [Intervened(alternative, cell) for alternative in alternatives for cell in experiment.grid.cells]
    _check_repeats(experiment)
    exact, spent, notes = _known_of(estimates)
    sizes = estimates.values.flatten().abs().masked_fill(exact.to(estimates.values.device), -1.0)
    chosen = sorted(sizes.topk(min(k, int((~exact).sum()))).indices.tolist())
    values, examples = estimates.values.clone(), None if estimates.examples is None else estimates.examples.clone()
    for at in chosen:
        effect = effect_of(experiment, [places[at]])
        values.view(-1)[at] = effect.mean()
        if examples is not None:
            examples.view(-1, examples.shape[-1])[at] = effect
    exact[chosen] = True
    left = {at: place for at, place in enumerate(places) if not exact[at]}
    missed = missed_among(experiment, left, samples, seed, estimates.values) if left and samples else None
    runs = round(spent * len(places)) + len(chosen) + (samples if missed else 0)
    said = [*notes, *_notes(values.flatten()[exact.to(values.device)], len(places), runs, missed)]
    result = Verified(values, estimates.axes, estimates.baseline, estimates.sites, examples, said)
    result.experiment = experiment
    result.exact, result.spent, result.missed = exact.reshape(values.shape), runs / max(len(places), 1), missed
    return result


def _known_of(estimates: Attribution) -> tuple[Tensor, float, Sequence[str]]:
    """Which effects are exact already, flat, what that has spent, and the notes on the estimates alone."""
    if not isinstance(estimates, Verified):
        return torch.zeros(estimates.values.numel(), dtype=torch.bool), 0.0, estimates.notes
    own = len(_notes(estimates.values[estimates.exact.to(estimates.values.device)], 1, 0, estimates.missed))
    return estimates.exact.flatten().clone(), estimates.spent, estimates.notes[: len(estimates.notes) - own]


def _check_repeats(experiment: Experiment) -> None:
    """Refuses a model of which a second run differs from the first: it changes something in itself, say."""
    again = experiment.measured([])
    if not is_close(experiment.run, again, experiment.baseline, experiment.baseline):
        raise SweepMismatch(CHANGES.format(verb="verify", what="a second run without an intervention"))


def effect_of(experiment: Experiment, places: Sequence[Intervened]) -> Tensor:
    """The exact effect of intervening at all of `places` together, a scalar or `[batch]`."""
    return experiment.measured(places) - experiment.baseline


def missed_among(
    experiment: Experiment, left: Mapping[int, Intervened], samples: int, seed: int, like: Tensor
) -> Missed:
    """What random halves of the cells `left` say of each (Kramár et al. 2024, the diagnostics of AtP*).

    The mean effect of the halves with a cell, minus that of the halves without it, is the effect of the cell; how sure
    that is says Welch's t-test. The bound is the largest effect that it does not exclude for some cell. In a half with
    a cell that several alternatives are left of, one of them is put there.

    Args:
        experiment: what is run.
        left: the places, by their number in the grid.
        samples: how many halves are patched.
        seed: of the halves.
        like: the grid.
    """
    places = list(left.values())
    having, without = _halves(places, samples, seed)
    results = torch.stack([_mean_effect(experiment, places, half) for half in having])
    compared = [_compared(results[here], results[not_here]) for here, not_here in zip(having.T, without.T, strict=True)]
    means, errors, freedom = zip(*compared, strict=True)
    bounds = [
        abs(mean) + _quantile(CONFIDENCE, df) * error for mean, error, df in zip(means, errors, freedom, strict=True)
    ]
    spread = [torch.full((like.numel(),), float("nan")) for _ in range(2)]
    for grid, numbers in zip(spread, (means, errors), strict=True):
        grid[list(left)] = torch.tensor(numbers)
    effects, of_effects = [grid.reshape(like.shape) for grid in spread]
    return Missed(max(bounds), effects, of_effects, CONFIDENCE, samples)


def _halves(places: Sequence[Intervened], samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of `places` each half has, and the cells of which it leaves alone, `[sample, place]` both."""
    cells = {path: number for number, path in enumerate(dict.fromkeys([str(cell.path) for _, cell in places]))}
    of_cell = [cells[str(cell.path)] for _, cell in places]
    ranks, counts = list[int](), Counter[int]()
    for number in of_cell:
        ranks.append(counts[number])
        counts[number] += 1
    drawn = 2 * torch.rand(samples, len(cells), generator=torch.Generator().manual_seed(seed))[:, of_cell]
    shares = torch.tensor([counts[number] for number in of_cell])
    return (drawn * shares).floor() == torch.tensor(ranks), drawn >= 1


def _mean_effect(experiment: Experiment, places: Sequence[Intervened], half: Tensor) -> Tensor:
    if not half.any():
        return torch.zeros((), dtype=torch.float64)
    chosen = [place for place, is_chosen in zip(places, half.tolist(), strict=True) if is_chosen]
    return effect_of(experiment, chosen).mean().double().cpu()


def _compared(having: Tensor, others: Tensor) -> tuple[float, float, float]:
    """The difference of two means, its standard error, and the degrees of freedom of Welch's test."""
    if len(having) < 2 or len(others) < 2:
        return 0.0, float("inf"), 1.0
    parts = [(group.var() / len(group)).item() for group in (having, others)]
    total = sum(parts)
    below = sum(part**2 / (len(group) - 1) for part, group in zip(parts, (having, others), strict=True))
    freedom = total**2 / below if below else float(len(having) + len(others) - 2)
    return (having.mean() - others.mean()).item(), total**0.5, freedom


def _quantile(confidence: float, freedom: float) -> float:
    """Of Student's distribution, from that of the normal one (Fisher and Cornish 1960; 1 % off at 3 degrees)."""
    z = NormalDist().inv_cdf(confidence)
    terms = [z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384]
    return sum(term / freedom**power for power, term in enumerate(terms))


def _notes(exact: Tensor, cells: int, runs: int, missed: Missed | None) -> list[str]:
    """What is said of the effects that are `exact`, and of those that are not."""
    notes = list[str]()
    if exact.numel():
        notes.append(
            f"{exact.numel()} of {cells} effects are exact, the smallest of them {exact.abs().min().item():.3g}; it "
            f"took {runs} runs, {runs / cells:.0%} of those of a whole sweep"
        )
    if exact.numel() and missed is not None:
        notes.append(_note_on_missed(missed))
    return notes


def _note_on_missed(missed: Missed) -> str:
    if math.isinf(missed.bound):
        return f"nothing is known of the other cells: {missed.samples} random halves of them are too few to tell"
    return (
        f"no other cell has an effect above {missed.bound:.3g}, as far as {missed.samples} random halves of them "
        f"say ({missed.confidence:.0%} for each cell)"
    )
