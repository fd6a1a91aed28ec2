"""`ActivationCache`: the values that a context saw, by path, with what one does to them afterwards.

NOTE [What a cache keeps alive]
A value that left the cache is free, so what was captured is watched through weak references. The shortest way into a
cache (`_WholeOutput`) cannot afford to make one (60 ns), and stores `(tensor, version)` in `_seen` beside the value; it
becomes a `Watch` when the value is read first. For the same reason neither `__setitem__` nor `__delitem__` is
overridden: either would make a store slow (60 ns more). So a value that nobody has read yet may outlive its place after
`del cache[key]`, until anything is read, and after `cache[key] = …`, until `key` is.
"""

from __future__ import annotations

import html
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import optree
import torch
from torch import Tensor

from nicehooks import torch_private
from nicehooks.caches import files
from nicehooks.caches.arithmetic import Number, combine
from nicehooks.caches.choices import keys_chosen, not_captured, sites_in, text_of
from nicehooks.caches.containment import parsed, wholes_of
from nicehooks.caches.watching import Calls, Link, Watch, calls_of, describe
from nicehooks.errors import NotCaptured, SiteNotFound, StaleActivation, TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees
from nicehooks.values.trees import Chain


class ActivationCache(dict[str, Any]):
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

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(values)
        self._pass_starts: dict[str, int] = {}
        self._firsts: dict[str, bool] = {}
        self._seen: dict[str, Any] = {}  # see NOTE [What a cache keeps alive]
        self._other_names: Callable[[str], list[str]] = _no_other_names
        if isinstance(values, ActivationCache):
            self._watch_as(values)

    # reading

    def __getitem__(self, path: Any) -> Any:
        """The value at `path`, which may be more specific than what was captured.

        Raises:
            NotCaptured: (a `KeyError`) nothing that was captured has this value.
            StaleActivation: the value was overwritten in place after it was captured, or it belongs to a transform
            that is over.
        """
        found = self._find(path)
        if found is None:
            raise NotCaptured(not_captured(self, path))
        return self._read(path, *found)

    def get(self, key: Any, default: Any = None) -> Any:
        found = self._find(key)
        return default if found is None else self._read(key, *found)

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def _find(self, key: Any) -> tuple[str, Chain] | None:
        """The key of the value that has the value at `key` in it, and the way from there."""
        text = text_of(key)
        if text is None:
            return None
        if dict.__contains__(self, text):
            return text, ()
        for whole, rest in wholes_of(text):
            if dict.__contains__(self, whole):
                return whole, rest
        return None if torch.compiler.is_dynamo_compiling() else self._under_other_name(ModulePath.parse(text))

    def _under_other_name(self, path: ModulePath) -> tuple[str, Chain] | None:
        for other in self._other_names(path.plain_name):
            for whole, rest in wholes_of(str(path.on(other))):
                if dict.__contains__(self, whole):
                    return whole, rest
        return None

    def _read(self, path: Any, whole: str, chain: Chain) -> Any:
        value = self._fresh(whole)
        if not chain:
            return value
        try:
            return Calls(trees.get(item, chain) for item in value) if type(value) is Calls else trees.get(value, chain)
        except TreeMismatch as error:
            raise TreeMismatch(f"{str(path)!r} in this cache: {error}.") from None

    def _fresh(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        if isinstance(value, Link):
            value = calls_of(value)
            dict.__setitem__(self, key, value)
        if self._seen and not torch.compiler.is_compiling():
            if len(self._seen) > len(self):
                self._forget()
            watch = self._watch(key)
            if watch is not None and watch.lives and watch.outlived(value):
                raise StaleActivation(OUTLIVED.format(key=key))
            if watch is not None and watch.notices(value):
                raise StaleActivation(STALE.format(key=key))
        return value

    def _watch(self, key: str) -> Watch | None:
        """The watch over the value at `key`, if it was captured; see NOTE [What a cache keeps alive]."""
        seen = self._seen.get(key)
        if type(seen) is tuple:
            seen = self._seen[key] = Watch.before(*seen)
        return seen

    def _forget(self) -> None:
        """Lets go of what has left the cache; see NOTE [What a cache keeps alive]."""
        for key in [key for key in self._seen if not dict.__contains__(self, key)]:
            del self._seen[key]

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(cache) and {**cache} read through __getitem__ too

    def values(self) -> Any:
        return [self._fresh(key) for key in self]

    def items(self) -> Any:
        return [(key, self._fresh(key)) for key in self]

    def copy(self) -> ActivationCache:
        return self._like(self.items())

    def __copy__(self) -> ActivationCache:
        return self.copy()

    def __reduce__(self) -> Any:
        return (ActivationCache, (list(self.items()),))

    # writing

    def pop(self, key: Any, *default: Any) -> Any:
        text = text_of(key)
        if text is None or not dict.__contains__(self, text):
            if default:
                return default[0]
            raise NotCaptured(not_captured(self, key))
        value = self._fresh(text)
        del self[text]
        self._seen.pop(text, None)
        return value

    def popitem(self) -> tuple[str, Any]:
        for key in reversed(self):
            return key, self.pop(key)
        return super().popitem()  # says that there is nothing

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[str(key)] = default
        return self[key]

    def update(self, values: Any = (), /, **more: Any) -> None:
        new = dict(values, **more)
        for key in new:
            self._seen.pop(key, None)
        super().update(new)
        if isinstance(values, ActivationCache):
            self._watch_as(values)

    def __ior__(self, other: Any) -> ActivationCache:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.update(other)
        return self

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, dict):
            return NotImplemented
        merged = self.copy()
        merged.update(other)
        return merged

    def clear(self) -> None:
        super().clear()
        self._seen.clear()

    def insert_call(self, key: str, value: Any, new_pass: bool) -> None:
        """Stores the gradient of one call: each backward pass brings those of the last calls first."""
        calls = dict.get(self, key, Calls())
        start = len(calls) if new_pass else self._pass_starts.get(key, 0)
        self._pass_starts[key] = start
        calls = Calls([*calls[:start], value, *calls[start:]])
        self[key] = calls
        self._seen[key] = Watch.over(calls)

    def record(self, key: str, value: Any, keep: str = "last") -> None:
        """Stores a captured value, with its version, to notice when it is overwritten later."""
        if keep == "first":
            if self._has_first(key):
                return
            self._firsts[key] = True
        if torch.compiler.is_compiling():  # a compiled graph has no versions, and no in-place writes to what it returns
            dict.__setitem__(self, key, Link(dict.get(self, key), value) if keep == "all" else value)
            return
        watch = Watch.over(value)
        if keep == "all":
            before = dict.get(self, key)
            before = calls_of(before) if isinstance(before, Link) else before
            if type(before) is Calls:
                watch = (self._watch(key) or Watch()).joined(watch)
            value = Calls([*before, value]) if type(before) is Calls else Calls([value])
        self[key] = value
        self._seen[key] = watch

    def _has_first(self, key: str) -> bool:
        """Whether there is a value already; traced code looks at no values of other graphs (their `.grad` warns)."""
        return key in self._firsts if torch.compiler.is_compiling() else dict.__contains__(self, key)

    def settle(self) -> None:
        """Makes lists of the calls that compiled code has collected."""
        if Link not in set(map(type, dict.values(self))):
            return
        for key, value in list(dict.items(self)):
            if isinstance(value, Link):
                dict.__setitem__(self, key, calls_of(value))

    def _watch_as(self, other: ActivationCache) -> None:
        """Watches over the values that are those of `other`; the watch over another value notices nothing."""
        for key in other:
            watch = other._watch(key)
            if watch is not None and dict.__contains__(self, key):
                self._seen[key] = watch

    def _like(self, values: Any) -> ActivationCache:
        """A cache of `values` that knows what this one knows."""
        new = ActivationCache(values)
        new._other_names = self._other_names
        new._watch_as(self)
        return new

    # parts

    def select(self, where: Any) -> ActivationCache:
        """The part of the cache at `where`: paths, lists of them, regular expressions or predicates over the keys.

        A path selects what it would select in a model; the path of a module alone selects whatever was captured of it.

        Raises:
            SiteNotFound: an item of `where` selects nothing.
        """
        self.settle()
        keys = list(dict.fromkeys(keys_chosen(self, where)))
        chosen = self._like([(key, self[key]) for key in keys])
        for key in keys:
            whole, chain = self._find(key) or (key, ())
            if chain and self._watch(whole) is not None:
                chosen._seen[key] = Watch.over(dict.__getitem__(chosen, key))
        return chosen

    def stack(self, where: Any = True) -> Tensor:
        """The values at `where` as one tensor with a new leading dimension, `[site, …]`.

        Raises:
            SiteNotFound: there is nothing to stack.
            TreeMismatch: the values are not tensors of one shape.
        """
        chosen = self.select(where)
        if not chosen:
            raise SiteNotFound(f"there is nothing to stack: {'no site is selected' if self else 'the cache is empty'}.")
        kinds = {describe(value) for value in chosen.values()}
        if len(kinds) != 1 or not all(isinstance(value, Tensor) for value in chosen.values()):
            shown = ", ".join(f"{key}: {describe(value)}" for key, value in chosen.items())
            raise TreeMismatch(f"only tensors of one shape and dtype can be stacked, but here are {shown}.")
        return torch.stack(list(chosen.values()))

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

    def detach(self) -> ActivationCache:
        """A cache of the same values outside of the autograd graph."""
        return self.map(Tensor.detach)

    def clone(self) -> ActivationCache:
        """A cache of copies."""
        return self.map(Tensor.clone)

    def to(self, *args: Any, **kwargs: Any) -> ActivationCache:
        """A cache with every tensor on another device or of another dtype, as `Tensor.to`."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def index(self, key: Any) -> ActivationCache:
        """A cache with every tensor indexed by `key`: `cache.index(0)` is the first example of the batch."""
        return self.map(lambda tensor: tensor[key])

    # arithmetic

    def _with(self, other: Any, op: Callable[[Any, Any], Any]) -> ActivationCache:
        if isinstance(other, Mapping):
            theirs = ActivationCache(cast(Any, other))
            common = [key for key in self if dict.__contains__(theirs, key)]
            return self._like([(key, combine(op, self[key], theirs[key], key)) for key in common])
        if isinstance(other, Tensor | Number):
            return self.map(lambda tensor: op(tensor, other))
        return NotImplemented

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
        return self.map(operator.neg)

    # outside

    @property
    def nbytes(self) -> int:
        """The memory of all tensors, in bytes; a tensor that is there twice counts once."""
        self.settle()
        leaves = [leaf for value in dict.values(self) for leaf in trees.leaves(value)]
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def save(self, file: Any) -> None:
        """Writes the cache to `file` (safetensors). Named tuples and `ModelOutput`s come back as tuples and dicts.

        Raises:
            TreeMismatch: a value has something else in it than tensors, numbers, strings and containers.
            NiceHooksError: safetensors is not installed.
        """
        files.write(self, file)

    @staticmethod
    def load(file: Any) -> ActivationCache:
        """Reads what `save` has written."""
        return ActivationCache(files.read(file))

    def _title(self) -> str:
        return f"ActivationCache: {sites_in(self)}, {show_bytes(self.nbytes)}"

    def _rows(self) -> list[tuple[str, str]]:
        self.settle()
        return [(str(key), describe(value)) for key, value in dict.items(self)]

    def __repr__(self) -> str:
        rows = self._rows()
        width = max((len(key) for key, _ in rows), default=0)
        return "\n".join([self._title(), *(f"  {key:<{width}}  {text}" for key, text in rows)])

    def _repr_html_(self) -> str:
        cells = [(html.escape(key), html.escape(text)) for key, text in self._rows()]
        rows = "".join(f"<tr><td><code>{key}</code></td><td>{text}</td></tr>" for key, text in cells)
        return f"<table><caption>{self._title()}</caption><tr><th>site</th><th>value</th></tr>{rows}</table>"


def show_bytes(count: int) -> str:
    """A number of bytes for people."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _no_other_names(name: str) -> list[str]:
    return []


