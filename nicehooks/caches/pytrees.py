"""A cache as a pytree, for optree and for torch: how it passes through the transforms of `torch.func`.

NOTE [What transforms take]
They want tensors alone as what a function returns, and know few containers. So a cache that is on its way out of one
hands over its tensors, whatever they are nested in, and the rest stays behind with its keys: it is the same for every
example. `vmap` with a `chunk_size` takes the caches of all chunks apart once more when it is over, so a cache that has
come out of a transform stays one whose leaves are tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nicehooks import torch_private
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
        if not isinstance(context, _Rest):
            return kind(zip(context, values, strict=True))
        leaves = list(values)
        cache = kind(zip(context.keys, _filled(context.values, iter(leaves)), strict=True))
        cache._left_transform = all([isinstance(leaf, Tensor) for leaf in leaves])  # pyright: ignore[reportPrivateUsage]
        return cache

    torch_private.register_torch_node(kind, _flatten, build)
    optree.register_pytree_node(
        kind, _flatten_for_optree, lambda keys, values: build(values, keys), namespace=torch_private.EVERY_NAMESPACE
    )


def _flatten(cache: Store) -> tuple[list[Any], Any]:
    values = cache.values()
    if torch.compiler.is_compiling() or not _leaves_transform(cache):
        return values, list(cache)
    tensors: list[Tensor] = []
    rest = trees.map_tensors(lambda tensor: (tensors.append(tensor), Tensor)[1], values)
    if all(value is Tensor for value in rest) or not (tensors or _was_captured(cache)):
        return values, list(cache)
    return tensors, _Rest(list(cache), rest)


def _leaves_transform(cache: Store) -> bool:
    return torch_private.innermost_transform() is not None or cache._left_transform  # pyright: ignore[reportPrivateUsage]


def _was_captured(cache: Store) -> bool:
    """A cache without tensors that was not captured is how `vmap` keeps a number for each output."""
    return bool(cache._seen) or cache._left_transform  # pyright: ignore[reportPrivateUsage]


def _filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if tree is Tensor:
        return next(tensors)
    return trees.map_children(lambda child: _filled(child, tensors), tree)


def _flatten_for_optree(cache: Any) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
    return tuple(cache.values()), tuple(cache), tuple(cache)
