"""patch: values in the place of those that a model computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.watching import Calls
from nicehooks.contexts.intervention import Actions, Intervention, Plan
from nicehooks.contexts.region_rules import RegionRule, shape_of
from nicehooks.contexts.subspaces import checked_basis, within
from nicehooks.contexts.user_functions import show_where
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, OutputRule
from nicehooks.core.selection import Group, Site, Where
from nicehooks.core.sessions import Session
from nicehooks.errors import TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees


class patch(Intervention):
    """Replaces values as the model computes them, with the semantics of an assignment.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with patch(model, {"0[:, 0]": 7.0, "0[:, 1]": torch.arange(5)}):
    ...     model(torch.ones(5, 4))[:, :2].tolist()
    [[7.0, 0.0], [7.0, 1.0], [7.0, 2.0], [7.0, 3.0], [7.0, 4.0]]

    Args:
        model: any module.
        where: a path, a site, … (see `select`), or a mapping from them to values; an `ActivationCache` is one.
        value: a tensor, broadcast to the site and cast to its dtype; a number, which fills every tensor there; a tree,
            which replaces leaf by leaf, where `KEEP` leaves one alone.
        subspace: an orthonormal basis `Q`, `[d, k]`, of the last dimension: only the component of the value within its
            span is replaced, `v + (new - v) Q Qᵀ`. With a `Q` that is learned this is distributed alignment search
            (Geiger et al. 2024); gradients go through it.
        steps: as for `edit`.
        calls: as for `edit`.

    Raises:
        SiteNotFound: on entry: a path selects nothing.
        TreeMismatch: in the forward: a value does not fit its site; at once: `subspace` is not orthonormal.
        SiteNotReached: on exit: a site was selected, but the forward did not come by.
    """

    verb = "patch"
    keeps_plans = True

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        value: Any = ...,
        *,
        subspace: Tensor | None = None,
        steps: Any = None,
        calls: Any = None,
    ) -> None:
        super().__init__(model, steps, calls)
        self.subspace = checked_basis(subspace)
        if (value is ...) != isinstance(where, Mapping) or isinstance(where, Tensor):
            raise TypeError("patch takes a path and a value, patch(model, path, value), or a mapping of them")
        self._together: dict[int, tuple[Any, list[RegionRule]]] = {}  # while a plan is made: the last rules of a module
        self._found: dict[Where, Group] = {}  # while a plan is made: what each path selects
        self.values: list[tuple[Where, Any]] = list(where.items()) if value is ... else [(where, value)]

    def __repr__(self) -> str:
        return f"patch(model, {{{', '.join(f'{show_where(where)}: …' for where, _ in self.values)}}})"

    def _actions(self) -> list[tuple[Where, Action]]:
        return [(where, Replacement(value, self.subspace)) for where, value in self.values]

    def _make_plan(self, actions: Actions | None = None) -> Plan:
        wheres = [where for where, _ in self.values]
        self._together = {}
        self._found = {}
        if len(wheres) > 1 and not _is_traced() and all([isinstance(where, str) for where in wheres]):
            self._found = dict(zip(wheres, super()._selected(wheres), strict=True))  # one walk through the model
        try:
            return super()._make_plan(actions)
        finally:
            self._together, self._found = {}, {}

    def _selected(self, where: Where) -> list[Group]:
        found = self._found.get(where) if isinstance(where, str) else None
        return super()._selected(where) if found is None else [found]

    def _rules(self, site: Site, action: Action) -> Pairs:
        """See NOTE [Regions that are written together]."""
        if isinstance(action, Replacement):
            _check_is_one(site, action.value)
        if _is_traced():
            return super()._rules(site, action)
        pairs, shape, module = super()._rules(site, action), shape_of(site), id(site.module)
        ((_, rule), *others) = pairs
        if others or type(rule) is not OutputRule or rule.when.counts or shape is None:
            self._together.pop(module, None)  # what comes between two regions has to stay there
            return pairs
        before, together = self._together.get(module, (None, []))
        self._together[module] = shape, (together if before == shape else [])
        return [(pairs[0][0], RegionRule(site, action, rule.when, self._together[module][1]))]


def _check_is_one(site: Site, value: Any) -> None:
    """Raises `TreeMismatch` for what cannot be the value of one site: several calls, or a tree of gradients."""
    path, node = site.path, trees.open_node(value)
    if type(value) is Calls:
        paths = [replace(path, call=call) for call in range(len(value))]
        raise TreeMismatch(SEVERAL_CALLS.format(path=str(path), fix=_to_write(paths)))
    if path.port.is_gradient and node is not None:
        paths = [replace(path, chain=(*path.chain, entry)) for entry in node.entries]
        what = trees.structure_of(value)
        raise TreeMismatch(SEVERAL_GRADIENTS.format(path=str(path), what=what, fix=_to_write(paths)))


def _to_write(paths: list[ModulePath]) -> str:
    return ", ".join([*(f"{str(path)!r}: …" for path in paths[:2]), *(["…"] if len(paths) > 2 else [])])


SEVERAL_CALLS = (
    "patch at {path!r}: the calls of a capture came, which is one value for each.\n"
    "    patch(model, {{{fix}}})  # those of one run; of several, steps= says which"
)
SEVERAL_GRADIENTS = (
    "patch at {path!r}: {what} came, but each tensor of a tree has a gradient of its own.\n"
    "    patch(model, {{{fix}}})  # those that are to be others"
)


class Replacement(Action):
    """Puts a value in the place of another, as a copy: a later in-place layer must not reach the user's own tensor."""

    __slots__ = ("number", "subspace", "value")
    verb = "patch"

    def __init__(self, value: Any, subspace: Tensor | None = None) -> None:
        self.subspace = subspace
        self.number = value
        # Dynamo compiles anew for each int, but not for each float.
        self.value = float(value) if type(value) is int and abs(value) < 2**53 else value

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        return self.instead_of(value)

    def instead_of(self, old: Any) -> Any:
        """What takes the place of `old`."""
        number = isinstance(self.value, int | float | complex)
        if number and not isinstance(old, int | float | complex) and not any(map(_is_tensor, trees.leaves(old))):
            raise TreeMismatch(f"{self.value} came where {trees.structure_of(old)} stands, in which there is no tensor")
        new = self.placed(old)
        return old if trees.is_same(new, old) else _copied_into(new, old)

    def placed(self, old: Any) -> Any:
        """The value, as it fits `old`, before it is copied."""
        if isinstance(old, int | float | complex):
            return self.number  # an int stays one
        new = trees.assign(old, self.value)
        return new if self.subspace is None or trees.is_same(new, old) else within(self.subspace, old, new)


def _is_traced() -> bool:
    return torch.compiler.is_dynamo_compiling()


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _copied_into(new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return new.clone()
    kept = [leaf for leaf in trees.leaves(old) if isinstance(leaf, Tensor)]
    return trees.map_tensors(lambda tensor: tensor.clone() if trees.place_in(kept, tensor) is None else tensor, new)