# --- messages ---------------------------------------------------------------------------------------------------------

STALE = (
    "{key!r} was overwritten in place after it was captured (an in-place layer such as ReLU(inplace=True), or x += y), "
    "so this value is no longer what the site produced.\n"
    '    capture(model, "{key}", clone=True)  # keeps a copy of its own\n'
    "  run_with_cache, get_caching_hooks and add_caching_hooks take clone=True, too. For run(…), capture around it."
)

OUTLIVED = (
    "{key!r} was captured inside a torch.func transform (vmap, grad, …) that is over, and its value was good in there "
    "only.\n"
    '    output, acts = captured(model, "{key}")(x)  # inside the transform: return acts from the function\n'
    '    with capture(model, "{key}") as acts: ...   # around the transform: acts gets the full batch'
)

# --- pytrees ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rest:
    """What is left of a cache without its tensors: its keys, and its values with `Tensor` in the place of each."""

    keys: list[str]
    values: list[Any]


def _flatten_cache(cache: ActivationCache) -> tuple[list[Any], Any]:
    values = cache.values()
    if torch.compiler.is_compiling() or torch_private.innermost_transform() is None:
        return values, list(cache)
    return _flatten_for_transform(values, list(cache), captured=bool(cache._seen))


def _flatten_for_transform(values: list[Any], keys: list[str], captured: bool) -> tuple[list[Any], Any]:
    """Leaves the rest out, as transforms want tensors alone as outputs; it is the same for every example.

    A cache without tensors that was not captured is how `vmap` keeps a number for each output.
    """
    leaves = trees.leaves(values)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) == len(leaves) or not (tensors or captured):
        return values, keys
    return tensors, _Rest(keys, trees.map_tensors(lambda tensor: Tensor, values))


def _flatten_for_optree(cache: Any) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
    return tuple(cache.values()), tuple(cache), tuple(cache)


def _build_cache(values: Iterable[Any], context: Any) -> ActivationCache:
    if isinstance(context, _Rest):
        return _build_cache(_filled(context.values, iter(values)), context.keys)
    return ActivationCache(zip(context, values, strict=True))


def _filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if tree is Tensor:
        return next(tensors)
    node = trees.open_node(tree)
    return tree if node is None else node.rebuild([_filled(child, tensors) for child in node.children])


torch_private.register_torch_node(ActivationCache, _flatten_cache, _build_cache)
optree.register_pytree_node(
    ActivationCache,
    _flatten_for_optree,
    lambda keys, values: _build_cache(values, keys),
    namespace=torch_private.EVERY_NAMESPACE,
)
