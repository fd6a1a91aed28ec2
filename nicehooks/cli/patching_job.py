"""Which layers and positions carry an answer: one run's residual stream patched into another, place by place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from nicehooks import patch
from nicehooks.anatomies.residual import residual_stream
from nicehooks.cli.prompts import PromptPair
from nicehooks.errors import NiceHooksError
from nicehooks.experiments.effects import Axis, Effects

Patches = tuple[int, list[int]]
"""A layer, and the positions to patch in it, each alone."""

Track = Callable[[Sequence[Patches]], Iterable[Patches]]
"""Goes through the patches to do, and may show how far it is."""


class NothingToPatch(NiceHooksError, ValueError):
    """Prompts, layers or positions between which there is no effect to measure."""


@dataclass(frozen=True)
class ResidualGrid:
    """What patching the residual stream of the clean run into the corrupted run does, for each layer and position.

    Attributes:
        effects: `[layer, position]`, the part of the logit difference that the patch restores: 0 is the corrupted run,
            1 is the clean run.
        layers: the numbers of the layers, for the rows.
        positions: the numbers of the positions, for the columns.
        tokens: a label for each of these positions.
        clean: the logit difference of the clean run.
        corrupted: the logit difference of the corrupted run.
        sites: the path of the residual stream after each of these layers.
    """

    effects: Tensor
    layers: list[int]
    positions: list[int]
    tokens: list[str]
    clean: float
    corrupted: float
    sites: list[str]

    def as_effects(self) -> Effects:
        """The same numbers with labelled axes, to be drawn and written."""
        columns = [" ".join(column) for column in zip(map(str, self.positions), self.tokens, strict=True)]
        axes = [Axis("layer", tuple(map(str, self.layers))), Axis("position", tuple(columns))]
        sites = [f"{site}[:, {position}]" for site in self.sites for position in self.positions]
        return Effects(self.effects, axes, torch.tensor(0.0, dtype=self.effects.dtype), sites)

    def findings(self) -> str:
        """What the grid shows, in two sentences."""
        strongest = self.effects.argmax(dim=1).tolist()
        first = len(list(takewhile(lambda column: column == strongest[0], strongest)))
        last = len(list(takewhile(lambda column: column == strongest[-1], reversed(strongest))))
        if self.effects.max() < 0.1:
            return f"{self._strongest_place()} {self._strongest_layer()}"
        if first == len(strongest):
            return f"{self._run(0, first, strongest[0])} {self._runner_up(strongest[0])}"
        return f"{self._run(0, first, strongest[0])} {self._run(-last, None, strongest[-1])}"

    def _run(self, start: int, stop: int | None, column: int) -> str:
        layers = self.layers[start:stop]
        span = f"at layer {layers[0]}" if len(layers) == 1 else f"from layer {layers[0]} to layer {layers[-1]}"
        most = self.effects[start:stop, column].max().item()
        return (
            f"{span.capitalize()}, the effect is largest at {self._place(column)}: one patch restores up to {most:.0%}."
        )

    def _runner_up(self, column: int) -> str:
        others = torch.cat([self.effects[:, :column], self.effects[:, column + 1 :]], dim=1)
        most = f"more than {others.max().item():.0%}" if others.numel() else "anything, as none was tried"
        return f"No other position restores {most}."

    def _strongest_place(self) -> str:
        row, column = divmod(int(self.effects.argmax()), len(self.positions))
        most = f"{self.effects.max().item():.0%}, that of layer {self.layers[row]} at {self._place(column)}"
        return f"No single patch restores the logit difference: the largest effect is {most}."

    def _strongest_layer(self) -> str:
        total, row = self.effects.sum(dim=1).max(dim=0)
        return f"All positions together add up to at most {total.item():.0%}, at layer {self.layers[int(row)]}."

    def _place(self, column: int) -> str:
        return f"position {self.positions[column]} ({self.tokens[column]})"


def residual_grid(
    model: nn.Module,
    pair: PromptPair,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    track: Track = iter,
    batch: int = 16,
) -> ResidualGrid:
    """Patches the residual stream after each layer, at each position, alone, and measures the logit difference.

    This is activation patching (Meng et al. 2022, https://arxiv.org/abs/2202.05262; Wang et al. 2022,
    https://arxiv.org/abs/2211.00593). For each layer and position it does

        with patch(model, {f"{layer}[:, {position}]": clean[layer][:, position]}):
            output = model(**corrupted)

    but several at once, each in a row of its own of a batch of corrupted prompts.

    Args:
        model: a causal language model.
        pair: the prompts and answers, from `encode_pair`.
        layers: which layers; all of them where it is left out. Negative numbers count from the end.
        positions: which positions; all of them where it is left out.
        track: goes through the patches, as `rich.progress.track` does, to show how far it is.
        batch: how many patches at once, at most.

    Raises:
        NothingToPatch: the logit difference of both prompts is the same, or a layer or position does not exist.
    """
    clean_output, clean = residual_stream(model, pair.clean)
    with torch.no_grad():
        floor = pair.logit_difference(model(**pair.corrupted)).item()
    span = pair.logit_difference(clean_output).item() - floor
    if not abs(span) > 0:  # NaN too
        raise NothingToPatch(f"both prompts have the logit difference {floor:.2f}: there is no effect to look for.")
    sites = list(clean)
    rows, columns = _existing("layer", layers, len(sites)), _existing("position", positions, len(pair.tokens))

    def effects(layer: int, places: list[int]) -> Tensor:
        site = sites[layer]
        values = {f"{site}[{row}, {place}]": clean[site][0, place] for row, place in enumerate(places)}
        inputs = {name: value.expand(len(places), -1) for name, value in pair.corrupted.items()}
        with torch.no_grad(), patch(model, values):
            return (pair.logit_difference(model(**inputs)) - floor) / span

    batches = [columns[start : start + batch] for start in range(0, len(columns), batch)]
    done = [effects(*patches) for patches in track([(layer, places) for layer in rows for places in batches])]
    grid = torch.cat(done).reshape(len(rows), len(columns)).cpu()
    tokens = [pair.tokens[column] for column in columns]
    return ResidualGrid(grid, rows, columns, tokens, floor + span, floor, [sites[row] for row in rows])


def _existing(what: str, wanted: Sequence[int] | None, count: int) -> list[int]:
    """`wanted`, counted from the start; an error where there is no such layer or position."""
    wanted = range(count) if wanted is None else wanted
    for number in wanted:
        if not -count <= number < count:
            raise NothingToPatch(f"there is no {what} {number}: they go from 0 to {count - 1}.")
    return [number % count for number in wanted]
