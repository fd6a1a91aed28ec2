"""What a model writes with and without a direction added to its residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nicehooks import steer
from nicehooks.anatomies.residual import residual_stream
from nicehooks.cli.prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Steering:
    """The texts that follow a prompt, and the site that was steered between them."""

    site: str
    before: str
    after: str


def steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    towards: str,
    away_from: str,
    scale: float = 1.0,
    new_tokens: int = 25,
) -> Steering:
    """Steers the middle block along the difference of two activations, and lets the model write (greedily).

    This is activation addition (Turner et al. 2023, https://arxiv.org/abs/2308.10248), with the activations of the
    last token of each text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: what the model continues.
        towards: a text that has what the continuation should have more of.
        away_from: a text like it that has not.
        scale: how many times the difference is added, at every position.
        new_tokens: the length of the continuations.
    """
    _, present = residual_stream(model, encode(tokenizer, towards, model.device))
    _, absent = residual_stream(model, encode(tokenizer, away_from, model.device))
    site = list(present)[len(present) // 2]
    vector = present[site][:, -1] - absent[site][:, -1]
    before = _continued(model, tokenizer, prompt, new_tokens)
    with steer(model, site, vector, scale=scale):
        after = _continued(model, tokenizer, prompt, new_tokens)
    return Steering(site, before, after)


def _continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    inputs = encode(tokenizer, prompt, model.device)
    generate: Any = model.generate
    output = generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
