"""What is asked on the command line: pairs of prompts with their answers, and what is doubtful about them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nicehooks.cli.prompts import PromptPairs, encode_pairs, read_pairs, without_space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def asked(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Mapping[str, str]], PromptPairs]:
    """The pairs of prompts, as texts and as tokens; says so where an answer lacks its space.

    Raises:
        PromptError: a pair cannot be compared.
    """
    rows = read_pairs(options.prompts) if options.prompts else [vars(options)]
    pairs = encode_pairs(tokenizer, rows, options.device)
    for row in rows:
        _ask_for_space(tokenizer, row["clean"], row["answer"])
        _ask_for_space(tokenizer, row["corrupted"], row["wrong"])
    return rows, pairs


def _ask_for_space(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    if (better := without_space(tokenizer, prompt, answer)) is not None:
        say_note(f"the answer {answer!r} has no space before it, where this model would go on with {better!r}.")


def say_doubts(clean: float, corrupted: float) -> None:
    """Says so where a run does not prefer the answer that it should."""
    if clean <= 0:
        say_note("the clean run prefers the wrong answer: it does not do what is looked for.")
    if corrupted >= 0:
        say_note("the corrupted run prefers the answer of the clean run as well: the corruption does little.")


def say_note(text: str) -> None:
    """Something that one should know of a result, but is no error."""
    print(f"nicehooks: note: {text}", file=sys.stderr)


def print_differences(rows: Sequence[Mapping[str, str]], clean: float, corrupted: float) -> None:
    """How much more the model favours the answers over the wrong ones, in both runs."""
    if len(rows) == 1:
        print(f"\nlogit difference of {rows[0]['answer']!r} and {rows[0]['wrong']!r}:")
        print(f"  {clean:+6.2f}  clean      {rows[0]['clean']!r}")
        print(f"  {corrupted:+6.2f}  corrupted  {rows[0]['corrupted']!r}")
    else:
        print(
            f"\nmean logit difference of {len(rows)} pairs of prompts: {clean:+.2f} clean, {corrupted:+.2f} corrupted"
        )
