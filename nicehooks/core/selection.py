"""Which sites of a model a path selects: every name of every module, and who is nearest to a name that nobody has."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.core.methods import method_modules
from nicehooks.core.register import kind_of
from nicehooks.errors import PathError, SiteNotFound, UnsupportedModule
from nicehooks.paths.grammar import ModulePath, escape

Where = Any
"""What selects sites: a path, a `Site`, a list of them, True, False, a regular expression or a predicate
`(name, module) -> bool` over module names, a module type, a module."""


class Site:
    """One place in one model where a value can be seen or replaced.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> [str(site) for site in select(model, "*")]
    ['0', '1']

    Attributes:
        name: the name of the module in the model.
        path: the `ModulePath` that selects just this site; `str(site)` is the same as text.
        key: the same for two sites that are one place: a module under two names is one module.
    """

    __slots__ = ("_encoders", "_model", "_module", "_text", "key", "name", "path")

    def __init__(self, name: str, module: nn.Module, path: ModulePath, model: nn.Module, encoders: Any = ()) -> None:
        self.name = name
        self.path = path
        self._module = _reference(module)
        self._model = _reference(model)
        self._encoders = tuple([_reference(encoder) for encoder in encoders])
        self._text = str(path)
        self.key = (id(module), self._text[len(escape(name)) :])

    @property
    def module(self) -> nn.Module:
        """The module; a site does not keep it alive."""
        module = self._module()
        if module is None:
            raise SiteNotFound(f"the module of site {self._text!r} no longer exists")
        return module

    @property
    def encoders(self) -> list[nn.Module]:
        """The `nn.TransformerEncoder`s and their layers around the module: a fused kernel of theirs may hide it."""
        return [encoder for reference in self._encoders if (encoder := reference()) is not None]

    def at(self, path: ModulePath) -> Site:
        """The site of the same module at `path`."""
        model: Any = self._model()
        return Site(self.name, self.module, path, model, self.encoders)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether this site was selected in this very model."""
        return self._model() is model and self._module() is not None

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Site({self._text!r})"

    def __eq__(self, other: object) -> bool:
        """A site equals another one of the same module, and its own text: both find a cache's entry."""
        if not isinstance(other, Site):
            return self._text == other if isinstance(other, str) else NotImplemented
        return self._text == other._text and self._module() is other._module()

    def __hash__(self) -> int:
        return hash(self._text)


def _reference(module: nn.Module) -> Callable[[], nn.Module | None]:
    """A weak reference; in code that is being traced, which makes none, one that is as short-lived as the site."""
    return (lambda: module) if torch.compiler.is_compiling() else weakref.ref(module)


class Census:
    """Every name of every module of a model.

    A transparent wrapper (`torch.compile`, `DistributedDataParallel`) is not a module of its own here: the module in it
    has its name. The name that the wrapper gives it is known too, after all others, but has to be spelled out.

    Attributes:
        root: the model, out of its wrappers.
        names: every module by each of its names.
        first: the first name of each module, by `id`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[str, nn.Module] = {}
        self.first: dict[int, str] = {}
        self._marked: dict[str, str] = {}
        for marked, module in sorted(_walk(model, [""], []), key=lambda pair: WRAPPED in pair[0]):
            name = marked.replace(WRAPPED, "")
            if name not in self.names:
                self.names[name] = module
                self._marked[name] = marked
            self.first.setdefault(id(module), name)
        self.root = self.names[""]

    def matching(self, path: ModulePath) -> list[tuple[str, nn.Module]]:
        """The names that `path` matches, with their modules; a wildcard does not stand for what a wrapper adds."""
        return [
            (name, module)
            for name, module in self.names.items()
            if path.matches(name) and (WRAPPED not in self._marked[name] or not path.matches(self._marked[name]))
        ]

    def unwrapped(self) -> list[tuple[str, nn.Module]]:
        """The names without those that a wrapper gives, with their modules."""
        return [(name, module) for name, module in self.names.items() if WRAPPED not in self._marked[name]]

    @cached_property
    def _encoders(self) -> dict[str, nn.Module]:
        kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
        return {name: module for name, module in self.names.items() if isinstance(module, kinds)}

    def encoders_around(self, name: str) -> list[nn.Module]:
        """The encoders and encoder layers that have the module called `name` somewhere in them."""
        return [encoder for outer, encoder in self._encoders.items() if _is_below(name, outer)]

    def other_names(self, name: str) -> list[str]:
        """The other names of the module called `name`."""
        module = self.names.get(name)
        return [other for other, same in self.names.items() if same is module and other != name]


WRAPPED = "\0"
"""In a name that `_walk` yields, before the part that the child of a wrapper has in it."""


def _walk(module: nn.Module, names: list[str], path: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Each name of each module below `module`; a module that contains itself is not entered again."""
    inner = torch_private.wrapped_child(module)
    if inner is not None:
        child: Any = module._modules[inner]
        yield from _walk(child, [*names, *(_join(name, WRAPPED + inner) for name in names)], path)
        return
    for name in names:
        yield name, module
    if torch_private.is_scripted(module):
        return
    for key, child in (*module._modules.items(), *method_modules(module)):
        if child is not None and all(child is not parent for parent in path) and child is not module:
            yield from _walk(child, [_join(name, key) for name in names], [*path, module])


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_below(name: str, outer: str) -> bool:
    """Whether the module called `name` is somewhere in the one called `outer`."""
    return name.startswith(f"{outer}.") if outer else name != ""


