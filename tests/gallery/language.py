"""The language models of the tests: the shipped one, loaded once, and one that is small enough to save and load."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nicehooks.cli.loading import load

WORDS = ["<unk>", "When", " Mary", " John", " and", " went", ",", " gave", " to", " [b]x[/]", " $y$"]


@cache
def shipped():
    """SmolLM2-135M-Instruct and its tokenizer; reading them takes half a minute, so all tests share them."""
    return load()


def save_tiny(directory: Path) -> str:
    """Saves a GPT-2 of two layers with a tokenizer of whole words, and returns its directory."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r" ?[^\s,]+|,"), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>").save_pretrained(directory)
    return str(directory)
