"""What the command `nicehooks` does once its arguments are read: everything that needs torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nicehooks.cli import outputs, terminal
from nicehooks.cli.harvest_job import harvest_job as harvest_job
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import differences, findings, patched
from nicehooks.cli.prompts import encode, encode_pairs, read_pairs, without_space
from nicehooks.cli.sites_job import named_sites
from nicehooks.cli.steering_job import steered
from nicehooks.experiments.effects import Effects

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
    rows = read_pairs(options.prompts) if options.prompts else [vars(options)]
    pairs = encode_pairs(tokenizer, rows, options.device)
    for row in rows:
        _ask_for_space(tokenizer, row["clean"], row["answer"])
        _ask_for_space(tokenizer, row["corrupted"], row["wrong"])
    clean, corrupted = [each.item() for each in differences(model, pairs)]
    with terminal.bar("patching") as show:
        effects = patched(model, pairs, options.sites, options.layers, options.positions, show)
    if clean <= 0:
        _doubt("the clean run prefers the wrong answer: it does not do what is looked for.")
    if corrupted >= 0:
        _doubt("the corrupted run prefers the answer of the clean run as well: the corruption does little.")
    _report(effects, rows, clean, corrupted, options)


def _ask_for_space(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    if (better := without_space(tokenizer, prompt, answer)) is not None:
        _doubt(f"the answer {answer!r} has no space before it, where this model would go on with {better!r}.")


def _doubt(text: str) -> None:
    """Something that makes a result doubtful, but is no error."""
    print(f"nicehooks: note: {text}", file=sys.stderr)


def _report(
    effects: Effects, rows: Sequence[Mapping[str, str]], clean: float, corrupted: float, options: argparse.Namespace
) -> None:
    if len(rows) == 1:
        print(f"\nlogit difference of {rows[0]['answer']!r} and {rows[0]['wrong']!r}:")
        print(f"  {clean:+6.2f}  clean      {rows[0]['clean']!r}")
        print(f"  {corrupted:+6.2f}  corrupted  {rows[0]['corrupted']!r}")
    else:
        print(
            f"\nmean logit difference of {len(rows)} pairs of prompts: {clean:+.2f} clean, {corrupted:+.2f} corrupted"
        )
    what = "the residual stream" if options.sites == "resid" else options.sites
    print(f"\nIts part, in percent, that one patch of {what} restores:")
    if effects.values.dim() == 2:
        columns = [label.replace(" ", "\n", 1) for label in effects.axes[1].labels]
        terminal.print_table(effects.values.cpu(), effects.axes[0].labels, columns, effects.axes[0].name)
    else:
        print("\n".join([f"  {100 * cell.value:+5.0f}  {cell.site}" for cell in effects.top(20)]))
    print(findings(effects))
    for file in options.out:
        print(f"\n{outputs.write_output(effects, file, f'effect of patching {what}, {options.model}')}")
