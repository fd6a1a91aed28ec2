"""`ActivationCache`: the values that a context saw, by path, with what one does to them afterwards."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from nicehooks.caches import files, showing
from nicehooks.caches.arithmetic import Number, combine, concatenated
from nicehooks.caches.containment import parsed
from nicehooks.caches.messages import not_captured, nothing_in_common
from nicehooks.caches.pytrees import register_cache
from nicehooks.caches.selecting import keys_chosen
from nicehooks.caches.store import Store
from nicehooks.caches.watching import Calls, Watch
from nicehooks.errors import NotCaptured, SiteNotFound, TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS, refused


class ActivationCache(Store):
    """Values by path, in the order in which the model made them.

    >>> from torch import nn, ones
    >>> from nicehooks import capture
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with capture(model, "*") as acts:
    ...     _ = model(ones(5, 2))
    >>> acts
    ActivationCache: 2 sites, 120 bytes
      0  Tensor[5, 3] float32
      1  Tensor[5, 3] float32
    >>> acts["0[:, -1]"].shape, (acts - acts).stack("*").shape
    (torch.Size([5]), torch.Size([2, 5, 3]))

    It is a dict, and a pytree for optree and for `torch.utils._pytree`, so that it passes through `torch.func`
    transforms. Reading a value that the model has overwritten in place since it was captured raises `StaleActivation`,
    and so does reading one that was captured inside a transform which is over.
    """

    # parts

    def select(self, where: Any, *more: Any) -> ActivationCache:
        """The part of the cache at `where`: paths, lists of them, regular expressions or predicates over the keys.

        A path selects what it would select in a model: without a port the output, and nothing else.

        Raises:
            SiteNotFound: an item of `where` selects nothing.
        """
        self.settle()
        keys = list(dict.fromkeys(keys_chosen(self, [where, *more] if more else where, self._other_names)))
        chosen = self._like([(key, self[key]) for key in keys])
        for key in keys:
            whole, chain = self._find(key) or (key, ())
            if (chain or whole != key) and self._watch(whole) is not None:
                chosen._seen[key] = Watch.over(dict.__getitem__(chosen, key))
        return chosen

    def stack(self, where: Any = True, *more: Any) -> Tensor:
        """The values at `where` as one tensor with a new leading dimension, `[site, …]`.

        Raises:
            SiteNotFound: there is nothing to stack.
            TreeMismatch: the values are not tensors of one shape.
        """
        chosen = self.select(where, *more)
        if not chosen:
            raise SiteNotFound(f"there is nothing to stack: {'no site is selected' if self else 'the cache is empty'}.")
        values = list(chosen.values())
        shown = {key: showing.show_value(value) for key, value in chosen.items()}
        if len(set(shown.values())) != 1 or not all(isinstance(value, Tensor) for value in values):
            here = ", ".join(f"{key}: {text}" for key, text in shown.items())
            raise TreeMismatch(f"only tensors of one shape and dtype can be stacked, but here are {here}.")
        try:
            return torch.stack(values)
        except TORCH_ERRORS as error:
            raise refused(error, f"{', '.join(shown)} cannot be stacked") from None

    def calls(self, path: Any) -> list[Any]:
        """The values of all calls at `path`, in order, however they were captured (`keep="all"` or `#*`).

        Raises:
            NotCaptured: nothing that was captured has this value.
        """
        found = self._find(path)
        if found is not None:
            value = self._read(path, *found)
            return list(value) if type(value) is Calls else [value]
        wanted = ModulePath.parse(str(path))
        numbers = {own.call for key in self if (own := parsed(key)) is not None and isinstance(own.call, int)}
        each = [one for number in sorted(numbers) if (one := replace(wanted, call=number)) in self]
        if not each:
            raise NotCaptured(not_captured(self, path))
        return [self[one] for one in each]

    # every tensor

    def map(self, fn: Callable[[Tensor], Any]) -> ActivationCache:
        """A cache with `fn` applied to every tensor."""
        return self._like((key, trees.map_tensors(fn, value)) for key, value in self.items())

    def _each(self, what: str, fn: Callable[[Tensor], Any]) -> ActivationCache:
        """`map` with a function of this library's own: what torch refuses is said with the site and `what`."""
        return self._like((key, self._done(key, what, fn, value)) for key, value in self.items())

    def _done(self, key: str, what: str, fn: Callable[[Tensor], Any], value: Any) -> Any:
        try:
            return trees.map_tensors(fn, value)
        except TORCH_ERRORS as error:
            raise refused(error, f"{what} at {key!r}: it does not work for {showing.show_value(value)}") from None

    def detach(self) -> ActivationCache:
        """A cache of the same values outside of the autograd graph."""
        return self._each("detach()", Tensor.detach)

    def clone(self) -> ActivationCache:
        """A cache of copies."""
        return self._each("clone()", Tensor.clone)

    def to(self, *args: Any, **kwargs: Any) -> ActivationCache:
        """A cache with every tensor on another device or of another dtype, as `Tensor.to`."""
        return self._each("to(…)", lambda tensor: tensor.to(*args, **kwargs))

    def index(self, key: Any) -> ActivationCache:
        """A cache with every tensor indexed by `key`: `cache.index(0)` is the first example of the batch.

        A list of numbers, be they tensors of one number each, is a list of examples; for torch itself a list of tensors
        is a tuple, with an item for each dimension.

        Raises:
            TreeMismatch: a tensor has no such index.
        """
        numbers = type(key) is list and all([isinstance(one, Tensor) and one.ndim == 0 for one in key])
        at = torch.stack(key) if numbers and key else key
        return self._each(f"index({key!r})", lambda tensor: tensor[at])

    def abs(self) -> ActivationCache:
        """A cache of absolute values.

        Raises:
            TreeMismatch: a tensor has no absolute values, as one of truth values.
        """
        return self._each("abs()", torch.abs)

    def mean(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> ActivationCache:
        """A cache of means, over all dimensions or over `dim`.

        >>> from torch import arange
        >>> ActivationCache({"h.0": arange(6.0).reshape(2, 3)}).mean(0)["h.0"].tolist()
        [1.5, 2.5, 3.5]

        Raises:
            TreeMismatch: a tensor has no such dimension, or its numbers are whole.
        """
        return self._each(f"mean({'' if dim is None else dim})", lambda tensor: tensor.mean(dim, keepdim))

    # arithmetic

    @staticmethod
    def cat(caches: Iterable[Mapping[str, Any]], dim: int = 0) -> ActivationCache:
        """One cache of several of the same sites, their tensors end to end along `dim`: batches become one.

        >>> from torch import ones
        >>> ActivationCache.cat([{"h.0": ones(2, 3)}, {"h.0": ones(1, 3)}])["h.0"].shape
        torch.Size([3, 3])

        Raises:
            SiteNotFound: there is no cache, or a site is not in all of them.
            TreeMismatch: two values have different structures, or shapes that do not fit together.
        """
        every = [ActivationCache(cast(Any, cache)) for cache in caches]
        if not every:
            raise SiteNotFound("cat takes at least one cache: there is none.")
        for key in {key: None for cache in every for key in cache}:
            for at, cache in enumerate(every):
                if not dict.__contains__(cache, key):
                    raise NotCaptured(f"cat takes caches of the same sites; cache {at}: {not_captured(cache, key)}")
        return every[0]._like([(key, concatenated([one[key] for one in every], dim, key)) for key in every[0]])

    def _with(self, other: Any, op: Callable[[Any, Any], Any]) -> ActivationCache:
        if isinstance(other, Mapping):
            theirs = ActivationCache(cast(Any, other))
            common = [key for key in self if dict.__contains__(theirs, key)]
            if not common and (self or theirs):
                raise SiteNotFound(nothing_in_common(self, theirs))
            return self._like([(key, combine(op, self[key], theirs[key], key)) for key in common])
        if isinstance(other, Tensor | Number):
            return self._like([(key, self._with_one(key, value, other, op)) for key, value in self.items()])
        return NotImplemented

    def _with_one(self, key: str, value: Any, other: Any, op: Callable[[Any, Any], Any]) -> Any:
        return trees.map_tensors(lambda tensor: combine(op, tensor, other, key), value)

    def __add__(self, other: Any) -> ActivationCache:
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> ActivationCache:
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> ActivationCache:
        return self._with(other, operator.mul)

    def __truediv__(self, other: Any) -> ActivationCache:
        return self._with(other, operator.truediv)

    def __radd__(self, other: Any) -> ActivationCache:
        return self._with(other, lambda a, b: b + a)

    def __rsub__(self, other: Any) -> ActivationCache:
        return self._with(other, lambda a, b: b - a)

    def __rmul__(self, other: Any) -> ActivationCache:
        return self._with(other, lambda a, b: b * a)

    def __rtruediv__(self, other: Any) -> ActivationCache:
        return self._with(other, lambda a, b: b / a)

    def __neg__(self) -> ActivationCache:
        return self._each("-", torch.neg)

    # outside

    @property
    def nbytes(self) -> int:
        """The memory of all tensors, in bytes; a tensor that is there twice counts once."""
        self.settle()
        return showing.size_of(dict.values(self))

    def save(self, file: Any) -> None:
        """Writes the cache to `file` (safetensors). Named tuples and `ModelOutput`s come back as tuples and dicts.

        Raises:
            TreeMismatch: a value has something else in it than tensors, numbers, strings and containers.
            FileFault: `file` cannot be written.
            NiceHooksError: safetensors is not installed.
        """
        files.write(self, file)

    @staticmethod
    def load(file: Any) -> ActivationCache:
        """Reads what `save` has written, or the tensors of any other safetensors file.

        Raises:
            FileFault: `file` is damaged, or is no safetensors file; where there is none, a `FileNotFoundError` too.
            NiceHooksError: safetensors is not installed.
        """
        return ActivationCache(files.read(file))

    def __repr__(self) -> str:
        self.settle()
        return showing.as_text(self)

    def _repr_html_(self) -> str:
        self.settle()
        return showing.as_html(self)


register_cache(ActivationCache)
