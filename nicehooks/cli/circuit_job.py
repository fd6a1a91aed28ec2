"""`nicehooks circuit`: which parts of a model carry an answer through which others, and what these do alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from nicehooks import capture, circuit, edges, faithfulness
from nicehooks.cli import outputs
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import differences, unlike
from nicehooks.cli.prompts import PromptPairs
from nicehooks.cli.questions import asked, print_differences, say_doubts, say_note
from nicehooks.experiments.circuits import Circuit
from nicehooks.experiments.contributions import written_parts
from nicehooks.experiments.faithful import Faithfulness
from nicehooks.experiments.wiring import Wiring

SHOWN = 15
"""How many edges are printed; the page has all of them."""

RANDOM_CIRCUITS = 3
"""How many random circuits of the same size stand beside."""


def circuit_job(options: argparse.Namespace) -> None:
    """`nicehooks circuit`: the strongest edges and what they do alone, in words and as a page."""
    outputs.check_page(options.out)
    model, tokenizer = load(options.model, options.device)
    rows, pairs = asked(options, tokenizer)
    clean, corrupted = [each.item() for each in unlike(*differences(model, pairs))]
    wiring = Wiring(model)
    count = int(wiring.there.sum())
    if options.method == "exact":
        say_note(f"--method exact takes a run of the model for each of {count:,} edges.")
    found, alone = found_in(model, wiring, pairs, options.top, options.method)
    page = found.to_html(options.out, f"circuit of {options.model}")  # before what may go into a pipe that closes
    say_doubts(clean, corrupted)
    print_differences(rows, clean, corrupted)
    _print_circuit(found, alone, count, options.method)
    print(f"\nThe page is in {page}")


def found_in(
    model: nn.Module, wiring: Wiring, pairs: PromptPairs, top: int, method: str
) -> tuple[Circuit, Faithfulness]:
    """The circuit of the strongest edges on the clean prompts, and what it does alone, beside random ones."""
    with torch.no_grad(), capture(model, *written_parts(wiring)) as values:
        model(**pairs.corrupted)
    metric, inputs = pairs.logit_difference, dict[str, Any](pairs.clean)
    found = circuit(edges(model, values, metric, method=method, **inputs), top=top)
    return found, faithfulness(model, found, values, metric, random=RANDOM_CIRCUITS, **inputs)


def _print_circuit(found: Circuit, alone: Faithfulness, count: int, method: str) -> None:
    print(f"\nThe circuit has {len(found)} of {count:,} edges, between {len(found.nodes)} parts.")
    print(f"Method {method}: the effects of edges are {found.scores.notes[0] if found.scores else ''}.")
    print("\nChange of the logit difference where an edge carries what the corrupted run has there:")
    print("\n".join([f"  {edge.effect:+10.3g}  {edge.sender} → {edge.receiver}" for edge in found.edges[:SHOWN]]))
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more, in the page")
    share, *others = alone.shares[0].tolist()
    left = f"{_percent(share)} of the difference between the runs is left"
    print(f"\nFaithfulness {share:.2f}: with all other edges corrupted, {left};")
    print(f"with random circuits of {len(found)} edges, {', '.join(map(_percent, others))}.")


def _percent(share: float) -> str:
    """A whole number of percent; 0 for what would be -0."""
    return f"{round(100 * share)}%"
