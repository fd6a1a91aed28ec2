"""A cache as a pytree, for optree and for torch: how it passes through the transforms of `torch.func`.

NOTE [What transforms take]
They want tensors alone as what a function returns, and know few containers. So a cache that is on its way out of one
hands over its tensors, whatever they are nested in, and the rest stays behind: it is the same for every example. What
is built around other leaves remembers that rest, because it is taken apart once more, and not always inside of the
transform: `vmap` builds a cache of one number for each tensor, and with `chunk_size` it joins the caches of all chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nicehooks import torch_private, torch_private_tensors
from nicehooks.caches.store import Store
from nicehooks.values import trees


@dataclass(frozen=True)
class _Rest:
    """What is left of a cache without its tensors: its keys, and its values with `Tensor` in the place of each."""

    keys: list[str]
    values: list[Any]


def register_cache(kind: type[Store]) -> None:
    """Makes the class of caches a pytree, for everybody."""

    def build(values: Iterable[Any], context: Any) -> Store:
        return build_cache(kind, values, context)

    torch_private_tensors.register_torch_node(kind, flatten_cache, build)
    optree.register_pytree_node(
        kind,
        _flatten_for_optree,
        lambda keys, values: build(values, keys),
        namespace=torch_private_tensors.EVERY_NAMESPACE,
    )


def build_cache(kind: Callable[[Any], Store], values: Iterable[Any], context: Any) -> Store:
    """What `flatten_cache` has taken apart, put together by `kind`."""
    if not isinstance(context, _Rest):
        return kind(zip(context, values, strict=True))
    cache = kind(zip(context.keys, _filled(context.values, iter(values)), strict=True))
    cache._rest = context  # pyright: ignore[reportPrivateUsage]
    return cache


def flatten_cache(cache: Store) -> tuple[list[Any], Any]:
    """The children of a cache for `torch.utils._pytree`, and what is left of it without them."""
    values, rest = cache.values(), cache._rest  # pyright: ignore[reportPrivateUsage]
    if torch.compiler.is_compiling():
        return values, list(cache)
    if rest is not None:
        return list(_picked(rest.values, values)), rest
    if torch_private.innermost_transform() is None or torch_private_tensors.holds_tensors_alone(values):
        return values, list(cache)
    tensors: list[Tensor] = []
    templates = trees.map_tensors(lambda tensor: (tensors.append(tensor), Tensor)[1], values)
    if not tensors and not _was_captured(cache):
        return values, list(cache)
    return tensors, _Rest(list(cache), templates)


def _was_captured(cache: Store) -> bool:
    """A cache without tensors that was not captured may be how `vmap` keeps a number for each output."""
    return bool(cache._seen)  # pyright: ignore[reportPrivateUsage]


def _picked(template: Any, value: Any) -> Iterator[Any]:
    """What stands in `value` where `template` has `Tensor`."""
    if template is Tensor:
        yield value
        return
    outer = trees.open_node(template)
    node = None if outer is None else trees.open_node(value)
    for child, own in zip(outer.children, node.children, strict=True) if outer and node else ():
        yield from _picked(child, own)


def _filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if tree is Tensor:
        return next(tensors)
    return trees.map_children(lambda child: _filled(child, tensors), tree)


def _flatten_for_optree(cache: Any) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
    return tuple(cache.values()), tuple(cache), tuple(cache)
