"""The vision tower of a model: the module in it that reads pictures and no tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nicehooks.anatomies.short_inputs import forward_parameters
from nicehooks.core.calling import has_forward
from nicehooks.errors import UnsupportedModule

PICTURES = ("pixel_values", "grid_thw")
"""What a forward that reads pictures has among its parameters: the pictures, or the grid that their patches are of."""


def reads_pictures(module: nn.Module) -> bool:
    """Whether it is a model that is given pictures and no tokens."""
    if not hasattr(module, "config") or not has_forward(module):
        return False
    names = forward_parameters(module)
    return "input_ids" not in names and any(name in names for name in PICTURES)


def vision_tower(names: Mapping[str, nn.Module]) -> str:
    """The name of the one module in a model that reads pictures, the outermost.

    Raises:
        UnsupportedModule: there is none, or there are several; the message names them.
    """
    kind = type(names[""]).__name__
    found = [name for name, module in names.items() if reads_pictures(module)]
    outer = [name for name in found if not any(name != one and _is_in(name, one) for one in found)]
    if not outer:
        raise UnsupportedModule(NO_TOWER.format(kind=kind, pictures=PICTURES[0]))
    first = outer[0]
    if len({id(names[name]) for name in outer}) > 1:
        shown = ", ".join(map(repr, outer))
        raise UnsupportedModule(SEVERAL_TOWERS.format(kind=kind, count=len(outer), towers=shown, first=first))
    return first


def _is_in(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


NO_TOWER = "{kind} has no vision tower: no module in it reads pictures ({pictures}) and no tokens."

SEVERAL_TOWERS = '{kind} has {count} towers that read pictures: {towers}. Say which:\n    anatomy(model, at="{first}")'
