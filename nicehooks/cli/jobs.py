"""What the command `nicehooks` does once its arguments are read: everything that needs torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nicehooks.cli import terminal
from nicehooks.cli.harvest_job import harvest_job as harvest_job
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import ResidualGrid, residual_grid
from nicehooks.cli.prompts import encode, encode_pair
from nicehooks.cli.steering_job import steered
from nicehooks.contexts.listing import sites
from nicehooks.pictures import heat_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEERED = "I watched the film last night and I thought it was"
TOWARDS = "I hate this. It is terrible"
AWAY_FROM = "I love this. It is wonderful"


def patch_job(options: argparse.Namespace) -> None:
    """`nicehooks patch`: the effect of the residual stream at every layer and position, as a table and a picture."""
    _check_extras(options)
    _patch(options, *load(options.model, options.device))


def demo_job(options: argparse.Namespace) -> None:
    """`nicehooks demo`: patching on a known pair of prompts, then steering."""
    _check_extras(options)
    model, tokenizer = load(options.model, options.device)
    _patch(options, model, tokenizer)
    steering = steered(model, tokenizer, STEERED, TOWARDS, AWAY_FROM)
    print(f"\nSteering {steering.site} by the difference between {TOWARDS!r} and {AWAY_FROM!r}:")
    print(f"  before: {STEERED}{steering.before}")
    print(f"  after:  {STEERED}{steering.after}")


def sites_job(options: argparse.Namespace) -> None:
    """`nicehooks sites`: every place of a model where a value can be seen or replaced."""
    model, tokenizer = load(options.model, options.device)
    inputs: dict[str, Any] = {**encode(tokenizer, options.prompt, options.device)}
    print(sites(model, **inputs))


def _check_extras(options: argparse.Namespace) -> None:
    """Asks now for what would otherwise be missed only when the work is done."""
    terminal.check()
    heat_map.check_file(options.out)


def _patch(options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pair = encode_pair(tokenizer, options.clean, options.corrupted, options.answer, options.wrong, options.device)
    grid = residual_grid(
        model, pair, options.layers, options.positions, lambda cells: terminal.progress(cells, "patching")
    )
    _report(grid, options)


def _report(grid: ResidualGrid, options: argparse.Namespace) -> None:
    rows = [str(layer) for layer in grid.layers]
    columns = list(zip(map(str, grid.positions), grid.tokens, strict=True))
    print(f"\nlogit difference of {options.answer!r} and {options.wrong!r}:")
    print(f"  {grid.clean:+6.2f}  clean      {options.clean!r}")
    print(f"  {grid.corrupted:+6.2f}  corrupted  {options.corrupted!r}")
    print("\nIts part, in percent, that one patch of the residual stream restores:")
    terminal.print_table(grid.effects, rows, ["\n".join(column) for column in columns], "layer")
    print(grid.findings())
    title = f"effect of patching the residual stream, {options.model}"
    figure = heat_map.heat_map(
        grid.effects, rows, [" ".join(column) for column in columns], title, scale_title="restored logit difference"
    )
    print(f"\nThe heat map is in {heat_map.save(figure, options.out)}")
