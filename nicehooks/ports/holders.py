"""Which modules of a model hold a tensor, under which names, and which modules are around them."""

from __future__ import annotations

from torch import nn

from nicehooks.core.calling import has_forward
from nicehooks.ports.tables import own_entries

Holding = tuple[nn.Module, str]
"""A module, and the name of a parameter or buffer in it."""


def as_ids(places: list[Holding]) -> set[tuple[int, str]]:
    """The same, to compare them with others: a module need not be hashable."""
    return {(id(module), name) for module, name in places}


class Holders:
    """Who holds what in the model `root`, as it is when this is made."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.parents: dict[int, list[nn.Module]] = {}
        self.places: dict[int, list[Holding]] = {}
        for module in root.modules():
            self._note(module)

    def _note(self, module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None:
                self.parents.setdefault(id(child), []).append(module)
        for name, tensor in own_entries(module).items():
            if tensor is not None:
                self.places.setdefault(id(tensor), []).append((module, name))

    def of(self, owner: nn.Module, name: str) -> list[Holding]:
        """Every place of the very tensor that `owner` holds as `name`, that one first; none if it holds none."""
        tensor = own_entries(owner).get(name)
        if tensor is None:
            return []
        places = self.places.get(id(tensor), [])
        return [(owner, name), *[place for place in places if not (place[0] is owner and place[1] == name)]]

    def around(self, places: list[Holding]) -> list[nn.Module]:
        """The root, and what is around the modules in `places`, and these, as far as they can be called."""
        found = {id(self.root): self.root}
        left = [module for module, _ in places]
        while left:
            module = left.pop()
            if module is not self.root and id(module) not in found:
                found[id(module)] = module
                left += self.parents.get(id(module), [])
        return [module for module in found.values() if has_forward(module)]
