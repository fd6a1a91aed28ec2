"""Exact effects where estimates are largest, and what the estimates may have missed elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from nicehooks.errors import SweepMismatch
from nicehooks.experiments.acting import Intervened
from nicehooks.experiments.effects import Effects
from nicehooks.experiments.estimates import Experiment
from nicehooks.experiments.lanes import is_close
from nicehooks.experiments.scheduling import CHANGES


class Verified(Effects):
    """Effects of which the largest are exact.

    Attributes:
        exact: `[*axes]`, which of them are.
        spent: the runs of the model that it took, as a share of those of a whole sweep.
        missed: what is known of the cells that are not exact; None if nothing was asked.
    """

    exact: Tensor
    spent: float
    missed: Missed | None


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


CONFIDENCE = 0.95


def verified(estimates: Effects, experiment: Experiment, k: int, samples: int, seed: int) -> Verified:
    """`estimates` with exact effects at the `k` largest; see `Attribution.verify`."""
    alternatives = range(len(experiment.replacements.sources))
    places = [Intervened(alternative, cell) for alternative in alternatives for cell in experiment.grid.cells]
    _check_repeats(experiment)
    sizes = estimates.values.flatten().abs()
    chosen = sorted(sizes.topk(min(k, len(places))).indices.tolist())
    found = [effect_of(experiment, [places[at]]) for at in chosen]
    values, examples = estimates.values.clone(), None if estimates.examples is None else estimates.examples.clone()
    for at, effect in zip(chosen, found, strict=True):
        values.view(-1)[at] = effect.mean()
        if examples is not None:
            examples.view(-1, examples.shape[-1])[at] = effect
    left = {at: place for at, place in enumerate(places) if at not in set(chosen)}
    missed = missed_among(experiment, left, samples, seed, estimates.values) if left and samples else None
    runs = len(chosen) + (samples if missed else 0)
    result = Verified(
        values,
        estimates.axes,
        estimates.baseline,
        estimates.sites,
        examples,
        [
            *estimates.notes,
            *_notes(found, len(places), runs, missed),
        ],
    )
    result.exact = torch.zeros(len(places), dtype=torch.bool)
    result.exact[chosen] = True
    result.exact = result.exact.reshape(values.shape)
    result.spent, result.missed = runs / max(len(places), 1), missed
    return result


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


def _notes(found: Sequence[Tensor], cells: int, runs: int, missed: Missed | None) -> list[str]:
    if not found:
        return []
    smallest = min(effect.mean().abs().item() for effect in found)
    notes = [
        f"{len(found)} of {cells} effects are exact, the smallest of them {smallest:.3g}; it took {runs} runs, "
        f"{runs / cells:.0%} of those of a whole sweep"
    ]
    if missed is not None:
        notes.append(
            f"no other cell has an effect above {missed.bound:.3g}, as far as {missed.samples} random halves of them "
            f"say ({missed.confidence:.0%} for each cell)"
        )
    return notes
