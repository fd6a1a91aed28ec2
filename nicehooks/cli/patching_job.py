"""Which sites carry an answer: values of one run patched into another, site by site, or what gradients say of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import attribute, capture, sweep
from nicehooks.cli.places import NothingToPatch, is_part, sites_of
from nicehooks.cli.prompts import PromptPairs, last_logits_only
from nicehooks.experiments.effects import Axis, Effects
from nicehooks.experiments.grids import stems_of

Show = Callable[[int, int], None]
"""Is told how many interventions are done, of how many."""

EXACT = "exact"
"""The method that makes each patch; all others are estimates, by `attribute`."""


def patched(
    model: nn.Module,
    pairs: PromptPairs,
    what: str = "resid",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    show: Show | bool = False,
    engine: str = "auto",
    method: str = EXACT,
) -> Effects:
    """Patches the clean run into the corrupted run at each site, alone, and measures the logit difference.

    This is activation patching (Meng et al. 2022, https://arxiv.org/abs/2202.05262; Wang et al. 2022,
    https://arxiv.org/abs/2211.00593), or an estimate of it.

    Args:
        model: a causal language model.
        pairs: the prompts and answers, from `encode_pair` or `encode_pairs`.
        what: `"resid"`, the residual stream after each layer at each position; another part of the anatomy (`"z"`,
            `"attn_out"`, …), by heads where it has heads, else by positions; or a path (`"h.*[:, *]"`).
        layers: which layers of a part; all of them where it is left out. Negative numbers count from the end.
        positions: which positions of a part; all of them where it is left out.
        show: is told how far it is.
        engine: of `sweep`.
        method: `"exact"`, each patch is made; or one of `attribute`, which makes none: `"gradient"`, `"integrated"`,
            `"atp*"`.

    Returns:
        In parts of the logit difference between the runs: 0 is the corrupted run, 1 is the clean run.

    Raises:
        NothingToPatch: the logit difference of both prompts is the same, or a layer or position does not exist.
        UnsupportedModule: the model has no such part, or AtP* is asked for of one that `anatomy` does not know.
    """
    clean, corrupted = unlike(*differences(model, pairs))
    where, axes = sites_of(model, pairs, what, layers, positions)
    with torch.no_grad(), capture(model, *stems_of(model, where)) as values:
        model(**pairs.clean)
    given: dict[str, Any] = {"engine": engine} if method == EXACT else {"method": method}
    run: Any = sweep if method == EXACT else attribute
    spared = last_logits_only(model) if what != "logits" and is_part(model, what) else {}  # a path may ask for them
    given |= {"progress": show, **spared}
    effects: Effects = run(model, where, values, pairs.logit_difference, **given, **pairs.corrupted)
    return labelled(effects.normalized(clean, corrupted), axes)


def differences(model: nn.Module, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    """The mean logit difference of the clean prompts, and of the corrupted ones."""
    with torch.no_grad():
        outputs = [model(**inputs, **last_logits_only(model)) for inputs in (pairs.clean, pairs.corrupted)]
    clean, corrupted = map(pairs.logit_difference, outputs)
    return clean.mean(), corrupted.mean()


def unlike(clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor]:
    """Both, if they differ.

    Raises:
        NothingToPatch: they do not.
    """
    if not (clean - corrupted).abs() > 0:  # NaN too
        raise NothingToPatch(f"both prompts have the logit difference {corrupted:.2f}: there is no effect to look for.")
    return clean, corrupted


# --- what came out ----------------------------------------------------------------------------------------------------


def labelled(effects: Effects, axes: list[Axis]) -> Effects:
    """`effects` along `axes`; an axis without labels has those that `effects` has last."""
    if not axes:
        return effects
    axes = [axis if axis.labels else Axis(axis.name, effects.axes[-1].labels) for axis in axes]
    shape = [len(axis.labels) for axis in axes]
    examples = None if effects.examples is None else effects.examples.reshape(*shape, -1)
    return Effects(effects.values.reshape(shape), axes, effects.baseline, effects.sites, examples, effects.notes)


def findings(effects: Effects, restores: str = "restores") -> str:
    """What a grid of two axes shows, in two sentences; of another, its largest effect.

    Args:
        effects: the grid, in parts of the logit difference.
        restores: what a patch does; "would restore" where none was made.
    """
    if effects.values.dim() != 2:
        return _largest_alone(effects)
    (row_name, rows), (column_name, columns) = effects.axes
    strongest = effects.values.argmax(dim=1).tolist()
    if effects.values.max() < 0.1:
        return _no_large_one(effects)

    def place(column: int) -> str:
        number, _, token = columns[column].partition(" ")
        return f"{column_name} {number} ({token})" if token else f"{column_name} {number}"

    def run(start: int, stop: int | None, column: int) -> str:
        part = rows[start:stop]
        span = f"at {row_name} {part[0]}" if len(part) == 1 else f"from {row_name} {part[0]} to {row_name} {part[-1]}"
        most = effects.values[start:stop, column].max().item()
        effect = f"the effect is largest at {place(column)}: one patch {restores} up to {most:.0%}."
        return f"{span.capitalize()}, {effect}"

    first = len(list(takewhile(lambda column: column == strongest[0], strongest)))
    last = len(list(takewhile(lambda column: column == strongest[-1], reversed(strongest))))
    if first == len(strongest):
        return f"{run(0, first, strongest[0])} {_runner_up(effects, strongest[0], restores)}"
    return f"{run(0, first, strongest[0])} {run(-last, None, strongest[-1])}"


def _runner_up(effects: Effects, column: int, restores: str) -> str:
    others = torch.cat([effects.values[:, :column], effects.values[:, column + 1 :]], dim=1)
    most = f"more than {others.max().item():.0%}" if others.numel() else "anything, as none was tried"
    return f"No other {effects.axes[1].name} {restores} {most}."


def _no_large_one(effects: Effects) -> str:
    row_name, rows = effects.axes[0]
    total, row = effects.values.sum(dim=1).max(dim=0)
    together = (
        f"All {effects.axes[1].name}s together add up to at most {total.item():.0%}, at {row_name} {rows[int(row)]}."
    )
    return f"{_largest_alone(effects)} {together}"


def _largest_alone(effects: Effects) -> str:
    best = max(effects.cells(), key=lambda cell: cell.value)
    where = ", ".join([f"{axis.name} {label}" for axis, label in zip(effects.axes, best.labels, strict=True)])
    return f"The largest effect of a single patch is {best.value:.0%}, at {where}."