# --- selecting --------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """The sites that one item of a `where` selects, and whether it was a wildcard."""

    where: Where
    sites: list[Site]
    wild: bool


def select(model: nn.Module, *where: Where) -> list[Site]:
    """The sites of `model` that `where` selects, in the order of the model's modules, each once.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> select(model, nn.Linear), select(model, "{0..1}[:, -1]")
    ([Site('0'), Site('2')], [Site('0[:, -1]'), Site('1[:, -1]')])

    Args:
        model: any module.
        where: paths, sites, True, False, regular expressions, predicates `(name, module) -> bool`, module types,
            modules, or lists of them.

    Raises:
        PathError: a path is not written in the path language.
        SiteNotFound: an item selects nothing; the message has the nearest names.
        UnsupportedModule: a selected module is TorchScript.
    """
    chosen: dict[Any, Site] = {}
    for group in select_groups(model, where or (True,)):
        for site in group.sites:
            chosen.setdefault(site.key, site)
    return list(chosen.values())


def select_groups(model: nn.Module, where: Where, verb: str = "select") -> list[Group]:
    """The sites of each item of `where`; two groups may have the same one."""
    finder = _Finder(model, verb)
    return [Group(item, *finder.find(item)) for item in flat(where)]


def unwrap(model: nn.Module) -> nn.Module:
    """`model` out of the transparent wrappers around it."""
    while (inner := torch_private.wrapped_child(model)) is not None:
        model = model._modules[inner]  # type: ignore[assignment]
    return model


def flat(where: Where) -> Iterator[Where]:
    """The items of `where`, however they are nested."""
    if isinstance(where, str | Site | Group):
        yield where
    elif isinstance(where, Mapping):
        yield from where
    elif isinstance(where, Iterable) and not isinstance(where, str | nn.Module | type):
        for item in where:
            yield from flat(item)
    else:
        yield where


class _Finder:
    """Finds the sites of one item of a `where` after the other; walks through the model only if one needs it."""

    def __init__(self, model: nn.Module, verb: str) -> None:
        self.model = model
        self.verb = verb

    @cached_property
    def census(self) -> Census:
        return Census(self.model)

    def find(self, item: Where) -> tuple[list[Site], bool]:
        """The sites of `item`, and whether it is a wildcard; a `Group` knows both."""
        if isinstance(item, Group):
            return item.sites, item.wild
        if isinstance(item, Site) and item.belongs_to(self.model):
            return [item], False
        if isinstance(item, str | ModulePath | Site):
            path = item.path if isinstance(item, Site) else ModulePath.parse(item)
            return [site for option in path.alternatives() for site in self._at_path(option)], path.is_wild
        return ([], True) if item is False else (self._chosen(item), True)

    def _at_path(self, path: ModulePath) -> list[Site]:
        named = self.census.matching(path)
        sites = self._sites(named, path)
        if not sites:
            self._refuse_scripted(path)
            raise SiteNotFound(_nothing_matches(self.census, path, named, self.verb))
        return sites

    def _refuse_scripted(self, path: ModulePath) -> None:
        """Says so if the path leads into a TorchScript module."""
        for name, module in self.census.names.items():
            if torch_private.is_scripted(module) and path.plain_name.startswith(f"{name}." if name else ""):
                raise UnsupportedModule(SCRIPTED.format(name=name, kind=type(module).__name__))

    def _chosen(self, item: Where) -> list[Site]:
        named = [(name, module) for name, module in self.census.unwrapped() if _chooses(item, name, module)]
        sites = self._sites(named, EVERYTHING)
        if not sites:
            root = type(self.census.root).__name__
            raise SiteNotFound(f"{_show(item)} selects no module that is ever called in {root}.")
        return sites

    def _sites(self, named: list[tuple[str, nn.Module]], path: ModulePath) -> list[Site]:
        """A site per module, under the first of its names; a module without such a site is passed over."""
        return [
            Site(name, module, path.on(name), self.model, self.census.encoders_around(name))
            for name, module in _once(named)
            if _has_site(name, module, path)
        ]


