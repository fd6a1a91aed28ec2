"""What the command `nicehooks` does once its arguments are read: everything that needs torch."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from nicehooks.cli import outputs, terminal
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import ResidualGrid, residual_grid
from nicehooks.cli.prompts import encode, encode_pair, without_space
from nicehooks.cli.sites_job import named_sites
from nicehooks.cli.steering_job import steered

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
    inputs = encode(tokenizer, options.prompt, options.device)
    print(named_sites(model, options.paths, inputs))


def _check_extras(options: argparse.Namespace) -> None:
    """Asks now for what would otherwise be missed only when the work is done."""
    terminal.check()
    for file in options.out:
        outputs.check_output(file)


def _patch(options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pair = encode_pair(tokenizer, options.clean, options.corrupted, options.answer, options.wrong, options.device)
    for prompt, answer in [(options.clean, options.answer), (options.corrupted, options.wrong)]:
        if (better := without_space(tokenizer, prompt, answer)) is not None:
            _doubt(f"the answer {answer!r} has no space before it, where this model would go on with {better!r}.")
    grid = residual_grid(
        model, pair, options.layers, options.positions, lambda cells: terminal.progress(cells, "patching")
    )
    if grid.clean <= 0:
        _doubt(f"the clean run prefers the wrong answer, {options.wrong!r}: it does not do what is looked for.")
    if grid.corrupted >= 0:
        _doubt(f"the corrupted run prefers {options.answer!r} as well: the corruption does little.")
    _report(grid, options)


def _doubt(text: str) -> None:
    """Something that makes a result doubtful, but is no error."""
    print(f"nicehooks: note: {text}", file=sys.stderr)


def _report(grid: ResidualGrid, options: argparse.Namespace) -> None:
    rows = [str(layer) for layer in grid.layers]
    columns = ["\n".join(column) for column in zip(map(str, grid.positions), grid.tokens, strict=True)]
    print(f"\nlogit difference of {options.answer!r} and {options.wrong!r}:")
    print(f"  {grid.clean:+6.2f}  clean      {options.clean!r}")
    print(f"  {grid.corrupted:+6.2f}  corrupted  {options.corrupted!r}")
    print("\nIts part, in percent, that one patch of the residual stream restores:")
    terminal.print_table(grid.effects, rows, columns, "layer")
    print(grid.findings())
    title = f"effect of patching the residual stream, {options.model}"
    for file in options.out:
        print(f"\n{outputs.write_output(grid.as_effects(), file, title)}")
