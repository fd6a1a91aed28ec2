"""Edits of what a model computes, and those that everybody writes: ablate, steer, splice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.caches.containment import means_several
from nicehooks.contexts.intervention import Actions, Intervention
from nicehooks.contexts.patching import Replacement
from nicehooks.contexts.subspaces import checked_basis
from nicehooks.contexts.suspending import suspend
from nicehooks.contexts.user_functions import call_user, show_where, takes_site
from nicehooks.core.explaining import explained
from nicehooks.core.rules import Action
from nicehooks.core.selection import Site, Where, select_groups
from nicehooks.core.sessions import Session
from nicehooks.errors import TreeMismatch
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS, refused
from nicehooks.values.regions import STAR
from nicehooks.values.shared_memory import as_written, last_written


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
        before = last_written(value)
        new = call_user(self.fn, self.takes_site, value, key, site)
        return as_written(value, before) if new is None or new is value else trees.assign(value, new)


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
    >>> from nicehooks import mean_activations
    >>> means = mean_activations(model, "*", [torch.zeros(2, 4), torch.ones(2, 4)])
    >>> with ablate(model, "*", value=means):
    ...     torch.equal(model(torch.ones(5, 4))[0], means["1"][0])
    True

    Args:
        model: any module.
        where: paths, sites, … (see `select`), at least one.
        value: a number, which fills every tensor at the site, a tensor that broadcasts to it, or a cache that has
            such a tensor for each site, as `mean_activations` makes one.
        subspace: as for `patch`.
        steps: as for `edit`.
        calls: as for `edit`.

    Raises:
        NotCaptured: the cache has no value for a site.
        TypeError: no path is given, or the value is a text, or a function.
    """
    if not where:
        raise TypeError(explained("misuse.empty", "ablate"))
    if isinstance(value, str) or (callable(value) and not isinstance(value, Tensor)):
        raise TypeError(NO_CONSTANT.format(value=value))
    basis = checked_basis(subspace)
    if isinstance(value, ActivationCache):
        sites = [site for group in select_groups(model, list(where), "ablate") for site in group.sites]
        places, constants = {at: one for site in sites for at, one in _values_at(site, value)}, None
    else:
        places, constants = list(where), value
    # A replacement is a copy: a later in-place layer must not reach the user's own mean.
    return _changed("ablate", model, places, constants, lambda each: Replacement(each, basis).instead_of, steps, calls)


def _values_at(site: Site, cache: ActivationCache) -> list[tuple[Where, Any]]:
    """The places that `site` stands for, each with its value in the cache: a value with its `*` has all of them."""
    if not means_several(site.path):
        return [(site, cache[site])]
    chain = site.path.chain[:-1] if site.path.chain and site.path.chain[-1] is STAR else site.path.chain
    whole = site.at(replace(site.path, chain=tuple(map(_whole_step, chain))))
    return [(whole, cache[whole])] if STAR not in chain and whole in cache else [*cache.select(str(site)).items()]


def _whole_step(step: Any) -> Any:
    return tuple([slice(None) if item is STAR else item for item in step]) if isinstance(step, tuple) else step


NO_CONSTANT = (
    "ablate(model, where, value=…) takes a number, a tensor, or a cache with a value for each site, not {value!r}.\n"
    "  a mean:      ablate(model, where, value=mean_activations(model, where, batches))\n"
    "  a function:  edit(model, where, fn)"
)


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
    return Shift(vector, scale).added


class Shift:
    """What `steer` adds."""

    def __init__(self, vector: Tensor, scale: float) -> None:
        self.vector = vector
        self.scale = scale

    def added(self, value: Any) -> Tensor:
        """`value + scale * vector`, rounded to the dtype of `value` once, at the end."""
        vector, scale = self.vector, self.scale
        try:
            if not isinstance(value, Tensor) or not trees.fits(vector.shape, value.shape):
                raise TreeMismatch(_not_added(vector, value))
            wide = _dtype_of_sum(value, vector, scale)
            shift = scale * trees.beside(trees.usable(vector).to(device=value.device, dtype=wide), value)
            return (value.to(wide) + shift).to(value.dtype)
        except TORCH_ERRORS as error:
            raise refused(error, _not_added(vector, value)) from None


def _not_added(vector: Tensor, value: Any) -> str:
    return f"{trees.structure_of(vector)} cannot be added to {trees.structure_of(value)}"


def _dtype_of_sum(value: Tensor, vector: Tensor, scale: float) -> torch.dtype:
    """In which dtype to add up: one in which nothing is rounded before the end."""
    whole = isinstance(scale, int) and not vector.is_floating_point()
    if not (trees.has_fractions(value) or whole):
        raise TreeMismatch(f"{scale} × {trees.structure_of(vector)} would be rounded in {trees.structure_of(value)}")
    if (trees.is_complex(vector) or trees.is_complex(scale)) and not value.is_complex():
        there = trees.structure_of(value)
        raise TreeMismatch(f"{scale} × {trees.structure_of(vector)} has an imaginary part, {there} has none")
    return torch.promote_types(value.dtype, torch.float32) if trees.has_fractions(value) else value.dtype


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
        raise TreeMismatch(f"splice(model, where, module) takes a module or a function, not {type(module).__name__}")
    return lambda value: _spliced(value, module, error)


def _spliced(value: Any, module: Callable[[Tensor], Any], error: bool) -> Tensor:
    if not isinstance(value, Tensor):
        raise TreeMismatch(f"{trees.structure_of(value)} is no tensor that could go through a module")
    new = _taken(module, value)
    if (
        not isinstance(new, Tensor)
        or new.shape != value.shape
        or trees.has_fractions(new) != trees.has_fractions(value)
    ):
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
    """What `module` makes of `value`: that goes in in the dtype of parameters or buffers, and comes back in its own."""
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), value.dtype)
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
