"""The names that TransformerLens has for the parts of a transformer, and where each is in an unmodified model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from nicehooks.anatomies.body import Anatomy
from nicehooks.anatomies.finding import find_anatomy, says_what_it_is
from nicehooks.core.census import Census
from nicehooks.errors import NiceHooksError, SiteNotFound, UnsupportedModule
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape

IN_A_LAYER = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_pre": "mlp.hook_pre",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""The parts of an anatomy, and what follows `blocks.{layer}.` in their names."""

NORMALIZED = {"attn_norm": "ln1.hook_normalized", "mlp_norm": "ln2.hook_normalized"}

POSITIONS = ("wpe", "embed_positions", "embeddings.position_embeddings")
"""Where the module around the layers may have its embedding of positions."""

ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
OF_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
OF_MLP = ("pre", "post", "mid", "pre_linear")
SUBMODULES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of a hook point from its short form, as TransformerLens reads it.

    >>> get_act_name("resid_post", 3), get_act_name("q", 6), get_act_name("embed")
    ('blocks.3.hook_resid_post', 'blocks.6.attn.hook_q', 'hook_embed')
    >>> get_act_name("normalized", 2, "ln1"), get_act_name("pre5"), get_act_name("normalized")
    ('blocks.2.ln1.hook_normalized', 'blocks.5.mlp.hook_pre', 'ln_final.hook_normalized')

    Args:
        name: the short form, which may have the layer, and the part of the layer, behind it; a full name stays.
        layer: which layer.
        layer_type: the part of the layer, where the name alone does not say it: `"ln1"`, `"attn"` (or `"a"`), `"mlp"`.
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    packed = re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    if packed is not None:
        name, layer, layer_type = packed[1], packed[2], packed[3] or layer_type
    name = ALIASES.get(name, name)
    inside = _submodule(name, layer_type)
    if layer is None and name in ("scale", "normalized"):
        return f"ln_final.hook_{name}"
    return ".".join(filter(None, ["" if layer is None else f"blocks.{layer}", inside, f"hook_{name}"]))


def _submodule(name: str, layer_type: str | None) -> str:
    if name in OF_ATTENTION:
        return "attn"
    if name in OF_MLP:
        return "mlp"
    return SUBMODULES.get(layer_type or "", layer_type or "")


class CanonicalNames(NamedTuple):
    """What a model has under the names of TransformerLens.

    Attributes:
        parts: its anatomy.
        paths: where each of its hook points is, by name, in the order of the forward.
        lacking: why it does not have the others.
    """

    parts: Anatomy
    paths: dict[str, ModulePath]
    lacking: dict[str, str]


def canonical_names(model: nn.Module) -> CanonicalNames | None:
    """The names that hold in `model`; None where its anatomy is not known, or nothing in it says that it has one."""
    if not says_what_it_is(model):  # it is not run only to learn that
        return None
    try:
        parts = find_anatomy(model)
    except NiceHooksError:
        return None
    found = CanonicalNames(parts, {}, {})
    for name, what, layer in _names_wanted(parts):
        try:
            found.paths[name] = _path(model, parts, what, layer)
        except (UnsupportedModule, SiteNotFound) as error:  # no layer has it, or others have it
            found.lacking[name] = str(error)
    return found


def _names_wanted(parts: Anatomy) -> Iterator[tuple[str, str, int | None]]:
    """The name of each hook point, with the part or the role that it stands for, and its layer."""
    yield "hook_embed", "embed", None
    yield "hook_pos_embed", "pos_embed", None
    for layer in range(parts.n_layers):
        for what, name in {**NORMALIZED, **IN_A_LAYER}.items():
            yield f"blocks.{layer}.{name}", what, layer
    yield "ln_final.hook_normalized", "final_norm", None


def _path(model: nn.Module, parts: Anatomy, what: str, layer: int | None) -> ModulePath:
    if what == "pos_embed":
        return _positions(parts, model)
    if what in NORMALIZED or what == "final_norm":
        return _normalized(parts, what, layer)
    found = getattr(parts, what)
    return found if layer is None else found[layer]


def _positions(parts: Anatomy, model: nn.Module) -> ModulePath:
    names_in = Census(model).names
    names = [f"{parts.base}.{name}" if parts.base else name for name in POSITIONS]
    found = next((name for name in names if name in names_in), None)
    if found is None:
        raise UnsupportedModule(f"{parts.kind} has no embedding of positions that is added to that of the tokens.")
    return ModulePath(escape(found))


def _normalized(parts: Anatomy, role: str, layer: int | None) -> ModulePath:
    """What a layer norm returns; a norm without a mean has its `normalized` before its gain, where no value stands."""
    name, module = parts.name(role, layer), parts.module(role, layer)
    if not isinstance(module, nn.LayerNorm):
        raise UnsupportedModule(NO_NORMALIZED.format(kind=parts.kind, norm=type(module).__name__, name=name))
    rows = "/rows" if layer is not None and role == "mlp_norm" and _is_flat(parts, layer) else ""
    return ModulePath.parse(escape(name) + rows)


def _is_flat(parts: Anatomy, layer: int) -> bool:
    """Whether the MLP of a layer reads batch and positions in one dimension."""
    return str(parts.layout.layers[layer].path("mlp_pre", parts.attention)).endswith("/rows")


NO_NORMALIZED = (
    "{kind} has no hook_normalized: {norm} multiplies by its gain in the same step. What it returns is {name!r}."
)
