"""The layouts of a model that no table describes: found in one short forward."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from nicehooks.anatomies.branches import layer_places
from nicehooks.anatomies.ends import Ends
from nicehooks.anatomies.layouts import Layout, Sizes
from nicehooks.anatomies.packed import as_one_row
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.recording import Record, record_forward
from nicehooks.anatomies.short_inputs import short_inputs
from nicehooks.anatomies.stacks import Layer, Stack, stacks_in
from nicehooks.anatomies.tables import SEEN_BY, Family
from nicehooks.core.calling import has_forward
from nicehooks.errors import UnsupportedModule
from nicehooks.paths.names import escape


class Recorded:
    """A short forward of a model.

    Attributes:
        run: the name of the module that was run.
        inputs: what it was run on.
        output: what it gave.
        record: what happened.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, nn.Module], at: str, inputs: Any) -> None:
        faults: list[str] = []
        for run in runnable_names(names, at):
            for given in [inputs] if inputs is not None else short_inputs(names[run]):
                try:
                    self._record(model, names[run], given)
                except Exception as error:  # whatever a model may raise on an input that is not meant for it
                    faults.append(f"{run or 'the model'}: {type(error).__name__}: {_first_line_of(error)}")
                else:
                    self.run, self.inputs = run, given
                    return
        raise UnsupportedModule(no_run(names, faults, _models_in(names, at)))

    def _record(self, model: nn.Module, run: nn.Module, given: Any) -> None:
        before = [id(module) for module in model.modules()]
        self.output, self.record = record_forward(model, run, given)
        if before != [id(module) for module in model.modules()]:  # it has made itself anew on the way
            self.output, self.record = record_forward(model, run, given)


def runnable_names(names: Mapping[str, nn.Module], at: str) -> Iterator[str]:
    """The modules that might run on an input of our own, the likeliest first: `at`, then what says what it is."""
    yield at
    outer = _models_in(names, at)
    if len({id(names[name]) for name in outer}) > 1 and not callable_itself(names[at]):
        raise UnsupportedModule(several(names, outer))
    if not callable_itself(names[at]):
        yield from outer[:1]


def _models_in(names: Mapping[str, nn.Module], at: str) -> list[str]:
    """The models inside of the module `at`, those that are in no other one."""
    inside = [name for name in names if name != at and (not at or name.startswith(f"{at}."))]
    models = [
        name for name in inside if hasattr(names[name], "config") and hasattr(names[name], "get_input_embeddings")
    ]
    return [name for name in models if not any(name.startswith(f"{other}.") for other in models)]


def callable_itself(module: nn.Module) -> bool:
    """Whether it is a model with a config, which says what it reads; no container of models."""
    return hasattr(module, "config") and has_forward(module)


