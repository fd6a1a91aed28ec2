"""What there is to see: `sites` lists the places of a model, `describe` what is active on it now."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.contexts.capturing import capture
from nicehooks.core.calling import has_forward
from nicehooks.core.census import Census
from nicehooks.core.children import unwrap
from nicehooks.core.explaining import explained
from nicehooks.core.frames import Rule
from nicehooks.core.register import Pairs, every_kind
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.sessions import is_acting
from nicehooks.core.tap import Tap, tap_of
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.names import escape
from nicehooks.pictures.tables import table_html, tree_html
from nicehooks.values import trees


class SiteRecord(NamedTuple):
    """One module of a model, or one call in its forward, as a place where values can be seen.

    Attributes:
        path: the path of its output.
        type: the name of its class; of a call, "call".
        value: the structure, shapes and dtypes of its output; None without an example.
        calls: how often the example came by; None without an example.
        parameters: the names of its own parameters and buffers, as a path has them behind its `@`.
    """

    path: str
    type: str
    value: str | None
    calls: int | None
    parameters: tuple[str, ...]


class SiteTable(Sequence[SiteRecord]):
    """The sites of a model: a sequence of `SiteRecord`s that prints as a tree.

    Args:
        records: the sites, in the order of the model's modules.
        kind: the class of the model, which is the root of the tree even where it is only a container and no site.
        notes: more to say of a record, by its path.
    """

    def __init__(self, records: list[SiteRecord], kind: str, notes: Mapping[str, str] | None = None) -> None:
        self.records = records
        self.kind = kind
        self.notes = dict(notes or {})

    @overload
    def __getitem__(self, index: int) -> SiteRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[SiteRecord]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The records as plain dicts, for a data frame."""
        return [record._asdict() for record in self.records]

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self.plain()
        file = io.StringIO()  # text alone, whatever Python runs in: no colours, no notebook, no line broken or cut
        width = 2 * max(map(len, self.plain().splitlines()))
        console = Console(file=file, width=width, color_system=None, force_jupyter=False, highlight=False)
        console.print(self.__rich__())
        return "\n".join([line.rstrip() for line in file.getvalue().splitlines()])

    __repr__ = __str__

    def plain(self) -> str:
        """The tree as text, without `rich`."""
        return "\n".join([f"{'  ' * depth}{label}  {about}".rstrip() for depth, label, about in self._lines()])

    def __rich__(self) -> Any:
        from rich.text import Text
        from rich.tree import Tree

        branches: list[Tree] = []
        for depth, label, about in self._lines():
            text = Text.assemble((label, "bold"), "  ", (about, "dim"))
            del branches[depth:]
            branches.append(branches[-1].add(text) if branches else Tree(text))
        return branches[0]

    def _repr_html_(self) -> str:
        return tree_html(list(self._lines()))

    def _lines(self) -> Iterator[tuple[int, str, str]]:
        """Depth, name within the parent, and the rest, of each record; parents that are no sites have a line too."""
        shown: set[str] = set()
        roots = [record for record in self.records if not record.path]
        yield 0, "(model)", self._about(roots[0]) if roots else self.kind
        for record in self.records[len(roots) :]:
            path = ModulePath.parse(record.path)
            segments = path.name.split(".") if path.name else []
            for depth in range(1, len(segments)):
                parent = ".".join(segments[:depth])
                if parent not in shown:
                    shown.add(parent)
                    yield depth, segments[depth - 1], ""
            shown.add(path.name)
            labels = [*segments, str(path.port)] if record.type == CALL else segments
            yield len(labels), labels[-1], self._about(record)

    def _about(self, record: SiteRecord) -> str:
        note = self.notes.get(record.path)
        return f"{_about(record)}  {note}" if note else _about(record)


CALL = "call"
"""The type of a record that is no module."""


def _about(record: SiteRecord) -> str:
    parts = [] if record.type == CALL else [record.type]
    if record.calls is not None:
        parts.append(record.value if record.value is not None else "not called")
        parts += [f"× {record.calls}"] if record.calls > 1 else []
    if record.parameters:
        parts.append(f"@{', @'.join(record.parameters)}")
    return "  ".join(parts)


