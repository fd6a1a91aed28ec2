"""The anatomy of a model: by the table that describes it, or found; checked on a short forward, and remembered.

NOTE [Anatomies are remembered]
Finding and checking cost one forward each. What they gave is kept beside the model for as long as the model has the
same modules, the same tables are registered, and the same attention implementations are set: that is looked at each
time, and costs microseconds. Of a model whose weights are not there yet nothing is kept. A layout is text alone, so it
keeps no module alive.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from nicehooks.anatomies.body import Anatomy
from nicehooks.anatomies.checking import check_parts, quiet
from nicehooks.anatomies.encoder_decoder import EncoderDecoder
from nicehooks.anatomies.layouts import Layout, Sizes, inner_name, places_of_table
from nicehooks.anatomies.mixer_states import TwoSteps, find_mixer_states, has_mixers
from nicehooks.anatomies.offloaded import is_partly_away, is_without_weights, refuse_brought_as_a_whole
from nicehooks.anatomies.recording import called_with
from nicehooks.anatomies.structure import (
    Recorded,
    attention_of,
    config_around,
    configs_in,
    found_layouts,
    main_layouts,
    running,
    several,
)
from nicehooks.anatomies.tables import FAMILIES, Family
from nicehooks.anatomies.unchanged import unchanged
from nicehooks.contexts.suspending import suspend
from nicehooks.core.census import Census
from nicehooks.errors import SiteNotFound, UnsupportedModule


class Asked(NamedTuple):
    """What `anatomy` was asked for, beside the model."""

    at: str | None = None
    check: bool = True
    attention: tuple[str, ...] = ()


def find_anatomy(model: nn.Module, at: str | None = None, check: bool = True, inputs: Any = None) -> Anatomy:
    """The anatomy of the one transformer in `model`, or of that in its module `at`.

    Raises:
        UnsupportedModule: it has an encoder and a decoder; the message says how to ask for one of them.
    """
    found = find_anatomies(model, at, check, inputs)
    return found.decoder if isinstance(found, EncoderDecoder) else found


def find_anatomies(
    model: nn.Module, at: str | None = None, check: bool = True, inputs: Any = None
) -> Anatomy | EncoderDecoder:
    """The anatomy of `model`; of an encoder and a decoder, that of both."""
    layouts = _layouts(model, at, check, inputs)
    other = partial(_body_at, model, check)
    bodies = [
        Anatomy(model, layout, partial(_again, model, at, check, index), other) for index, layout in enumerate(layouts)
    ]
    return bodies[0] if len(bodies) == 1 else EncoderDecoder(*bodies)


def says_what_it_is(model: nn.Module) -> bool:
    """Whether a module in it has a config, as in `transformers`, or is one that a table describes."""
    return any(hasattr(one, "config") or any(kind in FAMILIES for kind in type(one).__mro__) for one in model.modules())


def _body_at(model: nn.Module, check: bool, at: str) -> Anatomy:
    return find_anatomy(model, at, check)


def _again(model: nn.Module, at: str | None, check: bool, index: int) -> Layout:
    return _layouts(model, at, check, None)[index]


# --- remembering ------------------------------------------------------------------------------------------------------

_known: weakref.WeakKeyDictionary[nn.Module, dict[Asked, tuple[Any, list[Layout] | str]]] = weakref.WeakKeyDictionary()
"""By model and what was asked: what the model looked like, and what was found, or why nothing was."""


def _looks(model: nn.Module) -> Any:
    modules = tuple((id(module), type(module)) for module in model.modules())
    return modules, tuple((key, id(table)) for key, table in FAMILIES.items())


def _layouts(model: nn.Module, at: str | None, check: bool, inputs: Any) -> list[Layout]:
    asked = Asked(at, check, tuple(map(attention_of, configs_in(model))))
    known = _known.setdefault(model, {})
    looks = _looks(model)
    if inputs is None and asked in known and known[asked][0] == looks:
        found = known[asked][1]
        if isinstance(found, str):
            raise UnsupportedModule(found)
        return found
    try:
        made = _found_anew(model, asked, inputs)
    except UnsupportedModule as error:
        if not is_partly_away(model):
            known[asked] = looks, str(error)
        raise
    if not is_without_weights(model):
        known[asked] = looks, made
    return made


@contextmanager
def no_garbage() -> Iterator[None]:
    """Inside it no garbage is looked for.

    A record is some ten thousand objects for as long as it is needed. They would set off a collection of everything
    that is imported, which takes longer beside `transformers` than all that is done here.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- finding ----------------------------------------------------------------------------------------------------------