def several(names: Mapping[str, nn.Module], bases: list[str]) -> str:
    """The message that asks which of the transformers in a model is meant."""
    return (
        f"{type(names['']).__name__} has {len(bases)} transformers in it: {', '.join(map(repr, bases))}. Say which:\n"
        f'    anatomy(model, at="{bases[0]}")'
    )


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Inside it, what has an attention that shows nothing (a flexible kernel, say) runs with one that does."""
    before = [(config, own) for config in configs_in(model) if (own := attention_of(config)) not in SEEN_BY]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


def configs_in(model: nn.Module) -> list[Any]:
    """Every config that a module of `model` has, once."""
    found = (vars(module).get("config") for module in model.modules())
    return list({id(config): config for config in found if config is not None}.values())


def config_around(names: Mapping[str, nn.Module], base: str) -> Any:
    """The config of the module `base`, or of the nearest one around that."""
    found = (getattr(names[name], "config", None) for name in names_around(base))
    return next((config for config in found if config is not None), None)


def names_around(base: str) -> Iterator[str]:
    """A name and those of the modules around it, from the inside out."""
    while base:
        yield base
        base = base.rpartition(".")[0]
    yield ""


def attention_of(config: Any) -> str:
    """The attention implementation that a config says; "eager" where it says nothing of it."""
    # Attention modules of transformers read this name at each call (5.0 … 5.24); there is no public one.
    return getattr(config, "_attn_implementation", None) or "eager"


def main_layouts(layouts: list[Layout], names: Mapping[str, nn.Module], at: str) -> list[Layout]:
    """Those that are meant: the largest stack; of an encoder and a decoder that reads it, both."""
    inside = [one for one in layouts if not at or f"{one.base}.".startswith(f"{at}.")]
    decoder = next((one for one in inside if any("cross_attn_out" in places.parts for places in one.layers)), None)
    encoders = [one for one in inside if decoder is not None and one.began < decoder.began]
    return [encoders[0], decoder] if decoder is not None and encoders else inside[:1]


def found_layouts(recorded: Recorded) -> list[Layout]:
    """The layout of each stack of layers that ran, the largest first."""
    found = stacks_in(recorded.record)
    if not found and as_one_row(recorded.record):
        found = stacks_in(recorded.record)
    stacks = sorted(found, key=lambda stack: -stack.n_parameters)
    return [_layout(recorded, stack) for stack in stacks]


def _layout(recorded: Recorded, stack: Stack) -> Layout:
    layers = _layers(recorded.record, stack)
    post_norm = bool(layers[-1].form) and layers[-1].form[-1].kind == "norm"
    ends = Ends(recorded.record, stack, recorded.output, recorded.run, post_norm)
    family = Family(post_norm=post_norm)
    sizes = _sizes_of(layers, stack.layers[0].reads.shape[-1])
    base = _base_with(stack.base, ends.roles.get("token_embedding"), recorded.record.names)
    now = attention_of(config_around(recorded.record.names, base))
    made = Layout(base, family, layers, sizes, ends.parts, ends.roles, ends.head, is_found=True, attention=now)
    made.began = stack.layers[0].call.begin
    return made


def _base_with(base: str, embedding: str | None, names: Mapping[str, nn.Module]) -> str:
    """The innermost module that has both the layers and the embedding in it, by any of its names."""
    if embedding is None:
        return base
    aliases = [name for name, module in names.items() if module is names[embedding]]
    arounds = [base, *(base[: at.start()] for at in reversed(list(re.finditer(r"\.", base))))]
    return next((one for one in arounds if any(name.startswith(f"{one}.") for name in aliases)), "")


def _layers(record: Record, stack: Stack) -> list[PartPlaces]:
    """The places of each layer; those of a layer in which the same was called as in one before are the same."""
    known: dict[Any, PartPlaces] = {}
    found: list[PartPlaces] = []
    for layer in stack.layers:
        name = layer.call.owner
        shape = _shape_in(record, layer)
        if shape is not None and shape in known:
            found.append(known[shape].renamed(escape(name)))
        else:
            found.append(layer_places(record, layer))
            if shape is not None:
                known[shape] = found[-1]
    return found


def _shape_in(record: Record, layer: Layer) -> Any:
    """What was called in a layer, by names in it; None of a layer in which modules are called that are elsewhere."""
    name = layer.call.owner
    inside = record.within(layer.call)
    if record.times[name] > 1 or any(not f"{call.owner}.".startswith(f"{name}.") for call in inside):
        return None
    return tuple(
        (call.owner[len(name) :], call.function, call.number, tuple(value.shape for value in call.outputs))
        for call in inside
    )


def _sizes_of(layers: list[PartPlaces], d_model: int) -> Sizes:
    """The sizes that the layers have; where none has heads, no heads."""
    seen = next((layer for layer in layers if layer.d_head is not None), None)
    if seen is None:
        return Sizes(0, 0, 0, d_model)
    heads = seen.heads.get("z", 0)
    return Sizes(heads, seen.heads.get("k", seen.heads.get("v", heads)), seen.d_head or 0, d_model)


def _first_line_of(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def no_run(names: Mapping[str, nn.Module], faults: list[str], inside: list[str]) -> str:
    """Why nothing is known of a model that does not run; `inside` are the models in it, of which one may run."""
    kind = type(names[""]).__name__
    tried = "\n".join(f"    {fault}" for fault in faults[:4]) or "    what it reads is not known"
    said = NO_RUN.format(kind=kind, tried=tried)
    return said if len(inside) < 2 else f"{said}\n{ONE_OF_THEM.format(first=inside[0])}"


NO_RUN = (
    "the parts of {kind} are found in a short forward, and it did not run on any input of ours:\n"
    "{tried}\n"
    "  Give it one, as the model is called with it:\n"
    '    anatomy(model, inputs={{"input_ids": ids}})'
)

ONE_OF_THEM = '  Or take one of the models in it:\n    anatomy(model, at="{first}")'
