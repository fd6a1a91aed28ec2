"""A pair of prompts that differ in one thing, and the two answers that tell them apart, as tokens."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nicehooks.errors import NiceHooksError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptError(NiceHooksError, ValueError):
    """Two prompts, or their answers, that cannot be compared token by token."""


@dataclass(frozen=True)
class PromptPairs:
    """Pairs of prompts, all of as many tokens, and what each should be answered.

    Attributes:
        clean: the model's inputs for the prompts that `answer` belongs to, each `[pair, pos]`.
        corrupted: the same for the other prompts.
        answer: `[pair]`, the token that continues the clean prompt.
        wrong: `[pair]`, the token that continues the corrupted prompt.
        tokens: a label for each position, with both tokens where the prompts differ: `"John/Mary"`.
    """

    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    answer: Tensor
    wrong: Tensor
    tokens: list[str]

    def logit_difference(self, output: Any) -> Tensor:
        """How much more a language model's `output` favours `answer` over `wrong` as the next token, `[batch]`."""
        logits: Tensor = output.logits[:, -1].double()
        rows = torch.arange(len(logits), device=logits.device)
        answer, wrong = [tokens.to(rows.device).expand(len(rows)) for tokens in (self.answer, self.wrong)]
        return logits[rows, answer] - logits[rows, wrong]


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """What to call `model` with so that it leaves out the logits that no `logit_difference` reads, if it can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def encode(tokenizer: PreTrainedTokenizerBase, text: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The inputs of a causal language model for one text, each `[1, pos]`.

    Raises:
        PromptError: there is nothing to read in `text`.
    """
    encoded = tokenizer(text, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise PromptError(f"the prompt {text!r} has no tokens.")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask") if name in encoded}


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    clean: str,
    corrupted: str,
    answer: str,
    wrong: str,
    device: torch.device | str = "cpu",
) -> PromptPairs:
    """Two prompts and two answers as tokens.

    Args:
        tokenizer: the model's.
        clean: the prompt that `answer` continues.
        corrupted: a prompt of as many tokens that `wrong` continues.
        answer: one token, mostly with a leading space.
        wrong: one other token.
        device: where the model is.

    Raises:
        PromptError: the prompts differ in length or are the same, or an answer is not one token.
    """
    sides = {"clean": encode(tokenizer, clean, device), "corrupted": encode(tokenizer, corrupted, device)}
    words = {side: _texts(tokenizer, inputs["input_ids"][0].tolist()) for side, inputs in sides.items()}
    if len(words["clean"]) != len(words["corrupted"]):
        raise PromptError(f"{UNEQUAL}\n{_side_by_side(words)}")
    if words["clean"] == words["corrupted"]:
        raise PromptError(f"the clean and the corrupted prompt are the same.\n{_side_by_side(words)}")
    labels = zip(map(visible, words["clean"]), map(visible, words["corrupted"]), strict=True)
    right, other = _one_token(tokenizer, "answer", answer), _one_token(tokenizer, "wrong answer", wrong)
    if right == other:
        raise PromptError(f"the answer and the wrong answer are the same token, {answer!r}.")
    tokens = [a if a == b else f"{a}/{b}" for a, b in labels]
    return PromptPairs(sides["clean"], sides["corrupted"], torch.tensor([right]), torch.tensor([other]), tokens)


PAIR_FIELDS = ("clean", "corrupted", "answer", "wrong")
"""What each pair of prompts has, on the command line and in a file."""


def read_pairs(file: str) -> list[dict[str, str]]:
    """The pairs of prompts in a CSV file with a column for each of `PAIR_FIELDS`.

    Raises:
        PromptError: the file cannot be read, lacks a column, or has no row.
    """
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PromptError(
            f"cannot read the prompts in {file!r}: {getattr(error, 'strerror', None) or error}."
        ) from None
    if not rows or any([row.get(field) is None for row in rows for field in PAIR_FIELDS]):
        raise PromptError(
            f"{file!r} needs a first line {','.join(PAIR_FIELDS)!r}, and a line with all four for each pair."
        )
    return rows


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]], device: torch.device | str = "cpu"
) -> PromptPairs:
    """Several pairs of prompts as one batch.

    Raises:
        PromptError: a pair cannot be compared, or not all pairs have as many tokens.
    """
    pairs = [
        encode_pair(tokenizer, row["clean"], row["corrupted"], row["answer"], row["wrong"], device) for row in rows
    ]
    for row, pair in zip(rows, pairs, strict=True):
        if len(pair.tokens) != len(pairs[0].tokens):
            counts = f"{len(pairs[0].tokens)} and {len(pair.tokens)}"
            shown = f"  {rows[0]['clean']!r}\n  {row['clean']!r}"
            raise PromptError(f"all pairs need as many tokens, but these have {counts}.\n{shown}")
    clean, corrupted = [
        {name: torch.cat([getattr(pair, side)[name] for pair in pairs]) for name in pairs[0].clean}
        for side in ("clean", "corrupted")
    ]
    labels = [set(column) for column in zip(*[pair.tokens for pair in pairs], strict=True)]
    tokens = [label.pop() if len(label) == 1 else "…" for label in labels]
    return PromptPairs(
        clean, corrupted, torch.cat([pair.answer for pair in pairs]), torch.cat([pair.wrong for pair in pairs]), tokens
    )


def without_space(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str | None:
    """What `answer` seems to lack: the same word behind a space, where that is another token of the model.

    Tokenizers such as that of GPT-2 have words with the space before them, so a prompt is continued by `" Mary"`; the
    logit of `"Mary"` says little. None where nothing seems to be lacking.
    """
    if prompt[-1:].isspace() or not answer[:1].isalnum():
        return None
    ids, spaced = [tokenizer.encode(text, add_special_tokens=False) for text in (answer, f" {answer}")]
    return f" {answer}" if len(spaced) == 1 and spaced != ids and tokenizer.unk_token_id not in spaced else None


def visible(token: str) -> str:
    r"""The text of a token as a label on one line, without the blanks around it.

    >>> visible(" Mary"), visible(" "), visible("\n")
    ('Mary', '␣', '\\n')
    """
    return repr(token)[1:-1].strip() or "␣"


UNEQUAL = """\
the prompts differ in length, but patching puts each position of one into the same position of the other.
  Exchange words for words of as many tokens."""


def _one_token(tokenizer: PreTrainedTokenizerBase, what: str, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        shown = _side_by_side({what: _texts(tokenizer, ids)})
        raise PromptError(f"the {what} {text!r} is not one token of this model but {len(ids)}.\n{shown}")
    return ids[0]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return [str(tokenizer.decode([token])) for token in ids]


def _side_by_side(words: dict[str, list[str]]) -> str:
    width = max(map(len, words))
    return "\n".join(
        f"  {side:<{width}} ({len(each)} tokens): {' '.join(map(repr, each))}" for side, each in words.items()
    )
