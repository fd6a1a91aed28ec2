"""What real models are compared with: values and changes by PyTorch's own forward hooks, and bit for bit equality."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


def one_thread() -> Iterator[None]:
    """For a fixture: on shared cores, several threads wait for each other ten times longer than one thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what to compare with, by hand ------------------------------------------------------------------------------------


def outputs_by_hooks(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, list[Any]]]:
    """What `run` returns, and what each module returned in it, call by call, in the order in which modules finished."""
    seen: dict[str, list[Any]] = {}

    def hook(module: nn.Module, args: Any, output: Any, name: str) -> None:
        seen.setdefault(name, []).append(output)

    handles = [m.register_forward_hook(functools.partial(hook, name=name)) for name, m in model.named_modules()]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


def arguments_by_hooks(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[inspect.BoundArguments]]:
    """What each module was called with while `run` ran, call by call."""
    seen: dict[str, list[inspect.BoundArguments]] = {}

    def hook(module: Any, args: Any, kwargs: Any, name: str, signature: inspect.Signature) -> None:
        seen.setdefault(name, []).append(signature.bind(*args, **kwargs))

    handles = [
        m.register_forward_pre_hook(
            functools.partial(hook, name=name, signature=inspect.signature(m.forward)), with_kwargs=True
        )
        for name, m in model.named_modules()
        if type(m).forward is not nn.Module.forward
    ]
    try:
        run()
        return seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed_by_hook(model: nn.Module, name: str, fn: Callable[[Any], Any], where: str = "output") -> Generator[None]:
    """While it is entered, `fn` changes what the module `name` returns, or (`where="input"`) its first argument."""
    module = model.get_submodule(name)
    if where == "output":
        handle = module.register_forward_hook(lambda module, args, output: fn(output))
    else:
        handle = module.register_forward_pre_hook(lambda module, args: (fn(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def unchanged(value: Any) -> Any:
    return value


def put(value: Tensor, index: Any, new: Any) -> Tensor:
    """A copy of `value` with `new` at `index`."""
    changed = value.clone()
    changed[index] = new
    return changed


def on_residual(path: str, fn: Callable[[Tensor], Tensor]) -> tuple[str, Callable[[Any], Any]]:
    """The module of `path`, which is a block or a block's `[0]`, and a hook that changes the tensor there."""
    name, bracket, _ = path.partition("[0]")
    return name, (lambda value: (fn(value[0]), *value[1:])) if bracket else fn


# --- comparing --------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two values are of one type and structure all the way down, and their tensors bit for bit equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Cache):
        return same(_tensors_of(a), _tensors_of(b))
    return bool(a == b)


def _tensors_of(cache: Any) -> list[Any]:
    """The keys and values of each layer of a key and value cache."""
    if hasattr(cache, "cross_attention_cache"):
        return [_tensors_of(cache.self_attention_cache), _tensors_of(cache.cross_attention_cache)]
    return [[layer.keys, layer.values] for layer in cache.layers]


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a context must leave as it was, by identity: what is in each module, and in its tables."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        entries = vars(module)
        found.append((name, id(module), type(module), [(key, id(value)) for key, value in entries.items()]))
        for key, table in entries.items():
            if isinstance(table, dict):
                found.append((name, key, type(table), [(entry, id(value)) for entry, value in table.items()]))
    versions = [(name, id(value), value._version) for name, value in model.state_dict(keep_vars=True).items()]
    return [*found, versions]
