"""`LensCache`: an `ActivationCache` that also knows its values by the short names of TransformerLens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import optree

from nicehooks import torch_private_tensors
from nicehooks.caches.cache import ActivationCache
from nicehooks.caches.pytrees import build_cache, flatten_cache
from nicehooks.compat.transformer_lens.canonical_names import get_act_name
from nicehooks.values.trees import Chain


class LensCache(ActivationCache):
    """An `ActivationCache` with short names: `cache["pattern", 5]`, `cache["resid_post", -1]`, `cache["embed"]`.

    >>> from torch import ones
    >>> cache = LensCache({"hook_embed": ones(1), "blocks.1.hook_resid_post": ones(2)}, layers=2)
    >>> cache["embed"].shape, cache["resid_post", 1].shape, cache["resid_post", -1].shape
    (torch.Size([1]), torch.Size([2]), torch.Size([2]))

    Args:
        values: by name.
        layers: how many layers the model has, from which negative ones are counted.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), layers: int = 0) -> None:
        super().__init__(values)
        self.layers = layers

    def _find(self, key: Any) -> tuple[str, Chain] | None:
        found = None if isinstance(key, tuple) else super()._find(key)
        if found is not None or not isinstance(key, str | tuple):
            return found
        name = self._full_name(key if isinstance(key, tuple) else (key,))
        return (name, ()) if name is not None and dict.__contains__(self, name) else None

    def _full_name(self, short: tuple[Any, ...]) -> str | None:
        """The full name for `(name, layer, part of the layer)`, of which only the first has to be there."""
        if not 1 <= len(short) <= 3 or not isinstance(short[0], str):
            return None
        name, *rest = short
        if rest and isinstance(rest[0], int) and rest[0] < 0:
            rest[0] += self.layers
        return get_act_name(name, *rest)

    def _like(self, values: Any) -> ActivationCache:
        new = LensCache(values, self.layers)
        new._other_names = self._other_names
        new._watch_as(self)
        return new

    def __reduce__(self) -> Any:
        return (LensCache, (list(self.items()), self.layers))


def _flatten(cache: LensCache) -> tuple[list[Any], Any]:
    values, context = flatten_cache(cache)
    return values, (context, cache.layers)


def _build(values: Iterable[Any], context: Any) -> Any:
    return build_cache(lambda items: LensCache(items, context[1]), values, context[0])


torch_private_tensors.register_torch_node(LensCache, _flatten, _build)


def _build_for_optree(context: Any, values: Iterable[Any]) -> LensCache:
    return LensCache(zip(context[0], values, strict=True), context[1])


optree.register_pytree_node(
    LensCache,
    lambda cache: (tuple(cache.values()), (tuple(cache), cache.layers), tuple(cache)),  # type: ignore[arg-type]
    _build_for_optree,
    namespace=torch_private_tensors.EVERY_NAMESPACE,
)
