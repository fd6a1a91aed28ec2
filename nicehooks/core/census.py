"""Every name of every module of a model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import nn

from nicehooks import torch_private, torch_private_tensors
from nicehooks.core.children import further_children
from nicehooks.core.walking import ENCODERS, WRAPPED, Walk, joined
from nicehooks.paths.names import escape
from nicehooks.paths.patterns import Pattern


class Census:
    """Every name of every module of a model.

    A transparent wrapper (`torch.compile`, `DistributedDataParallel`) is not a module of its own here: the module in it
    has its name. The name that the wrapper gives it is known too, after all others, but has to be spelled out.

    Attributes:
        root: the model, out of its wrappers.
        names: every module by each of its names.
        first: the first name of each module, by `id`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[str, nn.Module] = {}
        self.first: dict[int, str] = {}
        self._marked: dict[str, str] = {}
        for marked, module in sorted(_walk(model, [""], []), key=lambda pair: WRAPPED in pair[0]):
            name = marked.replace(WRAPPED, "")
            if name not in self.names:
                self.names[name] = module
                self._marked[name] = marked
            self.first.setdefault(id(module), name)
        self.root = self.names[""]

    def unwrapped(self) -> list[tuple[str, nn.Module]]:
        """The names without those that a wrapper gives, with their modules."""
        return [(name, module) for name, module in self.names.items() if WRAPPED not in self._marked[name]]

    @cached_property
    def _encoders(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.names.items() if isinstance(module, ENCODERS)}

    def encoders_around(self, name: str) -> list[nn.Module]:
        """The encoders and encoder layers that have the module called `name` somewhere in them."""
        return [encoder for outer, encoder in self._encoders.items() if _is_below(name, outer)]

    def other_names(self, name: str) -> list[str]:
        """The other names of the module called `name`."""
        module = self.names.get(name)
        return [other for other, same in self.names.items() if same is module and other != name]


def _walk(module: nn.Module, names: list[str], path: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Each name of each module below `module`; a module that contains itself is not entered again."""
    inner = torch_private.wrapped_child(module)
    if inner is not None:
        child: Any = module._modules[inner]
        yield from _walk(child, [*names, *(joined(name, WRAPPED + inner) for name in names)], path)
        return
    for name in names:
        yield name, module
    if torch_private.is_scripted(module):
        return
    for key, child in (*module._modules.items(), *further_children(module)):
        if child is not None and all(child is not parent for parent in path) and child is not module:
            yield from _walk(child, [joined(name, key) for name in names], [*path, module])


def _is_below(name: str, outer: str) -> bool:
    """Whether the module called `name` is somewhere in the one called `outer`."""
    return name.startswith(f"{outer}.") if outer else name != ""


def has_parameter(module: nn.Module, name: str) -> bool:
    """Whether `module` itself has a parameter, buffer or parametrized tensor called `name`."""
    return name in parameter_names(module)


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the parameters, buffers, parametrized and recomputed tensors that `module` itself has."""
    if torch_private.is_scripted(module):
        return []
    own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    parametrized = list(getattr(module, "parametrizations", {}))
    made = torch_private_tensors.made_by_pre_hooks(module)
    return [*own, *parametrized, *(name for name in made if name in vars(module))]


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module of `model` called `name`, if there is one."""
    found = Walk(model, Pattern.of(escape(name))).named(())
    return found[0].module if found else None
