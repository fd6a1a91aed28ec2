"""What a model's forwards leave behind in its modules, put back: states and caches that it keeps from call to call.

NOTE [What is put back]
A module may keep what it has computed: a state, a table that has grown, a flag beside hooks that it has registered.
Around the forwards of ours the attributes, buffers and hooks of each module are remembered as they are bound. Of small
tensors among them there is a copy; a large one that is written into is copied just before that, which takes a look at
every function that runs. A model that has made itself anew (its lazy modules, or other modules in the place of its own)
stays as it has become: the parts are those that it has now. So does a module to which an object has been bound that is
no plain value: nothing tells what else belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
HOOKS = tuple(name for name in sorted(OF_EVERY_MODULE) if "forward" in name and "hooks" in name)
PLAIN_VALUES = (
    Tensor,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    list,
    dict,
    set,
    frozenset,
    torch.dtype,
    torch.device,
)
UNBOUND = object()

COPIED_AT_ONCE = 1 << 18
"""How many numbers a tensor may have of which a copy is made whatever happens to it."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside it `model` may run; on leaving its modules hold what they held before; see NOTE [What is put back]."""
    kept = [_Kept(module) for module in model.modules()]
    before = _modules_as_they_are(model)
    tensors = {id(one): one for module in kept for one in module.tensors()}.values()
    small = [(one, one.detach().clone()) for one in tensors if one.numel() <= COPIED_AT_ONCE]
    writes = _Writes(one for one in tensors if one.numel() > COPIED_AT_ONCE)
    try:
        with writes if writes.sharing else nullcontext():
            yield
    finally:
        if before == _modules_as_they_are(model):
            writes.undo()
            _write_back([(tensor, old) for tensor, old in small if not torch.equal(tensor, old)])
            for module in kept:
                module.put_back()


def _modules_as_they_are(model: nn.Module) -> list[Any]:
    return [(id(module), type(module), tuple(module._parameters)) for module in model.modules()]


class _Kept:
    """What one module holds: its attributes, buffers and hooks, as they are bound."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = _own_attributes(module)
        self.buffers = dict(module._buffers)
        self.hooks = {name: dict(vars(module)[name]) for name in HOOKS if name in vars(module)}

    def tensors(self) -> Iterator[Tensor]:
        held = [one for one in (*self.own.values(), *self.buffers.values()) if type(one) is Tensor]
        return (one for one in held if one.layout is torch.strided and not one.is_meta)

    def put_back(self) -> None:
        own = _own_attributes(self.module)
        names = [name for name in {**self.own, **own} if own.get(name, UNBOUND) is not self.own.get(name, UNBOUND)]
        if not all(_is_plain_value(own.get(name)) for name in names):
            return
        _set_items(vars(self.module), self.own, names)
        _set_items(self.module._buffers, self.buffers)
        for name, hooks in self.hooks.items():
            _set_items(vars(self.module)[name], hooks)


class _Writes(TorchFunctionMode):
    """Copies a tensor of a module before a function first writes into it, or into a view of it."""

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        super().__init__()
        self.sharing: dict[int, list[Tensor]] = {}
        for one in tensors:
            place = _storage_of(one)
            if place is not None:
                self.sharing.setdefault(place, []).append(one)
        self.copies: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_writing(getattr(func, "__name__", ""), kwargs):
            for one in (*args, *kwargs.values()):
                self._copy(one)
        return func(*args, **kwargs)

    def _copy(self, value: Any) -> None:
        place = _storage_of(value) if type(value) is Tensor else None
        if place in self.sharing and place not in self.copies:
            self.copies[place] = [(one, one.detach().clone()) for one in self.sharing[place]]

    def undo(self) -> None:
        for pairs in self.copies.values():
            _write_back(pairs)


def _write_back(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, before in pairs:
            tensor.copy_(before)


def _storage_of(tensor: Tensor) -> int | None:
    """Where the numbers of a tensor are: what its views share. None where it has none, or does not say (in `vmap`)."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _is_writing(name: str, kwargs: Mapping[str, Any]) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_") or name in ("batch_norm", "instance_norm") or kwargs.get("out") is not None


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: one for name, one in vars(module).items() if name not in OF_EVERY_MODULE}


def _is_plain_value(value: Any) -> bool:
    return value is None or isinstance(value, PLAIN_VALUES)


def _set_items(table: Any, items: Mapping[Any, Any], names: Iterable[Any] | None = None) -> None:
    """Makes `table` have what `items` has, under `names` or under all of them."""
    for name in [*{**table, **items}] if names is None else names:
        if name not in items:
            table.pop(name, None)
        elif table.get(name, UNBOUND) is not items[name]:
            table[name] = items[name]
