"""The stacks of layers in a recorded forward: modules with numbered names that map a stream to one of its shape."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.recording import NotedCall, Record


@dataclass(eq=False)
class Layer:
    """One call of a block.

    Attributes:
        call: the call itself; of a shared block, one of several.
        reads: the stream that comes in.
        gives: the stream that goes out.
    """

    call: NotedCall
    reads: Value
    gives: Value


@dataclass(eq=False)
class Stack:
    """Layers that follow each other.

    Attributes:
        base: the name of the module around them.
        layers: the layers, in the order in which they ran.
    """

    base: str
    layers: list[Layer]

    @property
    def n_parameters(self) -> int:
        modules = {id(layer.call.module): layer.call.module for layer in self.layers}
        parameters = {id(one): one.numel() for module in modules.values() if module for one in module.parameters()}
        return sum(parameters.values())


def stacks_in(record: Record) -> list[Stack]:
    """Every stack that is in no layer of another one, in the order of their first layers."""
    groups: dict[str, list[Layer]] = {}
    called: dict[str, int] = {}
    for call in record.of_modules():
        numbered = numbered_as(call.owner)
        if "#" not in numbered:
            continue
        called[numbered] = called.get(numbered, 0) + any(len(value.shape) > 2 for value in call.outputs)
        layer = _as_layer(call, groups.get(numbered, []))
        if layer is not None:
            groups.setdefault(numbered, []).append(layer)
    even = {name: layers for name, layers in groups.items() if len(layers) == called[name]}
    stacks = [Stack(_base(layers), layers) for layers in even.values()]
    return [stack for stack in stacks if not _is_inside(stack, stacks) and _has_parts(record, stack)]


def numbered_as(name: str) -> str:
    """The name of a module with `#` for each number in it: what the layers of a stack have in common."""
    return re.sub(r"(?<![A-Za-z0-9])\d+|\d+(?![A-Za-z0-9])", "#", name)


def _as_layer(call: NotedCall, before: list[Layer]) -> Layer | None:
    """The call as a layer: it gives a stream, `[batch, pos, d_model]`, of the shape of one that it reads."""
    for given in call.outputs:
        if len(given.shape) < 3 or not given.tensor.is_floating_point():
            continue
        read = [value for value in call.inputs if value.shape == given.shape and value.tensor.is_floating_point()]
        if len(read) > 1 and before:
            last = before[-1].gives.key
            read = [value for value in read if value.key == last] or read
        if read:
            return Layer(call, read[0], given)
    return None


def _base(layers: list[Layer]) -> str:
    """The name of the module around a stack: what the names of the layers have in common, less the list."""
    names = list(dict.fromkeys(layer.call.owner for layer in layers))
    common = names[0].split(".")
    if len(names) == 1:
        numbers = [at for at, word in enumerate(common) if re.fullmatch(r"\D*\d+", word)]
        common = common[: numbers[0]] if numbers else common
    for name in names[1:]:
        words = name.split(".")
        common = [word for at, word in enumerate(common) if words[: at + 1] == common[: at + 1]]
    return ".".join(common[:-1])


def _is_inside(stack: Stack, stacks: list[Stack]) -> bool:
    first = stack.layers[0].call
    return any(first.is_in(layer.call) for other in stacks if other is not stack for layer in other.layers)


def _has_parts(record: Record, stack: Stack) -> bool:
    """Whether the layers are more than one norm or projection each."""
    call = stack.layers[0].call
    return sum(not inner.function for inner in record.within(call)) > 1
