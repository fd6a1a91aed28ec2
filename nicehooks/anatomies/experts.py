"""What each expert of a mixture adds, whichever implementation runs them: their module itself, told of one alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nicehooks.anatomies.expert_parts import TOLD, each_choice
from nicehooks.anatomies.finding import find_anatomy
from nicehooks.anatomies.reading import reader_of
from nicehooks.contexts.suspending import suspend


def expert_results(model: nn.Module, cache: Mapping[Any, Any], layer: int) -> Tensor:
    """What each of the experts that were chosen for a token adds to `experts`, weights included.

    The implementations of a mixture sort the tokens, loop over the experts or multiply all at once, so that there is no
    value to capture that they share. Here the module of the experts runs once for each choice, clean of interventions,
    and is told of that choice alone.

    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from nicehooks import anatomy, capture
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)).eval()
    >>> parts, ids = anatomy(model), torch.tensor([[3, 1, 4, 1, 5]])
    >>> told = parts.experts_in[1], parts.router_experts[1], parts.router_weights[1]
    >>> with torch.no_grad(), capture(model, *told, parts.experts[1]) as cache:
    ...     _ = model(ids)
    >>> results = expert_results(model, cache, 1)
    >>> results.shape, torch.allclose(results.sum(2), cache[parts.experts[1]], atol=1e-5)
    (torch.Size([1, 5, 2, 32]), True)

    Args:
        model: a model that `anatomy` knows, with a mixture of experts in this layer.
        cache: activations with its `experts_in`, `router_experts` and `router_weights`.
        layer: which layer.

    Returns:
        `[batch, pos, choice, d_model]`; `router_experts` says which expert each choice is.

    Raises:
        NotCaptured: the cache lacks what the experts read; the message has the line that captures it.
        UnsupportedModule: the layer has no mixture of experts that is told of its choices.
    """
    body = find_anatomy(model)
    sites = [body[part, layer] for part in TOLD]
    read = reader_of(body, cache, "expert_results", sites)
    with suspend(model):
        return each_choice(body.module("experts", layer), [str(site) for site in sites], [read(site) for site in sites])
