"""The dict under a cache: what was captured, read by path, and watched for being overwritten.

NOTE [What a cache keeps alive]
A value that left the cache is free, so what was captured is watched through weak references. The shortest way into a
cache (`_WholeOutput`) cannot afford to make one (60 ns): it stores `(tensor, version)` in `_seen` beside the value, and
that becomes a `Watch` when the value is read first. Every other way to write into the cache, and every way out of it,
drops what is in `_seen` under that key. So `__setitem__` is Python (150 ns), and the shortest way stores with
`dict.setdefault`, which is as fast as the store of a plain dict, and with `dict.__setitem__` where the key is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from nicehooks.caches.containment import wholes_of
from nicehooks.caches.messages import OUTLIVED, STALE, not_captured, text_of
from nicehooks.caches.spellings import NO_NAMES, Names, spellings_of
from nicehooks.caches.watching import Calls, GraphWatch, Link, Watch, calls_of
from nicehooks.errors import NotCaptured, PathError, StaleActivation, TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees
from nicehooks.values.trees import Chain

if TYPE_CHECKING:
    from typing_extensions import Self


class Store(dict[str, Any]):
    """Values by path, in the order in which the model made them."""

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(values)
        self._pass_starts: dict[str, int] = {}
        self._firsts: dict[str, bool] = {}
        self._seen: dict[str, Any] = {}  # see NOTE [What a cache keeps alive]
        self._graph_watch: GraphWatch | None = None  # while the call of a model is being traced
        self._graph_writes: Any = None  # which that has left
        self._other_names: Names = NO_NAMES
        self._rest: Any = None  # see NOTE [What transforms take]; of this very cache, so a new item ends it
        if isinstance(values, Store):
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
        return default if found is None or not self._has(*found) else self._read(key, *found)

    def __contains__(self, key: object) -> bool:
        found = self._find(key)
        return found is not None and self._has(*found)

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
        return None if torch.compiler.is_dynamo_compiling() else self._under_other_spelling(ModulePath.parse(text))

    def _under_other_spelling(self, path: ModulePath) -> tuple[str, Chain] | None:
        for other in spellings_of(path, self._other_names):
            for whole, rest in wholes_of(str(other)):
                if dict.__contains__(self, whole):
                    return whole, rest
        return None

    def _key(self, key: Any) -> str | None:
        """The key under which the whole value at the path `key` stands, if it is here."""
        try:
            whole, chain = self._find(key) or (None, ())
        except PathError:
            return None
        return None if chain else whole

    def _read(self, path: Any, whole: str, chain: Chain) -> Any:
        value = self._fresh(whole)
        if not chain:
            return value
        try:
            return Calls(trees.get(item, chain) for item in value) if type(value) is Calls else trees.get(value, chain)
        except TreeMismatch as error:
            raise TreeMismatch(f"{str(path)!r} in this cache: {error}.") from None

    def _has(self, whole: str, chain: Chain) -> bool:
        """Whether the value at the key `whole`, overwritten or not, has a part at `chain`."""
        value = dict.__getitem__(self, whole)
        try:
            for item in calls_of(value) if type(value) is Link else value if type(value) is Calls else [value]:
                trees.get(item, chain)
        except TreeMismatch:
            return False
        return True

    def _fresh(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        if isinstance(value, Link):
            value = calls_of(value)
            dict.__setitem__(self, key, value)
        if self._graph_writes is not None and not torch.compiler.is_compiling():
            self._note_graph_writes()
        watch = None if not self._seen or torch.compiler.is_compiling() else self._watch(key)
        if watch is None:
            return value
        value = watch.as_captured(value)
        if watch.lives and watch.outlived(value):
            raise StaleActivation(OUTLIVED.format(key=key))
        if watch.notices(value):
            raise StaleActivation(STALE.format(key=key))
        return value

    def _watch(self, key: str) -> Watch | None:
        """The watch over the value at `key`, if it was captured; see NOTE [What a cache keeps alive]."""
        seen = self._seen.get(key)
        if type(seen) is tuple:
            seen = self._seen[key] = Watch.before(*seen)
        return seen

    def _note_graph_writes(self) -> None:
        """Marks what compiled code has overwritten; see `GraphWatch`."""
        left, self._graph_writes = self._graph_writes, None
        for writes in calls_of(left) if type(left) is Link else [left]:
            for key, (value, count) in writes.items():
                if count and (type(left) is Link or dict.get(self, key) is value):
                    watch = self._seen[key] = Watch(self._watch(key) or ())
                    watch.overwritten = True

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(cache) and {**cache} read through __getitem__ too

    def values(self) -> Any:
        return [self._fresh(key) for key in self]

    def items(self) -> Any:
        return [(key, self._fresh(key)) for key in self]

    def copy(self) -> Self:
        return self._like(self.items())

    def __copy__(self) -> Self:
        return self.copy()

    def __reduce__(self) -> Any:
        return (type(self), (list(self.items()),))

    # writing

    def __setitem__(self, key: str, value: Any) -> None:
        self._forget(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        text = self._key(key)
        if text is None:
            raise NotCaptured(not_captured(self, key))
        self._forget(text)
        super().__delitem__(text)

    def _forget(self, key: str) -> None:
        if self._graph_writes is not None and not torch.compiler.is_compiling():
            self._note_graph_writes()
        self._seen.pop(key, None)
        self._rest = None

    def pop(self, key: Any, *default: Any) -> Any:
        text = self._key(key)
        if text is None:
            if default:
                return default[0]
            raise NotCaptured(not_captured(self, key))
        value = self._fresh(text)
        del self[text]
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
        for key, value in dict(values, **more).items():
            self[key] = value
        if isinstance(values, Store):
            self._watch_as(values)

    def __ior__(self, other: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
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
        self._rest = None

    # capturing

    def insert_call(self, key: str, value: Any, new_pass: bool) -> None:
        """Stores the gradient of one call: each backward pass brings those of the last calls first."""
        calls = dict.get(self, key, Calls())
        start = len(calls) if new_pass else self._pass_starts.get(key, 0)
        self._pass_starts[key] = start
        calls = Calls([*calls[:start], value, *calls[start:]])
        self[key] = calls
        self._seen[key] = Watch.over(calls)

    def record(self, key: str, value: Any, keep: str = "last") -> None:
        """Stores a captured value as it is now, with its version, to notice when it is overwritten later."""
        if keep == "first":
            if self._has_first(key):
                return
            self._firsts[key] = True
        if torch.compiler.is_compiling():
            value = trees.as_it_is(value)
            if self._graph_watch is not None:
                self._graph_watch.note(key, value, keep == "all")
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

    def _watch_as(self, other: Store) -> None:
        """Watches over the values that are those of `other`; the watch over another value notices nothing."""
        for key in other:
            watch = other._watch(key)
            if watch is not None and dict.__contains__(self, key):
                self._seen[key] = watch.over_other(dict.__getitem__(self, key))

    def _like(self, values: Any) -> Self:
        """A cache of `values` that knows what this one knows."""
        new = type(self)(values)
        new._other_names = self._other_names
        new._watch_as(self)
        return new
