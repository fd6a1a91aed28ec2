"""The interventions that change what a model computes: patch, edit, ablate, steer, splice, suspend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.contexts.intervention import Actions, Intervention, Plan
from nicehooks.contexts.region_rules import RegionRule, shape_of
from nicehooks.contexts.subspaces import checked_basis, within
from nicehooks.contexts.user_functions import call_user, show_where, takes_site
from nicehooks.core.calling import has_forward
from nicehooks.core.children import further_children, unwrap
from nicehooks.core.frames import Rule
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, OutputRule
from nicehooks.core.selection import Group, Site, Where
from nicehooks.core.sessions import Session
from nicehooks.core.tap import has_rules
from nicehooks.errors import TreeMismatch
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS, refused

# --- edit, and what everybody writes with it --------------------------------------------------------------------------


class edit(Intervention):
    """Changes values as the model computes them.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with edit(model, "0[:, 0]", lambda value: value * 0):
    ...     model(torch.ones(5, 4))[:, 0].sum().item()
    0.0

    Args:
        model: any module.
        where: a path, a site, … (see `select`), or a mapping from them to functions.
        fn: `fn(value)` or `fn(value, site=…)`; it returns the new value, or None to leave the old one. A tensor is
            broadcast to the shape of the old one and cast to its dtype, as in an assignment.
        steps: the steps to act at (calls of the model since entry): an int, a slice, a list, or a predicate.
        calls: the calls to act at (calls of the module within one step), likewise.

    Raises:
        SiteNotFound: on entry: `where` selects nothing.
        TreeMismatch: in the forward: what `fn` returned does not fit the site.
        SiteNotReached: on exit: a site was selected, but the forward did not come by.
    """

    verb = "edit"
    keeps_plans = True

    def __init__(self, model: nn.Module, where: Where, fn: Any = None, *, steps: Any = None, calls: Any = None) -> None:
        super().__init__(model, steps, calls)
        pairs = _places_with(self.verb, where, fn)
        for _, function in pairs:
            if not callable(function):
                kind = type(function).__name__
                raise TypeError(f"edit(model, where, fn) takes a function of the value as fn, not {kind}")
        self._edits: list[tuple[Where, _Edit]] = [(place, _Edit(self.verb, function)) for place, function in pairs]

    def __repr__(self) -> str:
        return f"{self.verb}(model, {show_where([place for place, _ in self._edits])}, …)"

    def _actions(self) -> Actions:
        return list(self._edits)


def _places_with(verb: str, where: Where, value: Any) -> list[tuple[Where, Any]]:
    """Each place with what belongs to it: those of a mapping, or one place with `value`."""
    if not isinstance(where, Mapping) or isinstance(where, Tensor):
        return [(where, value)]
    if value is not None:
        raise TypeError(
            f"{verb} takes a path with what belongs to it, or a mapping of both, and not a mapping with more"
        )
    return list(where.items())


class _Edit(Action):
    """Puts what a function returns in the place of a value."""

    __slots__ = ("fn", "takes_site", "verb")  # pyright: ignore
    may_write = True

    def __init__(self, verb: str, fn: Callable[..., Any]) -> None:
        self.verb = verb
        self.fn = fn
        self.takes_site = takes_site(fn)

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        new = call_user(self.fn, self.takes_site, value, key, site)
        return value if new is None else trees.assign(value, new)


def ablate(
    model: nn.Module,
    *where: Where,
    value: Any = 0.0,
    subspace: Tensor | None = None,
    steps: Any = None,
    calls: Any = None,
) -> edit:
    """Replaces values by a constant: zero, or a mean.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with ablate(model, "0"):
    ...     model(torch.ones(5, 4)).sum().item()
    0.0

    Args:
        model: any module.
        where: paths, sites, … (see `select`), at least one.
        value: a number, which fills every tensor at the site, or a tensor that broadcasts to it.
        subspace: as for `patch`.
        steps: as for `edit`.
        calls: as for `edit`.
    """
    if not where:
        raise TypeError('ablate(model, where, …) takes at least one path; ablate(model, "**") ablates everything')
    # A copy: a later in-place layer must not reach the user's own mean.
    constant = _Patch(value, checked_basis(subspace))
    return _changed("ablate", model, list(where), constant, lambda each: each.instead_of, steps, calls)


def steer(
    model: nn.Module, where: Where, vector: Any = None, scale: float = 1.0, *, steps: Any = None, calls: Any = None
) -> edit:
    """Adds `scale * vector` to values.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Identity())
    >>> x, direction = torch.ones(5, 4), torch.tensor([1.0, 0.0, 0.0])
    >>> with steer(model, "0", direction, scale=2.0):
    ...     steered = model(x)
    >>> (steered - model(x))[0].round().tolist()
    [2.0, 0.0, 0.0]
    >>> with steer(model, {"0": direction, "1[:, 2]": torch.tensor(3.0)}):
    ...     (model(x) - steered)[0].round().tolist()
    [-1.0, 0.0, 3.0]

    Args:
        model: any module.
        where: a path, a site, … (see `select`), or a mapping from them to vectors; an `ActivationCache` is one.
        vector: a tensor that broadcasts to the value, `[d_model]` for a residual stream of `[batch, pos, d_model]`.
        scale: how much of it to add.
        steps: as for `edit`.
        calls: as for `edit`.
    """
    return _changed("steer", model, where, vector, lambda each: _shift_by(each, scale), steps, calls)


def _shift_by(vector: Any, scale: float) -> Callable[[Any], Tensor]:
    if not isinstance(vector, Tensor):
        raise TypeError(f"steer(model, where, vector) takes a tensor as vector, not {type(vector).__name__}")
    return lambda value: _shifted(value, vector, scale)


def _shifted(value: Any, vector: Tensor, scale: float) -> Tensor:
    """`value + scale * vector`, rounded to the dtype of `value` once, at the end."""
    try:
        if not isinstance(value, Tensor) or not trees.fits(vector.shape, value.shape):
            raise TreeMismatch(_not_added(vector, value))
        wide = _dtype_of_sum(value, vector, scale)
        shift = scale * trees.usable(vector).to(device=value.device, dtype=wide)
        return (value.to(wide) + shift).to(value.dtype)
    except TORCH_ERRORS as error:
        raise refused(error, _not_added(vector, value)) from None


def _not_added(vector: Tensor, value: Any) -> str:
    return f"{trees.structure_of(vector)} cannot be added to {trees.structure_of(value)}"


def _dtype_of_sum(value: Tensor, vector: Tensor, scale: float) -> torch.dtype:
    """In which dtype to add up: one in which nothing is rounded before the end."""
    whole = isinstance(scale, int) and not vector.is_floating_point()
    if not (value.is_floating_point() or value.is_complex() or whole):
        raise TreeMismatch(f"{scale} × {trees.structure_of(vector)} would be rounded in {trees.structure_of(value)}")
    if (trees.is_complex(vector) or trees.is_complex(scale)) and not value.is_complex():
        there = trees.structure_of(value)
        raise TreeMismatch(f"{scale} × {trees.structure_of(vector)} has an imaginary part, {there} has none")
    floating = value.is_floating_point() or value.is_complex()
    return torch.promote_types(value.dtype, torch.float32) if floating else value.dtype


def splice(
    model: nn.Module,
    where: Where,
    module: Any = None,
    error: bool = False,
    *,
    steps: Any = None,
    calls: Any = None,
) -> edit:
    """Sends values through `module`, an autoencoder, say.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> model, autoencoder = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 3)
    >>> x = torch.ones(5, 4)
    >>> clean = model(x)
    >>> with splice(model, "0", autoencoder), capture(model, "0") as acts:
    ...     _ = model(x)
    >>> torch.equal(acts["0"], autoencoder(model[0](x)))
    True
    >>> with splice(model, "0", autoencoder, error=True):
    ...     torch.allclose(model(x), clean, atol=1e-6)
    True

    Args:
        model: any module.
        where: a path, a site, … (see `select`), or a mapping from them to modules.
        module: what the value, a tensor, goes through; it returns a tensor of the same shape. A module of another
            floating dtype gets the value in that, and what it returns is cast back.
        error: adds back what `module` failed to reconstruct, as a constant: the value stays what it was, and gradients
            go through the reconstruction. The error is that of the module alone: what contexts change in it, its
            latents, say, changes the value.
        steps: as for `edit`.
        calls: as for `edit`.
    """
    return _changed("splice", model, where, module, lambda each: _sent_through(each, error), steps, calls)


def _sent_through(module: Any, error: bool) -> Callable[[Any], Tensor]:
    if not callable(module):
        raise TypeError(f"splice(model, where, module) takes a module or a function, not {type(module).__name__}")
    return lambda value: _spliced(value, module, error)


def _spliced(value: Any, module: Callable[[Tensor], Any], error: bool) -> Tensor:
    if not isinstance(value, Tensor):
        raise TreeMismatch(f"{trees.structure_of(value)} is no tensor that could go through a module")
    new = _taken(module, value)
    if not isinstance(new, Tensor) or new.shape != value.shape:
        raise TreeMismatch(f"{trees.structure_of(new)} came out of the module for {trees.structure_of(value)}")
    return new + error_of(module, value, value, new) if error else new


def _taken(module: Callable[[Tensor], Any], value: Tensor) -> Any:
    """What `module` makes of `value`; what torch refuses in a module is no fault of a function of the user."""
    if torch.compiler.is_compiling() or not isinstance(module, nn.Module):
        return through(module, value)
    try:
        return through(module, value)
    except RuntimeError as reason:
        raise refused(reason, f"the module does not take {trees.structure_of(value)}") from reason


def _is_acted_in(module: nn.Module) -> bool:
    """Whether an intervention may be active somewhere in `module`: what Dynamo can guard without knowing the module."""
    return any(["forward" in vars(inner) for inner in module.modules()])


def error_of(module: Callable[[Tensor], Any], value: Tensor, wanted: Tensor, new: Tensor) -> Tensor:
    """What `module` fails to make of `value`, as a constant: `wanted` less what comes out where no context acts in it.

    Args:
        module: what `value` goes through.
        value: what goes in.
        wanted: what should come out.
        new: what did, contexts included; the same where there are none.
    """
    if isinstance(module, nn.Module) and _is_acted_in(module):
        with torch.no_grad(), suspend(module):
            new = through(module, value)
    return (wanted - new).detach()


def through(module: Callable[[Tensor], Any], value: Tensor) -> Any:
    """What `module` makes of `value`, which goes in in the dtype of its parameters and comes back in its own."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    dtype = next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), value.dtype)
    if dtype is value.dtype or not value.is_floating_point():
        return module(value)
    new = module(value.to(dtype))
    return new.to(value.dtype) if isinstance(new, Tensor) and new.is_floating_point() else new