def _once(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, module in named:
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _has_site(name: str, module: nn.Module, path: ModulePath) -> bool:
    if torch_private.is_scripted(module):
        raise UnsupportedModule(SCRIPTED.format(name=name, kind=type(module).__name__))
    kind = kind_of(path.port)
    return (has_forward(module) or not kind.needs_forward) and kind.is_on(module, path.port)


EVERYTHING = ModulePath("**")


def _chooses(item: Where, name: str, module: nn.Module) -> bool:
    if item is True:
        return True
    if isinstance(item, nn.Module):
        return module is item
    if isinstance(item, type):
        return isinstance(module, item)
    if isinstance(item, re.Pattern):
        return item.search(name) is not None
    if callable(item):
        return bool(item(name, module))
    raise PathError(
        f"{item!r} selects no sites: write a path, a Site, True, a regular expression, a predicate "
        "(name, module) -> bool, a module type, a module, or a list of them"
    )


def has_forward(module: nn.Module) -> bool:
    """Whether `module` can be called at all; a `ModuleList` cannot."""
    if torch_private.is_scripted(module):
        return True
    return type(module).forward is not torch_private.no_forward or "forward" in vars(module)


def has_parameter(module: nn.Module, name: str) -> bool:
    """Whether `module` itself has a parameter, buffer or parametrized tensor called `name`."""
    return name in parameter_names(module)


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the parameters, buffers, parametrized and recomputed tensors that `module` itself has."""
    if torch_private.is_scripted(module):
        return []
    own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    parametrized = list(getattr(module, "parametrizations", {}))
    named = [getattr(hook, "name", None) for hook in torch_private.pre_hooks(module)]
    return [*own, *parametrized, *(name for name in named if name in vars(module))]


# --- messages ---------------------------------------------------------------------------------------------------------

SCRIPTED = (
    "{name!r} is a {kind}: TorchScript runs its forward outside of Python, where nothing can be captured or changed.\n"
    "  Use the original nn.Module instead of the scripted one, or select only modules around it."
)

TAKES_MORE = ("patch", "edit", "steer")
"""The verbs that need more than a model and a path."""


def _nothing_matches(census: Census, path: ModulePath, named: list[tuple[str, nn.Module]], verb: str) -> str:
    model = type(census.root).__name__
    if named:
        name, module = named[0]
        missing = kind_of(path.port).missing(name, module, path.port)
        if missing is not None:
            return missing
        kind = type(module).__name__
        instead = replace(path, name=f"{name}.*" if name else "*")
        return f"{name!r} is a {kind}, which is never called itself.\n  its children: {str(instead)!r}"
    return "\n".join([f"no module matches {str(path)!r} in {model}.", *_nearest(census, path, verb)])


def _nearest(census: Census, path: ModulePath, verb: str) -> Iterator[str]:
    """The lines of a message that say which names were probably meant, and what to write."""
    callable_names = [name for name, module in census.names.items() if name and has_forward(module)]
    kinds: dict[str, list[str]] = {}
    for name in callable_names:
        kinds.setdefault(_kind_of(name), []).append(name)
    best = max(kinds, key=lambda kind: _closeness(_kind_of(path.name), kind), default=None)
    if best is None:
        return
    names = kinds[best]
    shown = f"{names[0]} … {names[-1]}" if len(names) > 2 else ", ".join(names)
    yield f"  nearest names: {shown}"
    if not path.is_wild and path.plain_name in names:
        return
    right = best if path.is_wild or "{" in path.name else _same_numbers(path.name, names)
    more = ", …" if verb in TAKES_MORE else ""
    wrong, good = (f'{verb}(model, "{text}"{more})' for text in (path, replace(path, name=right)))
    width = max(len(wrong), len(good))
    yield f"    {wrong:<{width}}  # incorrect"
    yield f"    {good:<{width}}  # correct"


def _kind_of(name: str) -> str:
    """`name` with `*` for every number, wildcard and alternative: what all layers have in common."""
    return re.sub(r"(^|(?<=\.))(\d+|\*+|\{[^}]*\})(?=\.|$)", "*", re.sub(r"\\(.)", r"\1", name))


def _closeness(wanted: str, kind: str) -> tuple[float, float]:
    same_end = kind == wanted or kind.endswith("." + wanted)
    last_alike = (wanted.split(".")[-1] == "*") == (kind.split(".")[-1] == "*")
    ratio = difflib.SequenceMatcher(None, wanted, kind).ratio()
    tail = difflib.SequenceMatcher(None, wanted.split(".")[-1], kind.split(".")[-1]).ratio()
    depth = abs(wanted.count(".") - kind.count("."))
    return (2.0 * same_end + 0.5 * last_alike, ratio + tail - 0.2 * depth)


def _same_numbers(wanted: str, names: list[str]) -> str:
    """The name among `names` whose numbers are nearest to those of `wanted`."""
    numbers = [int(number) for number in re.findall(r"\d+", wanted)]

    def distance(name: str) -> tuple[int, float]:
        own = [int(number) for number in re.findall(r"\d+", name)]
        gap = sum(abs(a - b) for a, b in zip(reversed(numbers), reversed(own), strict=False))
        return gap, -difflib.SequenceMatcher(None, wanted, name).ratio()

    return min(names, key=distance)


def _show(item: Where) -> str:
    if isinstance(item, nn.Module):
        return f"this {type(item).__name__}"
    return item.__name__ if isinstance(item, type) else str(getattr(item, "__name__", item))
