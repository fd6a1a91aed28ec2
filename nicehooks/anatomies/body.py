"""The parts of one model by their names: what `anatomy(model)` returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import nn

from nicehooks.anatomies.layouts import SINGLE_LAYOUT, Head, Layout, inner_name
from nicehooks.anatomies.parts import Part, Parts
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.refusing import NO_LANGUAGE, NO_PART, NO_UNEMBEDDING, why_lacking, why_no_module
from nicehooks.anatomies.reporting import Report
from nicehooks.anatomies.structure import attention_of, config_around, names_around
from nicehooks.anatomies.tables import FURTHER_PARTS, PARTS, SEEN_BY, Family, Lacks
from nicehooks.anatomies.towers import reads_pictures, vision_tower
from nicehooks.core.census import Census
from nicehooks.errors import SiteNotFound, UnsupportedModule
from nicehooks.paths.names import escape


class Anatomy:
    """The parts of one model by their names: what `anatomy(model)` returns, where the names are described.

    `resid_pre`, `attn_in`, … are sequences over the layers; `embed`, `final_norm` and `logits` are single paths. A part
    is looked up when it is asked for, and only then found missing.

    Attributes:
        layout: where every part is.
        base: the name of the module around the blocks, `"transformer"`; empty where that is the model itself.
        n_layers, n_heads, n_kv_heads, d_head, d_model: its sizes.
    """

    embed: Part
    resid_pre: Parts
    attn_in: Parts
    q: Parts
    k: Parts
    v: Parts
    scores: Parts
    pattern: Parts
    z: Parts
    attn_out: Parts
    resid_mid: Parts
    mlp_in: Parts
    mlp_pre: Parts
    mlp_post: Parts
    mlp_out: Parts
    resid_post: Parts
    final_norm: Part
    logits: Part

    def __init__(
        self, model: nn.Module, layout: Layout, again: Callable[[], Layout], at: Callable[[str], Anatomy]
    ) -> None:
        """The anatomy that `layout` describes.

        Args:
            model: the model.
            layout: where its parts are.
            again: gives the layout under the attention implementation that is set then.
            at: gives the anatomy of another module of the model, by its name.
        """
        self._model = model
        self._again = again
        self._at = at
        self._layout = layout
        self.base = layout.base
        self.sizes = layout.sizes
        self.n_layers = len(layout.layers)
        self.n_heads, self.n_kv_heads, self.d_head, self.d_model = layout.sizes

    @property
    def layout(self) -> Layout:
        """Where every part is, under the attention implementation that is set now."""
        if self._layout.attention != self.attention:
            self._layout = self._again()
        return self._layout

    @property
    def family(self) -> Family:
        """The table that describes the model; of one whose parts were found, what it says of its norms."""
        return self._layout.family

    # towers

    @property
    def vision(self) -> Anatomy:
        """The parts of the vision tower, of a model that reads pictures; of the tower itself, its own.

        Raises:
            UnsupportedModule: the model reads none, its tower does not run, or it has several.
        """
        tower = vision_tower(self._names)
        return self if f"{self.base}.".startswith(f"{tower}." if tower else "") else self._at(tower)

    @property
    def language(self) -> Anatomy:
        """The parts of the language model, of a model that reads pictures, too: those that it has itself.

        Raises:
            UnsupportedModule: this is the anatomy of a model, or of a tower, that reads no tokens.
        """
        tower = next((name for name in names_around(self.base) if reads_pictures(self._names[name])), None)
        if tower is not None:
            raise UnsupportedModule(NO_LANGUAGE.format(kind=self.kind, tower=tower or "the model itself"))
        return self

    # modules

    @cached_property
    def _names(self) -> dict[str, nn.Module]:
        return dict(Census(self._model).unwrapped())

    @property
    def config(self) -> Any:
        """The config of the module around the blocks, or of the nearest one around that."""
        return config_around(self._names, self.base)

    @property
    def kind(self) -> str:
        """The class of the model, for messages."""
        return type(self._names[""]).__name__

    def name(self, role: str, layer: int | None = None) -> str:
        """The name of a module by its role: `name("attn", 3)` is `"transformer.h.3.attn"`.

        Args:
            role: `"block"`, `"attn"`, `"attn_norm"`, `"mlp_proj"`, … in a layer; `"token_embedding"`, `"final_norm"`,
                `"before_unembed"`, `"unembed"` outside of the layers.
            layer: which layer, for a role in a layer.

        Raises:
            UnsupportedModule: this model has no such module.
        """
        if role == "unembed" and layer is None:
            return self._unembed()
        name = self._named(role, layer)
        if name is None:
            raise UnsupportedModule(f"{self.kind} has no {role}: {why_no_module(self._layout, role, layer)}.")
        if name not in self._names:
            raise UnsupportedModule(f"{self.kind} has no {role}: there is no module {name!r} in it.")
        return name

    def _named(self, role: str, layer: int | None) -> str | None:
        if layer is not None:
            places = self._layer(layer)
            return places.block if role == "block" else places.roles.get(role)
        if self._layout.is_found:
            return self._layout.roles.get(role)
        wanted = getattr(self.family, role, None)
        return inner_name(self.base, wanted) if isinstance(wanted, str) else None

    def module(self, role: str, layer: int | None = None) -> nn.Module:
        """The module itself, by its role; see `name`."""
        return self._names[self.name(role, layer)]

    def has(self, role: str, layer: int | None = None) -> bool:
        """Whether there is a module of this role; see `name`."""
        try:
            return self.name(role, layer) in self._names
        except UnsupportedModule:
            return False

    def _layer(self, layer: int) -> PartPlaces:
        if not -self.n_layers <= layer < self.n_layers:
            raise SiteNotFound(
                f"{self.kind} has {self.n_layers} layers, 0 … {self.n_layers - 1}, and no layer {layer}."
            )
        return self.layout.layers[layer]

    def _head(self, options: tuple[str, ...]) -> tuple[str, str] | None:
        """The nearest module around that has one of `options`, and its name."""
        found = ((outer, inner_name(outer, option)) for outer in names_around(self.base) for option in options)
        return next(((outer, name) for outer, name in found if name in self._names), None)

    def _unembed(self) -> str:
        if self._layout.is_found:
            found = self._layout.roles.get("unembed")
        else:
            head = self._head(self.family.unembed)
            found = None if head is None else head[1]
        if found is None:
            looked = f" ({' or '.join(map(repr, self.family.unembed))})" if not self._layout.is_found else ""
            raise UnsupportedModule(NO_UNEMBEDDING.format(kind=self.kind, looked=looked))
        return found

    # parts

    def __getattr__(self, what: str) -> Any:
        if what.startswith("_"):
            raise AttributeError(what)
        if what in SINGLE_LAYOUT:
            return self._single(what)
        if not any(what in places.parts for places in self.layout.layers):
            if what in PARTS or what in FURTHER_PARTS:
                raise UnsupportedModule(f"{self.kind} has no {what}: its layers have none.")
            raise AttributeError(NO_PART.format(what=what, names=", ".join(self._known())))
        there = {layer: path for layer, path in enumerate(map(self._place(what), self.layout.layers)) if path}
        if not there:
            raise UnsupportedModule(why_lacking(self.layout, what, self.attention, self.kind))
        made = (self._part(what, path, layer) for layer, path in there.items())
        return Parts(made, what, None if len(there) == self.n_layers else (tuple(there), self.n_layers))

    def __getitem__(self, key: str | tuple[str, int]) -> Any:
        """A part by its name, `parts["resid_post", 5]`: of one layer, or of all."""
        what, layer = key if isinstance(key, tuple) else (key, None)
        found = getattr(self, what)
        return found if layer is None else found[layer]

    def _place(self, what: str) -> Callable[[PartPlaces], str | None]:
        is_hidden = what.removeprefix("cross_") in ("scores", "pattern") and self.attention not in SEEN_BY

        def place(places: PartPlaces) -> str | None:
            found = None if is_hidden else places.path(what, self.attention)
            return found if isinstance(found, str) else None

        return place

    def _single(self, what: str) -> Part:
        found = self.layout.singles.get(what)
        if isinstance(found, Lacks):
            raise UnsupportedModule(f"{self.kind} has no {what}: {found.reason}.")
        if found is not None:
            return Part.at(found, what)
        if what == "logits":
            return Part.at(self._logits(), what)
        return Part.at(escape(self.name("token_embedding" if what == "embed" else what)), what)

    def lacks(self, what: str) -> bool:
        """Whether the model has no such part (`"mlp_out"`, `"final_norm"`) in any layer."""
        if what in SINGLE_LAYOUT:
            own = self.layout.singles.get(what, self.family.final_norm if what == "final_norm" else None)
            return isinstance(own, Lacks)
        return not any(map(self._place(what), self.layout.layers))

    def _known(self) -> list[str]:
        found = dict.fromkeys(part for places in self.layout.layers for part in places.parts)
        return ["embed", *PARTS, *(part for part in found if part not in PARTS), "final_norm", "logits"]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._known()]

    @property
    def post_norm(self) -> bool:
        """Whether the norms stand on the stream."""
        return self.family.post_norm

    @property
    def head(self) -> Head:
        """How the logits come from what the unembedding gives."""
        if self._layout.is_found or self.family.softcap is None:
            return self._layout.head
        return Head(softcap=getattr(self.config, self.family.softcap, None))

    @property
    def softcap(self) -> float | None:
        """The soft cap of the logits, if the model has one."""
        return self.head.softcap

    def _logits(self) -> str:
        unembed = None if self._layout.is_found else self._head(self.family.unembed)
        classifier = None if self._layout.is_found else self._head(self.family.classifiers)
        if unembed is not None and self.softcap is None:
            return escape(unembed[1])
        found = unembed or classifier
        if found is None:
            self._unembed()
            raise AssertionError("unreachable")
        return f"{escape(found[0])}['logits']"

    @property
    def attention(self) -> str:
        """The attention implementation that is set now; "eager" where the model says nothing of it."""
        return attention_of(self.config)

    def _part(self, what: str, path: str, layer: int) -> Part:
        heads = self.layout.layers[layer].heads.get(what)
        dim = 1 if what.removeprefix("cross_") in ("scores", "pattern") else 2
        return Part.at(path, f"{what}[{layer}]", heads, dim)

    def report(self) -> Report:
        """A table of every part: its path, its shape, how it was found, and which check it has passed."""
        return Report(self)

    def __repr__(self) -> str:
        where = f" at {self.base!r}" if self.base else ""
        shown = ", ".join(f"{name}={size}" for name, size in self.sizes._asdict().items())
        return f"Anatomy of {self.kind}{where}: n_layers={self.n_layers}, {shown}"