def _changed(
    verb: str, model: nn.Module, where: Where, value: Any, make: Callable[[Any], Any], steps: Any, calls: Any
) -> edit:
    """An `edit` called `verb`, by the function that `make` makes of `value`, or of each value of a mapping."""
    made = [(place, make(each)) for place, each in _places_with(verb, where, value)]
    context = edit(model, dict(made)) if isinstance(where, Mapping) else edit(model, *made[0])
    context.steps, context.calls, context.verb = steps, calls, verb
    for _, action in context._edits:  # pyright: ignore[reportPrivateUsage]
        action.verb = verb
    return context


# --- patch ------------------------------------------------------------------------------------------------------------


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
        return [(where, _Patch(value, self.subspace)) for where, value in self.values]

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


class _Patch(Action):
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


# --- suspend ----------------------------------------------------------------------------------------------------------


class _SuspendRule(Rule):
    """Silences the rules before it."""

    __slots__ = ()
    suspends = True


class suspend(Intervention):
    """Silences every intervention on `model` that was there before: inside it, the model is clean.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with ablate(model, "0"):
    ...     ablated = model(torch.ones(5, 4))
    ...     with suspend(model), capture(model, "0") as acts:
    ...         clean = model(torch.ones(5, 4))
    >>> ablated.any().item(), acts["0"].any().item()
    (False, True)

    What is entered inside it acts. It holds for this thread or task, as every context does.
    """

    verb = "suspend"
    plans_anew = True  # who is to be silenced may have changed

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def __repr__(self) -> str:
        return "suspend(model)"

    def _make_plan(self, actions: Actions | None = None) -> Plan:
        modules = list(unwrap(self.model).modules())
        modules += [method for module in modules for _, method in further_children(module)]
        if torch.compiler.is_dynamo_compiling():  # which traced rules there will be by then is only known there
            tapped = [module for module in modules if has_forward(module)]
        else:
            tapped = [module for module in modules if has_rules(module)]
        return Plan.of(repr(self), [(module, _SuspendRule()) for module in tapped])
