"""Which table describes a model, and where in it the modules are that the table names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from torch import nn

from nicehooks.anatomies.parts import Part, Parts
from nicehooks.anatomies.tables import FAMILIES, PARTS, PARTS_WITH_HEADS, Family, Lacks, PartPlace
from nicehooks.core.census import Census
from nicehooks.errors import SiteNotFound, UnsupportedModule
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape


class Sizes(NamedTuple):
    """The sizes of a transformer; `n_kv_heads` is smaller than `n_heads` under grouped-query attention."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int


class Anatomy:
    """The parts of one model by their names: what `anatomy(model)` returns, where the names are described.

    `resid_pre`, `attn_in`, … are sequences over the layers; `embed`, `final_norm` and `logits` are single paths. A part
    is looked up when it is asked for, and only then found missing.

    Attributes:
        family: the table that describes the model.
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

    def __init__(self, model: nn.Module, base: str, family: Family, names: Mapping[str, nn.Module]) -> None:
        self.family = family
        self.base = base
        self.config: Any = getattr(names[base], "config", None)
        self._model = model
        self._names = names
        blocks = _inner_name(base, family.blocks)
        self._blocks = tuple(_inner_name(blocks, key) for key in names[blocks]._modules)
        self.sizes = _sizes(self.config, family, self.kind)
        self.n_layers = len(self._blocks)
        self.n_heads, self.n_kv_heads, self.d_head, self.d_model = self.sizes

    # modules

    @property
    def kind(self) -> str:
        """The class of the model, for messages."""
        return type(self._names[""]).__name__

    def name(self, role: str, layer: int | None = None) -> str:
        """The name of a module by its role, a field of the table: `name("attn", 3)` is `"transformer.h.3.attn"`.

        Args:
            role: `"block"`, `"attn"`, `"attn_norm"`, `"mlp_proj"`, … in a layer; `"token_embedding"`, `"final_norm"`,
                `"before_unembed"`, `"unembed"` outside of the layers.
            layer: which layer, for a role in a layer.

        Raises:
            UnsupportedModule: this model has no such module.
        """
        if role == "unembed":
            return self._unembed()
        inside = self._block(layer) if layer is not None else self.base
        wanted: Any = "" if role == "block" else getattr(self.family, role, None)
        if not isinstance(wanted, str):
            reason = wanted.reason if isinstance(wanted, Lacks) else "the table of its family names none"
            raise UnsupportedModule(f"{self.kind} has no {role}: {reason}.")
        name = _inner_name(inside, wanted)
        if name not in self._names:
            raise UnsupportedModule(f"{self.kind} has no {role}: there is no module {name!r} in it.")
        return name

    def module(self, role: str, layer: int | None = None) -> nn.Module:
        """The module itself, by its role; see `name`."""
        return self._names[self.name(role, layer)]

    def has(self, role: str, layer: int | None = None) -> bool:
        """Whether there is a module of this role; see `name`."""
        try:
            return self.name(role, layer) in self._names
        except UnsupportedModule:
            return False

    def _block(self, layer: int) -> str:
        if not -self.n_layers <= layer < self.n_layers:
            raise SiteNotFound(
                f"{self.kind} has {self.n_layers} layers, 0 … {self.n_layers - 1}, and no layer {layer}."
            )
        return self._blocks[layer]

    def _around(self) -> Iterator[str]:
        """The base and the modules around it, from the inside out."""
        name = self.base
        while name:
            yield name
            name = name.rpartition(".")[0]
        yield ""

    def _head(self, options: tuple[str, ...]) -> tuple[str, str] | None:
        """The nearest module around that has one of `options`, and its name."""
        found = ((outer, _inner_name(outer, option)) for outer in self._around() for option in options)
        return next(((outer, name) for outer, name in found if name in self._names), None)

    def _unembed(self) -> str:
        found = self._head(self.family.unembed)
        if found is None:
            raise UnsupportedModule(
                f"{self.kind} has no unembedding ({' or '.join(map(repr, self.family.unembed))}), so that it gives no "
                "logits over tokens: take the model with a language modelling head around it."
            )
        return found[1]

    # parts

    def __getattr__(self, what: str) -> Any:
        if what in ("embed", "final_norm"):
            return Part.at(escape(self.name("token_embedding" if what == "embed" else what)), what)
        if what == "logits":
            return self._logits()
        place = None if what.startswith("_") else self.family.parts.get(what, PARTS.get(what))
        if place is None:
            raise AttributeError(NO_PART.format(what=what, names=", ".join(self._known())))
        path = self._path(what, self._here(what, place))
        return Parts((self._part(what, path, layer) for layer in range(self.n_layers)), what)

    def lacks(self, what: str) -> bool:
        """Whether the table says of a part (`"mlp_out"`, `"final_norm"`) that the model lacks it."""
        own = self.family.final_norm if what == "final_norm" else self.family.parts.get(what)
        return isinstance(own, Lacks)

    def _known(self) -> list[str]:
        return ["embed", *PARTS, *(what for what in self.family.parts if what not in PARTS), "final_norm", "logits"]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._known()]

    @property
    def softcap(self) -> float | None:
        """The soft cap of the logits, if the model has one."""
        return None if self.family.softcap is None else getattr(self.config, self.family.softcap, None)

    def _logits(self) -> Part:
        unembed = self._head(self.family.unembed)
        classifier = self._head(self.family.classifiers)
        if unembed is not None and self.softcap is None:
            return Part.at(escape(unembed[1]), "logits")
        found = unembed or classifier
        if found is None:
            self._unembed()
            raise AssertionError("unreachable")
        return Part.at(f"{escape(found[0])}['logits']", "logits")

    @property
    def attention(self) -> str:
        """The attention implementation that is set now; "eager" where the model says nothing of it."""
        # Attention modules of transformers read this name at each call (5.0 … 5.23); there is no public one.
        return getattr(self.config, "_attn_implementation", None) or "eager"

    def _here(self, what: str, place: PartPlace) -> str | Lacks:
        if isinstance(place, str | Lacks):
            return place
        if self.attention not in place:
            known = " or ".join(repr(name) for name in place)
            raise UnsupportedModule(FUSED.format(kind=self.kind, what=what, now=self.attention, known=known))
        return place[self.attention]

    def _path(self, what: str, place: str | Lacks) -> str:
        if isinstance(place, Lacks):
            raise UnsupportedModule(f"{self.kind} has no {what}: {place.reason}.")
        names = {one.name: getattr(self.family, one.name) for one in fields(self.family)}
        return place.format(**{**names, **self.sizes._asdict()})

    def _part(self, what: str, path: str, layer: int) -> Part:
        block = escape(self._blocks[layer])
        full = ModulePath.parse(block + path if path[:1] in ("", *"@#[/") else f"{block}.{path}")
        if full.plain_name not in self._names and not full.is_wild:
            raise UnsupportedModule(f"{self.kind} has no {what}: there is no module {full.plain_name!r} in it.")
        size, dim = PARTS_WITH_HEADS.get(what, (None, 2))
        return Part.at(full, f"{what}[{layer}]", getattr(self.sizes, size) if size else None, dim)

    def __repr__(self) -> str:
        where = f" at {self.base!r}" if self.base else ""
        shown = ", ".join(f"{name}={size}" for name, size in self.sizes._asdict().items())
        return f"Anatomy of {self.kind}{where}: n_layers={self.n_layers}, {shown}"


NO_PART = "an anatomy has no {what!r}; its parts are {names}."

FUSED = (
    "{kind} has no {what} under attention implementation {now!r}: one kernel computes attention, and scores and "
    "pattern are never there.\n"
    '    model.set_attn_implementation("eager")  # {known} show it; then ask for the part again'
)


# --- finding ----------------------------------------------------------------------------------------------------------


def find_anatomy(model: nn.Module, at: str | None = None) -> Anatomy:
    """The anatomy of the one language model in `model`, or of that in its module `at`."""
    names = dict(Census(model).unwrapped())
    if at is not None and at not in names:
        raise SiteNotFound(f"{type(names['']).__name__} has no module {at!r}.")
    inside = {name: module for name, module in names.items() if not at or name == at or name.startswith(f"{at}.")}
    found: dict[int, tuple[str, Family]] = {}
    for name, module in inside.items():
        family = _family_of(module)
        if family is not None and _has_blocks(names, _inner_name(name, family.blocks)):
            found.setdefault(id(module), (name, family))
    if len(found) != 1:
        raise UnsupportedModule(_several(names, found) if found else _unknown(names, inside))
    ((base, family),) = found.values()
    return Anatomy(model, base, family, names)


def _family_of(module: nn.Module) -> Family | None:
    config = getattr(module, "config", None)
    keys = [*type(module).__mro__, _model_type(module)]
    table = next((FAMILIES[key] for key in keys if key in FAMILIES), None)
    return table(config) if callable(table) else table


def _model_type(module: nn.Module) -> str:
    found = getattr(getattr(module, "config", None), "model_type", "")
    return found if isinstance(found, str) else ""


def _has_blocks(names: Mapping[str, nn.Module], blocks: str) -> bool:
    return blocks in names and any(child is not None for child in names[blocks]._modules.values())


def _sizes(config: Any, family: Family, kind: str) -> Sizes:
    heads = _size(config, family.n_heads)
    width = _size(config, family.d_model)
    if heads is None or width is None:
        missing = "n_heads" if heads is None else "d_model"
        where = getattr(family, missing)
        raise UnsupportedModule(
            f"the table of {kind} says that {missing} is config.{where}, which is not there: write the number, or the "
            f"attribute of the config that has it, Family({missing}=…)."
        )
    return Sizes(
        heads, _size(config, family.n_kv_heads) or heads, _size(config, family.d_head) or width // heads, width
    )


def _size(config: Any, given: str | int) -> int | None:
    return given if isinstance(given, int) else getattr(config, given, None)


def _inner_name(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner


def _several(names: Mapping[str, nn.Module], found: Mapping[int, tuple[str, Family]]) -> str:
    bases = [base for base, _ in found.values()]
    return (
        f"{type(names['']).__name__} has {len(bases)} transformers in it: {', '.join(map(repr, bases))}. Say which:\n"
        f'    anatomy(model, at="{bases[0]}")'
    )


def _unknown(names: Mapping[str, nn.Module], inside: Mapping[str, nn.Module]) -> str:
    kind = type(names[""]).__name__
    types = list(dict.fromkeys(filter(None, map(_model_type, inside.values()))))
    known = ", ".join(sorted(str(key) if isinstance(key, str) else key.__name__ for key in FAMILIES))
    half = [(type_, module) for type_ in types for module in inside.values() if _model_type(module) == type_]
    looked = [f"{family.blocks!r}" for _, module in half if (family := _family_of(module)) is not None]
    lines = [f"no anatomy of {kind} is known."]
    lines.append(f"  its config.model_type: {', '.join(map(repr, types)) or 'there is none'}; known are: {known}")
    if looked:
        lines.append(f"  its table looks for the layers in {looked[0]}, which is not there")
    key = f'"{types[0]}"' if types else kind
    lines.append("  To describe it, name its modules, and the paths of parts that are elsewhere than in a Llama:")
    lines.append("    from nicehooks.anatomies.anatomy import Family, register_anatomy")
    lines.append(f'    register_anatomy({key}, Family(blocks="layers", attn="self_attn", …, parts={{"z": "…"}}))')
    return "\n".join(lines)
