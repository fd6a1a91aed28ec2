"""What the command `nicehooks` does once its arguments are read: everything that needs torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nicehooks.cli import outputs, terminal
from nicehooks.cli.circuit_job import circuit_job as circuit_job
from nicehooks.cli.harvest_job import harvest_job as harvest_job
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import EXACT, differences, findings, patched
from nicehooks.cli.prompts import encode
from nicehooks.cli.questions import asked, print_differences, say_doubts
from nicehooks.cli.sites_job import named_sites
from nicehooks.cli.steering_job import steered
from nicehooks.experiments.effects import Effects

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEERED = "I watched the film last night and I thought it was"
TOWARDS = "I hate this. It is terrible"
AWAY_FROM = "I love this. It is wonderful"


def patch_job(options: argparse.Namespace) -> None:
    """`nicehooks patch`: the effect of each of many sites, by patches or by gradients, as a table and a picture."""
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
    rows, pairs = asked(options, tokenizer)
    clean, corrupted = [each.item() for each in differences(model, pairs)]
    with terminal.bar("patching" if options.method == EXACT else "estimating") as show:
        effects = patched(model, pairs, options.sites, options.layers, options.positions, show, method=options.method)
    written = _files_written(effects, options)  # before anything is printed, which may go into a pipe that closes
    say_doubts(clean, corrupted)
    print_differences(rows, clean, corrupted)
    _report(effects, options)
    print("".join([f"\n{sentence}\n" for sentence in written]), end="")


def _files_written(effects: Effects, options: argparse.Namespace) -> list[str]:
    estimated = "" if options.method == EXACT else f", estimated: {options.method}"
    title = f"effect of patching {_shown_sites(options)}, {options.model}{estimated}"
    return [outputs.write_output(effects, file, title) for file in options.out]


def _shown_sites(options: argparse.Namespace) -> str:
    return "the residual stream" if options.sites == "resid" else options.sites


def _report(effects: Effects, options: argparse.Namespace) -> None:
    exact = options.method == EXACT
    restores = "restores" if exact else "would restore"
    print(f"\nIts part, in percent, that one patch of {_shown_sites(options)} {restores}:")
    if effects.values.dim() == 2:
        columns = [label.replace(" ", "\n", 1) for label in effects.axes[1].labels]
        terminal.print_table(effects.values.cpu(), effects.axes[0].labels, columns, effects.axes[0].name)
    else:
        print("\n".join([f"  {100 * cell.value:+5.0f}  {cell.site}" for cell in effects.top(20)]))
    print(f"Method {options.method}: {'each of these patches was made' if exact else effects.notes[0]}.")
    print(findings(effects, restores))
