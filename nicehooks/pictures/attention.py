"""Attention patterns of all heads as a page: a token under the pointer lights up where it attends."""

from __future__ import annotations

import base64
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import NiceHooksError, NotCaptured, TreeMismatch
from nicehooks.pictures.pages import Page

TokenTexts = Sequence[str] | Sequence[Sequence[str]]
"""The texts of the tokens of one sequence, or of each sequence of a batch."""

MOST_WEIGHTS = 20_000_000
"""How many weights a page holds: 2 bytes each, which are 53 MB of text."""

FINEST = 65535
"""A weight between 0 and 1 is written as a number between 0 and this."""


def attention_view(
    cache: Mapping[Any, Any],
    parts: Any,
    tokens: TokenTexts,
    key_tokens: TokenTexts | None = None,
    title: str = "attention",
) -> Page:
    """The attention patterns of all heads that were captured, layers × heads, as a page.

    A head is chosen among small pictures of all patterns. Then a token under the pointer, or that the keyboard is at,
    lights up where it attends, or by what it is attended.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, attention_view, capture
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=100)).eval()
    >>> parts = anatomy(model)
    >>> with capture(model, parts.pattern) as acts:
    ...     output = model(torch.tensor([[3, 1, 4]]))
    >>> attention_view(acts, parts, ["Mary", " gave", " it"])  # .to_html("attention.html"), or shown by a notebook
    Page('attention')

    Args:
        cache: a cache of the patterns, or a plain dict; each pattern is `[batch, head, query, key]`.
        parts: `anatomy(model)`, whose `pattern` says where the patterns are; or the paths themselves. A layer that was
            not captured is left out.
        tokens: the text of each token; for a batch of several, a list for each sequence.
        key_tokens: the same of what is attended to, where it is another sequence: in cross-attention.
        title: what stands above it.

    Returns:
        A page that shows itself in a notebook, and has `.to_html(file)`.

    Raises:
        NotCaptured: the cache holds no pattern.
        TreeMismatch: a pattern has another shape, or there are not as many tokens as it has queries and keys.
        NiceHooksError: there are more weights than a page can hold.
    """
    patterns = _patterns(cache, list(getattr(parts, "pattern", parts)))
    batch, _, queries, keys = next(iter(patterns.values())).shape
    for layer, pattern in patterns.items():
        if (pattern.shape[0], *pattern.shape[2:]) != (batch, queries, keys):
            raise TreeMismatch(f"the pattern of layer {layer} has shape {tuple(pattern.shape)}, {OTHERS}")
    if batch * queries * keys * sum([pattern.shape[1] for pattern in patterns.values()]) > MOST_WEIGHTS:
        raise NiceHooksError(TOO_MANY)
    data = {
        "layers": [{"label": label, "heads": pattern.shape[1]} for label, pattern in patterns.items()],
        "queries": _by_sequence(tokens, batch, queries, "queries"),
        "keys": _by_sequence(tokens if key_tokens is None else key_tokens, batch, keys, "keys"),
        "cross": key_tokens is not None,
        "weights": _packed(torch.cat(list(patterns.values()), dim=1)),
    }
    return Page(title, "attention", data)


OTHERS = "that of another one a different one: a page shows layers of one [batch, head, query, key]."

TOO_MANY = f"""\
these patterns have more than {MOST_WEIGHTS:,} weights, too many for a page. Show one example, or some layers:
    attention_view(acts.index(slice(0, 1)), parts, tokens[:1])
    attention_view(acts, parts.pattern[4:8], tokens)"""


NO_PATTERN = """\
the cache holds no attention pattern of these layers.
    with capture(model, parts.pattern) as acts:
        model(ids)"""


def _patterns(cache: Mapping[Any, Any], paths: list[Any]) -> dict[str, Tensor]:
    """The patterns that `cache` holds, by the number of their layer."""
    found: dict[str, Tensor] = {}
    for index, path in enumerate(paths):
        try:
            pattern = cache[path]
        except LookupError:
            continue
        if not isinstance(pattern, Tensor) or pattern.dim() != 4:
            what = (
                f"a tensor of shape {tuple(pattern.shape)}" if isinstance(pattern, Tensor) else type(pattern).__name__
            )
            raise TreeMismatch(f"{path} is no attention pattern [batch, head, query, key], but {what}.")
        found[_layer_of(path, index)] = pattern.detach()
    if not found:
        raise NotCaptured(NO_PATTERN)
    return found


def _layer_of(path: Any, index: int) -> str:
    """The number of the layer: a part of an anatomy knows it, `pattern[5]`."""
    said = re.search(r"\[(\d+)\]", getattr(path, "what", ""))
    return said[1] if said else str(index)


def _by_sequence(tokens: TokenTexts, batch: int, count: int, what: str) -> list[list[str]]:
    """The tokens of each sequence of the batch; one list for all serves every one."""
    lists = [tokens] * batch if all([isinstance(token, str) for token in tokens]) else tokens
    made = [[str(token) for token in each] for each in lists]
    if len(made) != batch:
        raise TreeMismatch(f"there are tokens for {len(made)} sequences, and patterns for {batch}.")
    for each in made:
        if len(each) != count:
            raise TreeMismatch(f"there are {len(each)} tokens, and the patterns have {count} {what}.")
    return made


def _packed(weights: Tensor) -> str:
    """`[batch, layer and head, query, key]` as 16-bit numbers, lowest byte first, in base 64."""
    whole = (weights.to("cpu", torch.float64).nan_to_num(0.0).clamp(0, 1) * FINEST).round().to(torch.int32)
    numbers = array("H", whole.flatten().tolist())
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
