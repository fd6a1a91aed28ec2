"""`ActivationCache`: the values that a context saw, by path, with what one does to them afterwards."""

from __future__ import annotations

import difflib
import html
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import optree
import torch
from torch import Tensor

from nicehooks import internals, trees
from nicehooks.errors import NiceHooksError, NotCaptured, SiteNotFound, StaleActivation, TreeMismatch
from nicehooks.paths import ModulePath

_T = TypeVar("_T")


class Calls(list[_T]):
    """One value per call of a site, in the order in which the calls ended: what `keep="all"` collects."""


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
    transforms. Reading a value that the model has overwritten in place since it was captured raises `StaleActivation`.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(values)
        self._seen: dict[str, tuple[Any, Any]] = {}  # what was captured, and its version then
        self._other_names: Callable[[str], list[str]] = _no_other_names

    # reading

    def __getitem__(self, path: Any) -> Any:
        """The value at `path`, which may be more specific than what was captured.

        Raises:
            NotCaptured: (a `KeyError`) nothing that was captured has this value.
            StaleActivation: the value was overwritten in place after it was captured.
        """
        key = path if type(path) is str else str(path)
        if dict.__contains__(self, key):
            return self._fresh(key)
        found = self._whole_of(key)
        if found is None:
            raise NotCaptured(_not_captured(self, key))
        whole, chain = found
        value = self._fresh(whole)
        try:
            return Calls(trees.get(item, chain) for item in value) if type(value) is Calls else trees.get(value, chain)
        except TreeMismatch as error:
            raise TreeMismatch(f"{key!r} in this cache: {error}.") from None

    def _whole_of(self, key: str) -> tuple[str, trees.Chain] | None:
        """The key of the value that has the value at `key` in it, and the way from there."""
        path = ModulePath.parse(key)
        found = self._whole_under(path)
        if found is not None:
            return found
        for other in self._other_names(path.plain_name):
            found = self._whole_under(path.on(other))
            if found is not None:
                return found
        return None

    def _whole_under(self, path: ModulePath) -> tuple[str, trees.Chain] | None:
        for taken in range(len(path.chain), -1, -1):
            whole = str(ModulePath(path.name, path.call, path.port, path.chain[:taken]))
            if dict.__contains__(self, whole):
                return whole, path.chain[taken:]
        return None

    def _fresh(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        captured, version = self._seen.get(key, (None, None))
        if captured is value and version is not None and version != version_of(value):
            raise StaleActivation(STALE.format(key=key))
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __contains__(self, key: object) -> bool:
        if dict.__contains__(self, key):
            return True
        return isinstance(key, str | ModulePath) and self._whole_of(str(key)) is not None

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(cache) and {**cache} read through __getitem__ too

    def values(self) -> Any:
        return [self._fresh(key) for key in self]

    def items(self) -> Any:
        return [(key, self._fresh(key)) for key in self]

    def pop(self, key: Any, *default: Any) -> Any:
        value = self.get(key, *default) if default else self[key]
        if dict.__contains__(self, key):
            del self[key]
        return value

    def copy(self) -> ActivationCache:
        return self._like(self.items())

    def __copy__(self) -> ActivationCache:
        return self.copy()

    def __reduce__(self) -> Any:
        return (ActivationCache, (list(self.items()),))

    def __or__(self, other: Any) -> ActivationCache:
        return self._like([*self.items(), *other.items()])

    # writing

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self._seen.pop(key, None)

    def record(self, key: str, value: Any, keep: str = "last") -> None:
        """Stores a captured value, with its version, to notice when it is overwritten later."""
        if keep == "first" and dict.__contains__(self, key):
            return
        if torch.compiler.is_compiling():  # a compiled graph has no versions, and no in-place writes to what it returns
            dict.__setitem__(self, key, Calls([*dict.get(self, key, ()), value]) if keep == "all" else value)
            return
        version = version_of(value)
        if keep == "all":
            before, versions = self._seen.get(key, (Calls(), ()))
            value, version = Calls([*before, value]), (*versions, version)
        self[key] = value
        self._seen[key] = (value, version)

    # many values at once

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

    def select(self, where: Any) -> ActivationCache:
        """The part of the cache at `where`: paths, lists of them, regular expressions or predicates over the keys.

        Raises:
            SiteNotFound: an item of `where` selects nothing.
        """
        chosen: dict[str, Any] = {}
        for item in where if isinstance(where, list | tuple | set) else [where]:
            found = self._selected(item)
            if not found and item is not False:
                raise SiteNotFound(_not_captured(self, str(item)))
            chosen.update(found)
        return self._like(chosen)

    def _selected(self, item: Any) -> dict[str, Any]:
        if isinstance(item, bool):
            return dict(self.items()) if item else {}
        if hasattr(item, "search"):
            return {key: value for key, value in self.items() if item.search(key)}
        if callable(item):
            return {key: value for key, value in self.items() if item(key)}
        path = ModulePath.parse(str(item))
        keys = {str(path.on(ModulePath.parse(key).plain_name)): None for key in self if path.matches(_name(key))}
        if path.call is None and not path.chain and path.port.kind == "output":
            keys = {key: None for key in self if path.matches(_name(key))}
        return {key: self[key] for key in keys if key in self}

    def stack(self, where: Any = True) -> Tensor:
        """The values at `where` as one tensor with a new leading dimension, `[site, …]`.

        Raises:
            TreeMismatch: the values are not tensors of one shape.
        """
        chosen = self.select(where)
        kinds = {trees.describe(value) for value in chosen.values()}
        if len(kinds) != 1 or not all(isinstance(value, Tensor) for value in chosen.values()):
            shown = ", ".join(f"{key}: {trees.describe(value)}" for key, value in chosen.items())
            raise TreeMismatch(f"only tensors of one shape and dtype can be stacked, but here are {shown}.")
        return torch.stack(list(chosen.values()))

    def calls(self, path: Any) -> list[Any]:
        """The values of all calls at `path`, in order, however they were captured (`keep="all"` or `#*`).

        Raises:
            NotCaptured: nothing that was captured has this value.
        """
        parsed = ModulePath.parse(str(path))
        if parsed in map(ModulePath.parse, self) or self._whole_of(str(parsed)) is not None:
            value = self[str(parsed)]
            return list(value) if type(value) is Calls else [value]
        numbers = sorted(k.call for key in self if (k := ModulePath.parse(key)).name == parsed.name and type(k.call) is int)
        found = [ModulePath(parsed.name, number, parsed.port, parsed.chain) for number in dict.fromkeys(numbers)]
        if not found:
            raise NotCaptured(_not_captured(self, str(path)))
        return [self[str(one)] for one in found]

    def _with(self, other: Any, op: Callable[[Any, Any], Any]) -> ActivationCache:
        if isinstance(other, Mapping):
            mine = ActivationCache(cast(Any, other))
            return self._like((key, _combine(self[key], mine[key], op, key)) for key in self if key in mine)
        if isinstance(other, int | float | complex | Tensor):
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

    def _like(self, values: Any) -> ActivationCache:
        new = ActivationCache(values)
        new._other_names = self._other_names
        return new

    # outside

    @property
    def nbytes(self) -> int:
        """The memory of all tensors, in bytes; a tensor that is there twice counts once."""
        tensors = {id(leaf): leaf for value in dict.values(self) for leaf in trees.leaves(value) if isinstance(leaf, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def save(self, file: Any) -> None:
        """Writes the cache to `file` (safetensors). Named tuples and `ModelOutput`s come back as tuples and dicts.

        Raises:
            TreeMismatch: a value has something else in it than tensors, numbers, strings and containers.
            NiceHooksError: safetensors is not installed.
        """
        tensors: dict[str, Tensor] = {}
        structure = {key: _encode(value, tensors, key) for key, value in self.items()}
        _safetensors().save_file(tensors, str(file), metadata={"nicehooks": json.dumps(structure)})

    @staticmethod
    def load(file: Any) -> ActivationCache:
        """Reads what `save` has written."""
        with _safetensors().safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            text = (opened.metadata() or {}).get("nicehooks")
        if text is None:
            return ActivationCache(tensors)
        return ActivationCache({key: _decode(value, tensors) for key, value in json.loads(text).items()})

    def __repr__(self) -> str:
        width = max((len(key) for key in self), default=0)
        rows = [f"  {key:<{width}}  {trees.describe(value)}" for key, value in dict.items(self)]
        sites = "1 site" if len(self) == 1 else f"{len(self)} sites"
        return "\n".join([f"ActivationCache: {sites}, {show_bytes(self.nbytes)}", *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{html.escape(key)}</code></td><td>{html.escape(trees.describe(value))}</td></tr>"
            for key, value in dict.items(self)
        )
        title = f"ActivationCache: {len(self)} sites, {show_bytes(self.nbytes)}"
        return f"<table><caption>{title}</caption><tr><th>site</th><th>value</th></tr>{rows}</table>"


def _no_other_names(name: str) -> list[str]:
    return []


def version_of(value: Any) -> Any:
    """What changes when a tensor in `value` is written to: its version counter.

    Tensors made under `inference_mode` have none; a checksum stands in for it there.
    """
    if isinstance(value, Tensor):
        return _checksum(value) if value.is_inference() else internals.version(value)
    if type(value) in (Calls, tuple, list):
        return tuple([version_of(one) for one in value])
    if value is None:
        return None
    return tuple(version_of(leaf) for leaf in trees.leaves(value) if isinstance(leaf, Tensor))


def _checksum(value: Tensor) -> Any:
    total = value.detach().sum(dtype=torch.complex128 if value.is_complex() else torch.float64)
    return str(total.item())  # as text: NaN equals itself


def _combine(a: Any, b: Any, op: Callable[[Any, Any], Any], key: str) -> Any:
    if isinstance(a, Tensor):
        return op(a, b)
    node, other = trees.open_node(a), trees.open_node(b)
    if node is None or other is None:
        return a
    if len(node.children) != len(other.children):
        raise TreeMismatch(f"at {key!r}: {trees.describe(a)} and {trees.describe(b)} have different structures.")
    return node.rebuild(_combine(x, y, op, key) for x, y in zip(node.children, other.children, strict=True))


def _name(key: str) -> str:
    return ModulePath.parse(key).plain_name


def show_bytes(count: int) -> str:
    """A number of bytes for people."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


STALE = (
    "{key!r} was overwritten in place after it was captured (an in-place layer such as ReLU(inplace=True), or x += y), "
    "so this value is no longer what the site produced.\n"
    '    capture(model, "{key}", clone=True)  # keeps a copy of its own'
)


def _not_captured(cache: ActivationCache, key: str) -> str:
    near = difflib.get_close_matches(key, list(cache), n=3, cutoff=0.3) or list(cache)[:3]
    have = f"nearest: {', '.join(near)}" if near else "it is empty"
    return f"{key!r} is not in this cache of {len(cache)} sites ({have})."


# --- files ------------------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise NiceHooksError(
            'saving and loading activations needs safetensors: pip install "nicehooks[hf]"'
        ) from None
    module: Any = safetensors
    module.save_file = safetensors.torch.save_file
    return module


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as JSON, with the names of its tensors, which go to `tensors`."""
    if isinstance(value, Tensor):
        own = value.detach().contiguous()
        shared = any(own.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in tensors.values())
        tensors[name] = own.clone() if shared else own
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    node = trees.open_node(value)
    if node is None:
        raise TreeMismatch(f"{name!r} holds a {type(value).__name__}, which cannot be saved; select or map the rest first.")
    children = [_encode(c, tensors, f"{name}/{i}") for i, c in enumerate(node.children)]
    if type(value) is Calls:
        return {"calls": children}
    if isinstance(value, tuple | list):
        return {"list" if isinstance(value, list) else "tuple": children}
    return {"dict": [[entry, child] for entry, child in zip(node.entries, children, strict=True)]}


def _decode(code: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = code.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(child, tensors) for key, child in content}
    if kind == "value":
        return content
    children = [_decode(child, tensors) for child in content]
    return children if kind == "list" else tuple(children) if kind == "tuple" else Calls(children)


# --- pytrees ----------------------------------------------------------------------------------------------------------


def _flatten_cache(cache: ActivationCache) -> tuple[list[Any], list[str]]:
    return list(cache.values()), list(cache)


def _build_cache(values: Iterable[Any], keys: Any) -> ActivationCache:
    return ActivationCache(zip(keys, values, strict=True))


def _flatten_calls(calls: Calls[Any]) -> tuple[list[Any], None]:
    return list(calls), None


internals.register_torch_node(ActivationCache, _flatten_cache, _build_cache)
internals.register_torch_node(Calls, _flatten_calls, lambda values, _: Calls(values))
optree.register_pytree_node(
    ActivationCache,
    lambda cache: (tuple(cache.values()), tuple(cache), tuple(cache)),
    lambda keys, values: _build_cache(values, keys),
    namespace=internals.EVERY_NAMESPACE,
)
optree.register_pytree_node(
    Calls,
    lambda calls: (tuple(calls), None),
    lambda _, values: Calls(values),
    namespace=internals.EVERY_NAMESPACE,
)
