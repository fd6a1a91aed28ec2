"""Where every part of a model is: one layout, whether a table says so or it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.anatomies.places import PartPlaces, PlaceOfPart, Step
from nicehooks.anatomies.tables import PARTS, PARTS_WITH_HEADS, Family, Lacks
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape

SINGLE_LAYOUT = ("embed", "final_norm", "logits")
"""The parts that a model has once."""


class Sizes(NamedTuple):
    """The sizes of a transformer; `n_kv_heads` is smaller than `n_heads` under grouped-query attention."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int


class Head(NamedTuple):
    """What is done to what the unembedding gives to make the logits of it: `softcap tanh(scale x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, given: Tensor) -> Tensor:
        """The logits."""
        given = given if self.scale == 1.0 else given * self.scale
        return given if self.softcap is None else self.softcap * torch.tanh(given / self.softcap)


@dataclass(eq=False)
class Layout:
    """Where every part of a model is.

    Attributes:
        base: the name of the module around the layers.
        family: the table, if one describes the model; of a model whose parts were found, one that says no more than
            where the norms stand.
        layers: the layers.
        sizes: its sizes.
        singles: by single part, where it is, as far as it was found.
        roles: by role outside of the layers, the name of a module, as far as it was found.
        head: how the logits come from what the unembedding gives.
        is_found: whether the parts were found, and are not from a table.
        checked: how they were checked, or why not.
        attention: the attention implementation that was set.
        passed: by single part, the check that it has passed.
        shapes: by part, the shape that it had in the check.
        began: of layers that were found, when the first of them ran.
    """

    base: str
    family: Family
    layers: list[PartPlaces]
    sizes: Sizes
    singles: dict[str, str | Lacks] = field(default_factory=dict[str, "str | Lacks"])
    roles: dict[str, str] = field(default_factory=dict[str, str])
    head: Head = field(default_factory=Head)
    is_found: bool = False
    checked: str = ""
    attention: str = "eager"
    passed: dict[str, str] = field(default_factory=dict[str, str])
    shapes: dict[str, str] = field(default_factory=dict[str, str])
    began: int = 0


def places_of_table(family: Family, block: str, sizes: Sizes, names: Mapping[str, nn.Module]) -> PartPlaces:
    """Where the table says that the parts of the layer `block` are."""
    found = PartPlaces(block, gives=escape(block))
    words = {one.name: getattr(family, one.name) for one in fields(family)} | sizes._asdict()
    for what, place in {**PARTS, **family.parts}.items():
        found.parts[what] = _filled_layout(place, words, block, names)
        if what in PARTS_WITH_HEADS:
            found.heads[what] = getattr(sizes, PARTS_WITH_HEADS[what][0])
    found.d_head = sizes.d_head
    for role in ROLES:
        name = getattr(family, role)
        if isinstance(name, str):
            found.roles[role] = inner_name(block, name)
    found.form = _form_of_table(family, found)
    return found


ROLES = ("attn", "attn_proj", "attn_norm", "mlp", "mlp_act", "mlp_proj", "mlp_norm", "attn_post_norm", "mlp_post_norm")
"""The roles that a table gives to modules of a layer."""


def _filled_layout(
    place: PlaceOfPart, words: Mapping[str, object], block: str, names: Mapping[str, nn.Module]
) -> PlaceOfPart:
    if isinstance(place, Lacks):
        return place
    if isinstance(place, Mapping):
        each = {key: _filled_layout(one, words, block, names) for key, one in place.items()}
        return {key: one for key, one in each.items() if isinstance(one, str | Lacks)}
    path = place.format(**words).removeprefix(".")  # where the attention is the block itself, its name is empty
    outer = escape(block)
    full = ModulePath.parse(outer + path if path[:1] in ("", *"@#[/") else f"{outer}.{path}")
    if full.plain_name not in names and not full.is_wild:
        return Lacks(f"there is no module {full.plain_name!r} in it")
    return str(full)


def _form_of_table(family: Family, places: PartPlaces) -> list[Step]:
    """The form of the stream that the table implies; see NOTE [Where the norm stands]."""
    parts = [part for part in ("attn_out", "mlp_out") if places.has(part)]
    if not family.post_norm:
        return [Step("add", part) for part in parts]
    norms = {"attn_out": "attn_norm", "mlp_out": "mlp_norm"}
    form: list[Step] = []
    for part in parts:
        norm = escape(places.roles[norms[part]])
        form += [Step("add", part), Step("norm", norm, f"{norm}@input[0]")]
    return form


def inner_name(outer: str, inner: str) -> str:
    """The name of the module `inner` of the module `outer`."""
    return f"{outer}.{inner}" if outer and inner else outer or inner