def _found_anew(model: nn.Module, asked: Asked, inputs: Any) -> list[Layout]:
    names = dict(Census(model).unwrapped())
    if asked.at is not None and asked.at not in names:
        raise SiteNotFound(f"{type(names['']).__name__} has no module {asked.at!r}.")
    inside = {
        name: one for name, one in names.items() if not asked.at or name == asked.at or name.startswith(f"{asked.at}.")
    }
    refuse_brought_as_a_whole(names)
    tables = _tables_in(names, inside)
    if len(tables) > 1:
        raise UnsupportedModule(several(names, [base for base, _ in tables]))
    with no_garbage(), quiet(model), suspend(model), running(model), unchanged(model):
        if tables:
            layouts = [_of_table(model, names, *tables[0], asked, inputs)]
        else:
            layouts = _found(model, names, asked, inputs, inside)
    for layout in layouts:
        layout.attention = attention_of(config_around(names, layout.base))
    return layouts


def _of_table(
    model: nn.Module, names: dict[str, nn.Module], base: str, family: Family, asked: Asked, inputs: Any
) -> Layout:
    config = getattr(names[base], "config", None)
    sizes = _sizes(config, family, type(names[""]).__name__)
    blocks = inner_name(base, family.blocks)
    layers = [places_of_table(family, inner_name(blocks, key), sizes, names) for key in names[blocks]._modules]
    layout = Layout(base, family, layers, sizes, attention=attention_of(config_around(names, base)))
    if asked.check:
        layout.checked = _as_checked(model, names, layout, inputs)
    return layout


def _as_checked(model: nn.Module, names: dict[str, nn.Module], layout: Layout, inputs: Any) -> str:
    """Checks a layout of a table, if the model runs on an input of ours; says how it was checked, or why not."""
    if is_without_weights(names[""]):
        return "no: it has no weights yet"
    try:
        recorded = Recorded(model, names, "", inputs)
    except UnsupportedModule:
        return "no: it did not run on an input of ours; give it one, anatomy(model, inputs=…)"
    check_parts(model, names, [layout], [partial(called_with, names[recorded.run], recorded.inputs)])
    return layout.checked


def _found(
    model: nn.Module, names: dict[str, nn.Module], asked: Asked, inputs: Any, inside: Mapping[str, nn.Module]
) -> list[Layout]:
    try:
        recorded = Recorded(model, names, asked.at or "", inputs)
    except UnsupportedModule as error:
        if "Say which" in str(error):
            raise
        raise UnsupportedModule(_unknown(names, inside, str(error))) from None
    try:
        layouts = main_layouts(found_layouts(recorded), names, asked.at or "")
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # values of shapes that no layer here has
        raise UnsupportedModule(_unknown(names, inside, f"{type(error).__name__}: {error}")) from error
    if not layouts:
        raise UnsupportedModule(_unknown(names, inside, NO_LAYERS))
    runs: list[Callable[[], Any]] = [partial(called_with, names[recorded.run], recorded.inputs)]
    steps = TwoSteps(model, names[recorded.run], recorded.inputs) if has_mixers(layouts) else None
    if asked.check:
        check_parts(model, names, layouts, runs if steps is None else [steps.first, *runs])
    if steps is not None:
        find_mixer_states(layouts, steps)
    return layouts


def _tables_in(names: Mapping[str, nn.Module], inside: Mapping[str, nn.Module]) -> list[tuple[str, Family]]:
    found: dict[int, tuple[str, Family]] = {}
    for name, module in inside.items():
        family = _family_of(module)
        if family is not None and _has_blocks(names, inner_name(name, family.blocks)):
            found.setdefault(id(module), (name, family))
    return list(found.values())


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
    heads, width = _size(config, family.n_heads), _size(config, family.d_model)
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


def _unknown(names: Mapping[str, nn.Module], inside: Mapping[str, nn.Module], why: str) -> str:
    kind = type(names[""]).__name__
    types = list(dict.fromkeys(filter(None, map(_model_type, inside.values()))))
    half = [(type_, module) for type_ in types for module in inside.values() if _model_type(module) == type_]
    looked = [f"{family.blocks!r}" for _, module in half if (family := _family_of(module)) is not None]
    lines = [f"no anatomy of {kind} is known: {why}"]
    if looked:
        lines.append(f"  its table looks for the layers in {looked[0]}, which is not there")
    key = f'"{types[0]}"' if types else kind
    lines.append("  To describe it, name its modules, and the paths of parts that are elsewhere than in a Llama:")
    lines.append("    from nicehooks.anatomies.anatomy import Family, register_anatomy")
    lines.append(f'    register_anatomy({key}, Family(blocks="layers", attn="self_attn", …, parts={{"z": "…"}}))')
    return "\n".join(lines)


NO_LAYERS = (
    "a short forward showed no layers in it, numbered modules that each map [batch, pos, d_model] to the same shape."
)
