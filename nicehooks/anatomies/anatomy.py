"""`anatomy`: the parts of a transformer by the names that the field gives them, on the model as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from nicehooks.anatomies.body import Anatomy
from nicehooks.anatomies.encoder_decoder import EncoderDecoder
from nicehooks.anatomies.finding import find_anatomies
from nicehooks.anatomies.lenses import direct_logit_attribution, head_results, logit_lens
from nicehooks.anatomies.parts import Part, Parts
from nicehooks.anatomies.tables import BERT, FAMILIES, GPT2, GPT_NEOX, LLAMA, OPT, Family, FamilyTable, Lacks
from nicehooks.errors import UnsupportedModule

__all__ = [
    "BERT",
    "FAMILIES",
    "GPT2",
    "GPT_NEOX",
    "LLAMA",
    "OPT",
    "Anatomy",
    "EncoderDecoder",
    "Family",
    "Lacks",
    "Part",
    "Parts",
    "anatomy",
    "direct_logit_attribution",
    "head_results",
    "logit_lens",
    "register_anatomy",
]


def anatomy(model: nn.Module, at: str | None = None, *, check: bool = True, inputs: Any = None) -> Any:
    """The parts of a transformer by name: paths, for wherever a path goes.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import ablate, capture
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=32, vocab_size=100)).eval()
    >>> parts, ids = anatomy(model), torch.tensor([[3, 1, 4, 1, 5]])
    >>> parts.z[2], parts.resid_post[-1]
    (Part('transformer.h.2.attn.c_proj@input[0]/4'), Part('transformer.h.3'))
    >>> with ablate(model, parts.z[2].head(3)), capture(model, parts.resid_post, parts.pattern[3]) as acts:
    ...     _ = model(ids)
    >>> acts.stack(parts.resid_post).shape, acts[parts.pattern[3]].shape
    (torch.Size([4, 1, 5, 32]), torch.Size([1, 4, 5, 5]))

    Sequences over the layers, whose items are paths and whose slices are sequences again:

    - `resid_pre`, `resid_mid`, `resid_post`: the residual stream before, in the middle of and after the layer,
      `[batch, pos, d_model]`. An edit there goes on in the stream.
    - `attn_in`, `mlp_in`: what the branch reads, behind its norm, `[batch, pos, d_model]`.
    - `q`, `k`, `v`: what the projections give, `[batch, pos, head, d_head]`, before rotary embedding, and before a norm
      of queries and keys. Under grouped-query attention `k` and `v` have `n_kv_heads` heads.
    - `scores`, `pattern`: before and after the softmax, `[batch, head, query, key]`; scores are masked. Where they are
      depends on the attention implementation that the model has when they are asked for.
    - `z`: the sum of values of each head, `[batch, pos, head, d_head]`.
    - `attn_out`, `mlp_out`: what the branch adds to the stream, `[batch, pos, d_model]`.
    - `mlp_pre`, `mlp_post`: the neurons before the activation function (of a gated MLP, the gate), and what the last
      projection reads, `[batch, pos, d_mlp]`.

    - `mixer_out`: what mixes positions otherwise than by attention adds to the stream (Mamba, RWKV, linear attention).
    - `mixer_state`: what such a mixer writes into the cache, where that is one value: what the next step goes on from.
    - of a mixture of experts: `router`, its logits; `experts_in`, `router_experts` and `router_weights`, what the
      experts read, which are chosen, and with what weights; `experts` and `shared_experts`, what they give. What each
      expert gives alone, `expert_results` computes.

    `.head(i)` of `q`, `k`, `v`, `scores`, `pattern` and `z` is one head, `.each_head` one site per head, `.grad` the
    gradients, `.at[:, -1]` the same subscript in every layer; `parts["z", 5]` is `parts.z[5]`. Single paths
    are `embed` (the embedding of the
    tokens), `final_norm` and `logits`. `n_layers`, `n_heads`, `n_kv_heads`, `d_head` and `d_model` are sizes;
    `name("attn", 3)` and `module("attn", 3)` lead to modules by their role.

    The parts are found in one short forward, on tokens that the model's own embedding has, and checked by numbers in a
    second one; `report()` says how, and which check each has passed. A model with an encoder and a decoder has the
    parts in `.encoder` and in `.decoder`, there also `cross_attn_out` and `cross_q`, …, `cross_z`.
    Of a model that reads pictures and tokens these are the parts of its language model; `.vision` has those of its
    vision tower.

    Args:
        model: any transformer, with any head or none, also inside another module or inside `torch.compile` or
            `DistributedDataParallel`; what is not found is what `register_anatomy` has described.
        at: the name of the module that has the transformer in it, for a model with several.
        check: whether the parts are checked. Without, none of them is refused.
        inputs: what the model is run on, where it takes something else than tokens: arguments by name, or in order.

    Returns:
        An `Anatomy`; of a model with an encoder and a decoder, an `EncoderDecoder`.

    Raises:
        UnsupportedModule: no layers were found, or the model did not run; or, when a part is asked for, it has none.
    """
    return find_anatomies(model, at, check, inputs)


def register_anatomy(kind: str | type[nn.Module], table: FamilyTable) -> None:
    """Describes a family of models, for `anatomy`.

    >>> from nicehooks.anatomies.anatomy import Family, Lacks
    >>> parts = {"q": "attn.q/{n_heads}", "resid_mid": Lacks("attention and MLP run side by side")}
    >>> register_anatomy("my_model", Family(blocks="blocks", attn="attn", attn_proj="attn.out", parts=parts))

    Args:
        kind: the `config.model_type` of the models, or the class of the module around the layers.
        table: the table; or a function from the config to it, where a setting decides.

    Raises:
        UnsupportedModule: `kind` or `table` is something else.
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnsupportedModule(f"register_anatomy takes a config.model_type or a class of modules, not {kind!r}.")
    if not isinstance(table, Family) and not callable(table):
        raise UnsupportedModule(f"register_anatomy takes a Family, or a function from a config to one, not {table!r}.")
    FAMILIES[kind] = table