def sites(model: nn.Module, *args: Any, calls: bool = False, **kwargs: Any) -> SiteTable:
    """Every site of `model`, with its type, and with the structure and shapes of its value if there is an example.

    >>> from torch import nn, ones
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> print(sites(model, ones(5, 2)).plain())
    (model)  Sequential  Tensor[5, 3] float32
      0  Linear  Tensor[5, 3] float32  @weight, @bias
      1  ReLU  Tensor[5, 3] float32
    >>> [record.path for record in sites(model)]
    ['', '0', '1']
    >>> [record.path for record in sites(model, ones(5, 2), calls=True)]
    ['', '0', '0@linear()', '1', '1@relu()']

    Args:
        model: any module.
        args, kwargs: an example input; the model runs once on it, without gradients. Without one, only names and types
            are listed.
        calls: lists what each module calls in its own forward, too: torch functions, and methods of its class, that
            return tensors. Needs an example.
    """
    census = Census(model)
    example = bool(args or kwargs)
    if calls and not example:
        raise TypeError("sites(model, calls=True) sees calls as the model runs: sites(model, example, calls=True)")
    seen = _run(model, capture_with_calls if calls else capture, *args, **kwargs) if example else {}
    called = _calls_by_module(seen)
    records: list[SiteRecord] = []
    for name, module in census.names.items():
        if census.first[id(module)] == name and has_forward(module):
            records.append(_record(escape(name), module, seen, example))
            records += called.get(escape(name), [])
    return SiteTable(records, type(census.root).__name__)


def _run(model: nn.Module, context: type[capture], *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """What each site returned, call by call, described."""
    if torch_private.is_scripted(unwrap(model)):
        raise explained("nearest.scripted", "", model)
    with torch.no_grad(), context(model, _runs_in_python, keep="all", map=trees.structure_of) as acts:
        model(*args, **kwargs)
    return dict(acts)


class capture_with_calls(capture):
    """Captures what modules return and, under keys of their own, the calls in their forwards."""

    def _rules(self, site: Site, action: Action) -> Pairs:
        return [
            *super()._rules(site, action),
            *[pair for kind in every_kind() for pair in kind.rules_for_all(site, action)],
        ]


def _calls_by_module(seen: dict[str, list[str]]) -> dict[str, list[SiteRecord]]:
    """A record for each call, by the path of its module; without a number where there is only one of its name."""
    paths = [path for path in map(ModulePath.parse, seen) if not path.port.is_output]
    numbered = {(path.name, path.port.name) for path in paths if path.port.call != 0}
    called: dict[str, list[SiteRecord]] = {}
    for path in paths:
        port = path.port if (path.name, path.port.name) in numbered else replace(path.port, call=None)
        text, values = str(replace(path, port=port)), seen[str(path)]
        called.setdefault(path.name, []).append(SiteRecord(text, CALL, _described(values), len(values), ()))
    return called


def _runs_in_python(name: str, module: nn.Module) -> bool:
    return not torch_private.is_scripted(module)


def _record(path: str, module: nn.Module, seen: dict[str, Any], example: bool) -> SiteRecord:
    values: list[str] = seen.get(path, [])
    names = tuple([str(port)[1:] for kind in every_kind() for port in kind.listed(module)])
    return SiteRecord(path, type(module).__name__, _described(values), len(values) if example else None, names)


def _described(values: list[str]) -> str | None:
    return " | ".join(dict.fromkeys(values)) if values else None


# --- what is active ---------------------------------------------------------------------------------------------------


class ActiveRecord(NamedTuple):
    """One intervention at one site.

    Attributes:
        path: the site.
        intervention: how it was written.
        scope: "attached" where it acts everywhere, else "with".
        acting: whether it acts in the thread or task that asks, and is not suspended there.
    """

    path: str
    intervention: str
    scope: str
    acting: bool


class ActiveTable(list[ActiveRecord]):
    """What is active on a model, in the order in which it acts at each site."""

    def __str__(self) -> str:
        if not self:
            return "nothing is active"
        return "\n".join(
            f"{record.path}  {record.intervention}  [{record.scope}{'' if record.acting else ', not here'}]"
            for record in self
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A row for each intervention at each site."""
        rows = [(each.path, each.intervention, each.scope, "yes" if each.acting else "not here") for each in self]
        heads = ["site", "intervention", "scope", "acts"]
        return table_html(f"{len(self)} active" if self else str(self), heads, rows)


def describe(model: nn.Module) -> ActiveTable:
    """What is active on `model` now, in any thread.

    >>> from torch import nn
    >>> from nicehooks import ablate
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> handle = ablate(model, "0").attach()
    >>> describe(model)
    0  ablate(model, '0', …)  [attached]
    >>> handle.remove()
    >>> describe(model)
    nothing is active
    """
    taps = [tap for tap in map(tap_of, dict.fromkeys(Census(model).names.values())) if tap is not None]
    rules = dict.fromkeys(rule for tap in taps for rule in tap.rules if isinstance(rule, SiteRule))
    acting = {rule for tap in taps for rule in _rules_acting(tap)}
    return ActiveTable(_active_record(rule, rule in acting) for rule in rules)


def _rules_acting(tap: Tap) -> list[Rule]:
    """The rules of `tap` that act here: the session of each does, and no `suspend` after it silences it."""
    acting: list[Rule] = []
    for rule in tap.rules:
        if is_acting(rule.session):
            acting = [] if rule.suspends else [*acting, rule]
    return acting


def _active_record(rule: SiteRule, acting: bool) -> ActiveRecord:
    session = rule.session
    return ActiveRecord(rule.key, session.label, "attached" if session.attached else "with", acting)
