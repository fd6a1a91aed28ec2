"""Hooks as a tree of places, bound to a model for the length of a context.

The names and their meaning are those of transformer-debugger's hooks. There a model is written for them, and takes the
tree as an argument; here the tree is bound to a model as it is, through the interventions of this library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

import nicehooks.public  # noqa: F401  # first: what both hand out belongs to it
from nicehooks.anatomies.anatomy import anatomy
from nicehooks.compat.transformer_debugger.autoencoder_hooks import AutoencoderHooks
from nicehooks.compat.transformer_debugger.binding import HooksOn
from nicehooks.compat.transformer_debugger.gradient_hooks import GradientHook, grad_hook_wrapper
from nicehooks.compat.transformer_debugger.hook_collections import (
    AttentionHooks,
    FwdBwdHooks,
    HookCollection,
    MLPHooks,
    NormalizationHooks,
    ResidualStreamHooks,
    ResidualStreamTorsoHooks,
)
from nicehooks.compat.transformer_debugger.hook_lists import AtLayers, ConditionalHooks, Hooks, WrapperHooks, _IsAt
from nicehooks.compat.transformer_debugger.places import PLACES, spots
from nicehooks.errors import HooksMisuse, NoSuchHooks, UnsupportedModule
from nicehooks.moved import belong_to

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AtLayers",
    "AttentionHooks",
    "AutoencoderHooks",
    "ConditionalHooks",
    "FwdBwdHooks",
    "GradientHook",
    "HookCollection",
    "Hooks",
    "HooksMisuse",
    "MLPHooks",
    "NoSuchHooks",
    "NormalizationHooks",
    "ResidualStreamHooks",
    "ResidualStreamTorsoHooks",
    "TransformerHooks",
    "WrapperHooks",
    "grad_hook_wrapper",
]


class TransformerHooks(HookCollection):
    """The places in a transformer, with hooks on their values and gradients, for any layer of any model.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)).eval()
    >>> hooks, seen = TransformerHooks(), []
    >>> _ = hooks.mlp.post_act.append_fwd(lambda value, layer: seen.append((layer, value.shape)))
    >>> _ = hooks.resid.torso.post_mlp.append_fwd(AtLayers(1).append(lambda value, layer: value * 0))
    >>> with hooks.on(model):
    ...     logits = model(torch.tensor([[1, 2, 3]])).logits
    >>> seen, logits.std(dim=1).max().item() < 1e-6
    ([(0, torch.Size([1, 3, 64])), (1, torch.Size([1, 3, 64]))], True)

    Hooks at a place that every layer has are told which one by the keyword `layer`. Which value each name means is in
    [Moving over](docs/from_transformer_debugger.md).
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_subhooks("mlp", MLPHooks())
        self.add_subhooks("attn", AttentionHooks())
        self.add_subhooks("resid", ResidualStreamHooks())
        self.add_subhooks("logits", FwdBwdHooks())

    @classmethod
    def for_model(cls, model: nn.Module, at: str | None = None) -> Self:
        """A tree in which nothing can be appended where `model` has no such place.

        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        >>> hooks = TransformerHooks.for_model(LlamaModel(config))
        >>> hooks.resid.ln_f.post_mean_subtraction.append_fwd(print)
        Traceback (most recent call last):
            ...
        nicehooks.errors.UnsupportedModule: hooks cannot be at 'resid.ln_f.post_mean_subtraction': LlamaModel ...

        `append_all` passes over such places.

        Args:
            model: the model that the hooks are for.
            at: as for `on`.
        """
        tree, parts = cls(), anatomy(model, at)
        for place in PLACES:
            try:
                spots(parts, place)
            except UnsupportedModule as error:
                for hooks in tree.at(place).every_list():
                    hooks.refusal = str(error)
        return tree

    def on(self, model: nn.Module, at: str | None = None) -> HooksOn:
        """A context in which the hooks act on `model`; see `TransformerHooks`.

        It is an intervention like any other: it acts in the thread or task that entered it, under `torch.func`
        transforms too, in the order of entering among others, and leaves no trace. Places without hooks cost nothing.

        Args:
            model: a model whose parts are known (see `anatomy`), as it is.
            at: the name of the transformer in it, if it has several.

        Raises:
            UnsupportedModule: on entry: hooks are at a place that the model does not have.
            HooksMisuse: on entry: hooks are at no place of a transformer, or bind `layer` themselves, or are
                `AtLayers` that the model does not have; on leaving: a place got its first hooks inside.
            SiteNotReached: on leaving: a place was reached in no layer, or its gradient did not come.
        """
        return HooksOn(self, model, at)


belong_to(__name__, [_IsAt, *(globals()[name] for name in __all__)])
