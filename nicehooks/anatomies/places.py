"""Where the parts of one layer are: what a table says, or what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nicehooks.anatomies.tables import Lacks
from nicehooks.paths.names import escape, unescape

PlaceOfPart = str | Lacks | Mapping[str, str | Lacks]
"""The whole path of a part, why there is none, or one of these per attention implementation."""


class Step(NamedTuple):
    """One step of the stream through a layer.

    Attributes:
        kind: `"add"` (a part is added), `"norm"` or `"scale"`.
        what: the part that is added; the path of the stream behind a norm or a scaling.
        reads: of a norm, the path of what it reads.
    """

    kind: str
    what: str
    reads: str = ""


@dataclass(eq=False)
class PartPlaces:
    """Where the parts of one layer are.

    Attributes:
        block: the name of the module of the layer.
        parts: by part, where it is.
        roles: by role, the name of a module.
        heads: by part, how many heads it has.
        form: how the stream goes through the layer; empty if it is not known.
        gives: the path of what the layer returns.
        d_head: the width of a head.
        compared: of queries, keys and values, how they were compared with what attention reads when they were found.
        passed: by part, the checks that it has passed.
        latent: those of queries, keys and values whose projection reads neither the stream nor a norm of it.
    """

    block: str
    parts: dict[str, PlaceOfPart] = field(default_factory=dict[str, PlaceOfPart])
    roles: dict[str, str] = field(default_factory=dict[str, str])
    heads: dict[str, int] = field(default_factory=dict[str, int])
    form: list[Step] = field(default_factory=list[Step])
    gives: str = ""
    d_head: int | None = None
    compared: dict[str, str] = field(default_factory=dict[str, str])
    passed: dict[str, str] = field(default_factory=dict[str, str])
    latent: frozenset[str] = frozenset()

    def put(self, part: str, place: PlaceOfPart) -> None:
        """A part is at `place`, unless it has been found before."""
        if part not in self.parts or (isinstance(self.parts[part], Lacks) and not isinstance(place, Lacks)):
            self.parts[part] = place

    def role(self, role: str, name: str) -> None:
        """A module has a role, unless another one has it."""
        self.roles.setdefault(role, name)

    def refuse(self, part: str, reason: str) -> None:
        """A part is not handed out."""
        self.parts[part] = Lacks(reason)

    def path(self, part: str, now: str) -> str | Lacks | None:
        """Where a part is under the attention implementation `now`."""
        place = self.parts.get(part)
        return place.get(now) if isinstance(place, Mapping) else place

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return part in self.parts and not isinstance(self.parts[part], Lacks)

    def renamed(self, block: str) -> PartPlaces:
        """The same places in another layer, whose module has the escaped name `block`."""
        old, new = escape(self.block), block

        def moved(text: str) -> str:
            return new + text[len(old) :] if text.startswith(old) else text

        def placed(place: PlaceOfPart) -> PlaceOfPart:
            if isinstance(place, Mapping):
                return {key: moved(one) if isinstance(one, str) else one for key, one in place.items()}
            return moved(place) if isinstance(place, str) else place

        plain = unescape(block)
        return replace(
            self,
            block=plain,
            parts={part: placed(place) for part, place in self.parts.items()},
            roles={role: plain + name[len(self.block) :] for role, name in self.roles.items()},
            heads=dict(self.heads),
            form=[
                Step(step.kind, step.what if step.kind == "add" else moved(step.what), moved(step.reads))
                for step in self.form
            ],
            gives=moved(self.gives),
            passed={},
        )
