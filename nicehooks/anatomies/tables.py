"""Where each family of transformers keeps its parts: one table per family.

NOTE [How a table is written]
Names are those of modules in one block (or in the model around the blocks). `parts` has a path for each part, from the
block on; what it does not name is at the place in `PARTS`. In a path, `{attn}` is the name in the field `attn`, and
`{n_heads}` a size. A part that depends on the attention implementation has one place for each. `Lacks` says why there
is none.

NOTE [Where the norm stands]
Before: the norm is on the branch, and the residual stream is a plain sum. After (`post_norm`, BERT): the norm is on the
stream. Then `resid_mid` and `resid_post` are the sums that go into the two norms, so that
`resid_mid = resid_pre + attn_out` and `resid_post = mlp_in + mlp_out`, where `mlp_in` is the norm of `resid_mid`, and
the next layer's `resid_pre` the norm of `resid_post`. On both sides (Gemma 2 and 3): `attn_out` and `mlp_out` are what
is added to the stream, behind the second norm of the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from nicehooks.errors import UnsupportedModule


@dataclass(frozen=True)
class Lacks:
    """In a table, in the place of a path: why there is no such part."""

    reason: str


PartPlace = str | Lacks | Mapping[str, str | Lacks]
"""A path from the block on, a reason why there is none, or one of these per attention implementation."""

PARALLEL = Lacks(
    "attention and MLP both read resid_pre, and one addition brings both to resid_post (use_parallel_residual): there "
    "is no residual stream between them"
)

SEEN_BY: dict[str, tuple[str, str]] = {
    "eager": ("{attn}@softmax().input[0]", "{attn}@softmax()"),
    "sdpa": (
        "{attn}@scaled_dot_product_attention().scores",
        "{attn}@scaled_dot_product_attention().pattern",
    ),
    "flex_attention": ("{attn}@flex_attention().scores", "{attn}@flex_attention().pattern"),
}
"""By attention implementation: where its scores and its pattern are."""

PARTS: dict[str, PartPlace] = {
    "resid_pre": "@input[0]",
    "attn_in": "{attn}@input[0]",
    "q": "{attn}.q_proj/{n_heads}",
    "k": "{attn}.k_proj/{n_kv_heads}",
    "v": "{attn}.v_proj/{n_kv_heads}",
    "scores": {implementation: scores for implementation, (scores, _) in SEEN_BY.items()},
    "pattern": {implementation: pattern for implementation, (_, pattern) in SEEN_BY.items()},
    "z": "{attn_proj}@input[0]/{n_heads}",
    "attn_out": "{attn}[0]",
    "resid_mid": "@add#0()",  # the sum itself, not what the next norm reads: an edit is to go on in the stream
    "mlp_in": "{mlp}@input[0]",
    "mlp_pre": "{mlp_act}",
    "mlp_post": "{mlp_proj}@input[0]",
    "mlp_out": "{mlp}",
    "resid_post": "",
}
"""Where each part of a layer is, unless the table of a family says something else."""

FURTHER_PARTS = (
    "mixer_out",
    "mixer_state",
    "router",
    "router_weights",
    "router_experts",
    "experts_in",
    "experts",
    "shared_experts",
)
"""The parts of layers that mix otherwise than by attention, and of mixtures of experts: where there are such."""

PARTS_WITH_HEADS: dict[str, tuple[str, int]] = {
    "q": ("n_heads", 2),
    "k": ("n_kv_heads", 2),
    "v": ("n_kv_heads", 2),
    "scores": ("n_heads", 1),
    "pattern": ("n_heads", 1),
    "z": ("n_heads", 2),
}
"""The parts that have heads: how many, and in which dimension."""


@dataclass(frozen=True)
class Family:
    """The table of one family of transformers; see NOTE [How a table is written] in this file.

    >>> own = Family(blocks="layers", attn="attention", attn_proj="attention.out", parts={"attn_out": "attention"})
    >>> own.parts["attn_out"]
    'attention'

    Attributes:
        blocks: the `ModuleList` of the layers, in the model around them.
        attn: in a block, the module whose own forward has the softmax.
        attn_proj: the projection that mixes the heads' results into `attn_out`.
        attn_norm: the norm that goes with the attention: before it, or after it where `post_norm`.
        mlp, mlp_act, mlp_proj, mlp_norm: the MLP; its module whose output the activation function takes; its last
            projection; its norm.
        attn_post_norm, mlp_post_norm: a second norm on the branch, before it is added.
        token_embedding, final_norm: in the model around the blocks.
        unembed: names that the unembedding may have, in the model with a head; the first that is there.
        before_unembed: a projection between final norm and unembedding, in the model around the blocks.
        classifiers: names that a classifier may have in the place of an unembedding.
        logits: the module whose output the logits are, if that is not the unembedding itself.
        post_norm: whether the norms are on the residual stream, after each addition.
        softcap: the attribute of the config with the soft cap of the logits.
        n_heads, n_kv_heads, d_head, d_model: a number, or the attribute of the config that has it.
        parts: by the name of a part, its place where that is not the one in `PARTS`; further parts are welcome, under
            names that could not be meant for these.

    Raises:
        UnsupportedModule: a name in `parts` is nearly that of a part, or that of a part with a field of its own.
    """

    blocks: str = "layers"
    attn: str = "self_attn"
    attn_proj: str = "self_attn.o_proj"
    attn_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_act: str = "mlp.gate_proj"
    mlp_proj: str = "mlp.down_proj"
    mlp_norm: str = "post_attention_layernorm"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    token_embedding: str = "embed_tokens"
    final_norm: str | Lacks = "norm"
    unembed: tuple[str, ...] = ("lm_head",)
    before_unembed: str | None = None
    classifiers: tuple[str, ...] = ("score", "classifier")
    post_norm: bool = False
    softcap: str | None = None
    n_heads: str | int = "num_attention_heads"
    n_kv_heads: str | int = "num_key_value_heads"
    d_head: str | int = "head_dim"
    d_model: str | int = "hidden_size"
    parts: Mapping[str, PartPlace] = field(default_factory=dict[str, PartPlace])

    def __post_init__(self) -> None:
        for what in self.parts:
            if what in FIELDS:
                raise UnsupportedModule(NO_PLACE.format(what=what, field=FIELDS[what]))
            near = [] if what in PARTS else get_close_matches(what, [*PARTS, *FIELDS], cutoff=0.8)
            if near:
                shown = " or ".join(map(repr, near))
                raise UnsupportedModule(NEARLY.format(what=what, near=shown, all=", ".join(PARTS)))


FIELDS = {"embed": "token_embedding", "final_norm": "final_norm", "logits": "unembed"}
"""The parts that are single, and the fields of a table that say where they are."""

NO_PLACE = (
    "Family(parts={{{what!r}: …}}): {what} is no part of a layer. Where it is, says the field: Family({field}=…)."
)

NEARLY = (
    "Family(parts={{{what!r}: …}}): there is no part {what!r}. Did you mean {near}? The parts are {all}.\n"
    "  If it is a further part, give it a name that could not be meant for one of these."
)


LLAMA = Family()

GEMMA2 = replace(  # the norm stands on both sides
    LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    softcap="final_logit_softcapping",
    parts={"attn_out": "{attn_post_norm}", "mlp_out": "{mlp_post_norm}"},
)

GPT2 = Family(
    blocks="h",
    attn="attn",
    attn_proj="attn.c_proj",
    attn_norm="ln_1",
    mlp_act="mlp.c_fc",
    mlp_proj="mlp.c_proj",
    mlp_norm="ln_2",
    token_embedding="wte",
    final_norm="ln_f",
    parts={  # one projection: all of q, then all of k, then all of v
        "q": "attn.c_attn/3[:, :, 0]/{n_heads}",
        "k": "attn.c_attn/3[:, :, 1]/{n_heads}",
        "v": "attn.c_attn/3[:, :, 2]/{n_heads}",
    },
)

GPT_NEOX = Family(
    attn="attention",
    attn_proj="attention.dense",
    mlp_act="mlp.dense_h_to_4h",
    mlp_proj="mlp.dense_4h_to_h",
    token_embedding="embed_in",
    final_norm="final_layer_norm",
    unembed=("lm_head", "embed_out"),
    parts={  # one projection: per head its q, its k, its v
        "q": "attention.query_key_value/{n_heads}/3[:, :, :, 0]",
        "k": "attention.query_key_value/{n_heads}/3[:, :, :, 1]",
        "v": "attention.query_key_value/{n_heads}/3[:, :, :, 2]",
        "attn_out": "post_attention_dropout",
        "mlp_out": "post_mlp_dropout",
    },
)

GPT_NEOX_PARALLEL = replace(GPT_NEOX, parts={**GPT_NEOX.parts, "resid_mid": PARALLEL})

OPT = Family(
    attn_proj="self_attn.out_proj",
    attn_norm="self_attn_layer_norm",
    mlp_act="fc1",
    mlp_proj="fc2",
    mlp_norm="final_layer_norm",
    final_norm="final_layer_norm",
    before_unembed="project_out",
    parts={  # its layers flatten [batch, pos] before the MLP, and unflatten behind it
        "mlp_in": "fc1@input[0]/rows",
        "mlp_pre": "fc1/rows",
        "mlp_post": "fc2@input[0]/rows",
        "mlp_out": "fc2/rows",
    },
)

NO_LAST_NORM = Lacks("each layer ends with a norm of its own, so there is none after the last one")

OPT_POST_NORM = replace(  # OPT-350M
    OPT,
    final_norm=NO_LAST_NORM,
    post_norm=True,
    parts={**OPT.parts, "resid_mid": "{attn_norm}@input[0]", "resid_post": "{mlp_norm}@input[0]"},
)

BERT = Family(
    blocks="encoder.layer",
    attn="attention.self",
    attn_proj="attention.output.dense",
    attn_norm="attention.output.LayerNorm",
    mlp="intermediate",
    mlp_act="intermediate.dense",
    mlp_proj="output.dense",
    mlp_norm="output.LayerNorm",
    token_embedding="embeddings.word_embeddings",
    final_norm=NO_LAST_NORM,
    unembed=("cls.predictions",),
    post_norm=True,
    parts={
        "q": "{attn}.query/{n_heads}",
        "k": "{attn}.key/{n_heads}",
        "v": "{attn}.value/{n_heads}",
        "attn_out": "attention.output.dropout",
        "resid_mid": "{attn_norm}@input[0]",
        "mlp_out": "output.dropout",
        "resid_post": "{mlp_norm}@input[0]",
    },
)

FamilyTable = Family | Callable[[Any], Family]
"""The table of a family, or a function from the config to it."""

FAMILIES: dict[str | type, FamilyTable] = {}
"""By `config.model_type`, or by the class of the module around the blocks: what `register_anatomy` was given.

The library has no entry of its own: the parts of every family are found.
"""
