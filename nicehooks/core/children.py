"""The children of a module, those that are in no table of its own too; and the module in a transparent wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from nicehooks import torch_private

Children = Iterable[tuple[str, nn.Module]]

_further: list[tuple[Callable[[nn.Module], Children], Callable[[], bool]]] = []


def add_further(children: Callable[[nn.Module], Children], are_there: Callable[[], bool]) -> None:
    """Lets every selection find more children than a module has itself.

    Args:
        children: of a module, by name.
        are_there: whether any module has some now: then no selection is remembered.
    """
    _further.append((children, are_there))


def has_further() -> bool:
    """Whether any module may have children that are in no table of its own."""
    return any([are_there() for _, are_there in _further])


def further_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of `module` that are in no table of its own."""
    for children, are_there in _further:
        if are_there():
            yield from children(module)


def unwrap(model: nn.Module) -> nn.Module:
    """`model` out of the transparent wrappers around it (`torch.compile`, `DistributedDataParallel`)."""
    while (inner := torch_private.wrapped_child(model)) is not None:
        model = model._modules[inner]  # type: ignore[assignment]
    return model
