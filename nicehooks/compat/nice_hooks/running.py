"""`run`: one call of a model, with what to see and what to change in it as keyword arguments.

NOTE [Order in a run]
Patches are entered first, then hooks (before the forward, after it, before backward, in backward; each in the order of
its dict), and what captures activations last. So at each site a hook sees what a patch did, and the activations show
what hooks did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, TypeAlias, overload

from torch import nn

from nicehooks import torch_private
from nicehooks.caches.cache import ActivationCache
from nicehooks.compat.nice_hooks.backward_hooks import FullBackwardHook, FullBackwardPreHook
from nicehooks.compat.nice_hooks.forward_hooks import ForwardHook, ForwardPreHook, HookAction
from nicehooks.compat.nice_hooks.registering import Hooked
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.patching import patch
from nicehooks.contexts.user_functions import show_where
from nicehooks.core.children import unwrap
from nicehooks.core.selection import Where, select
from nicehooks.core.tap import signature_of
from nicehooks.errors import ContextMisuse, TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees

ActivationCacheLike: TypeAlias = ActivationCache | Mapping[Any, Any]
"""Values by path: an `ActivationCache`, or any mapping from paths (or sites) to values."""

HooksByPath: TypeAlias = Mapping[Any, Any]
"""Hooks by path: for each a function, or a list of them."""


@overload
def run(
    model: nn.Module,
    /,
    *args: Any,
    return_activations: Literal[False] | None = False,
    with_activations: ActivationCacheLike | None = None,
    forward_hooks: HooksByPath | None = None,
    forward_pre_hooks: HooksByPath | None = None,
    full_backward_hooks: HooksByPath | None = None,
    full_backward_pre_hooks: HooksByPath | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any: ...
@overload
def run(
    model: nn.Module,
    /,
    *args: Any,
    return_activations: Where,
    with_activations: ActivationCacheLike | None = None,
    forward_hooks: HooksByPath | None = None,
    forward_pre_hooks: HooksByPath | None = None,
    full_backward_hooks: HooksByPath | None = None,
    full_backward_pre_hooks: HooksByPath | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, ActivationCache]: ...
def run(
    model: nn.Module,
    /,
    *args: Any,
    return_activations: Where = False,
    with_activations: ActivationCacheLike | None = None,
    forward_hooks: HooksByPath | None = None,
    forward_pre_hooks: HooksByPath | None = None,
    full_backward_hooks: HooksByPath | None = None,
    full_backward_pre_hooks: HooksByPath | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Runs a model once: `model(*args, **kwargs)`, with activations seen and replaced and hooks called meanwhile.

    >>> import torch
    >>> from torch import nn
    >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(5, 4)
    >>> result, acts = run(model, x, return_activations=["0"], with_activations={"0[:, 0]": 7.0})
    >>> result[0, 0].item(), acts["0"].shape
    (7.0, torch.Size([5, 3]))
    >>> result = run(model, x, forward_hooks={"1": lambda module, path, args, output: output * 0})
    >>> result.any().item()
    False

    At each site patches act first, then hooks, and the activations show what both did. All of it acts in this call
    alone, and in this thread or task. Hooks on gradients act in the backward of what this call computed, whenever that
    runs.

    Args:
        model: any module.
        args, kwargs: what the model is called with.
        return_activations: True for all modules, or paths, sites, … (see `select`): then the result is
            `(result, activations)`. Here and below, None is what leaving the option out is.
        with_activations: values by path that take the place of the model's own, as for `patch`.
        forward_hooks: by path, a hook or a list of hooks, as for `register_forward_hook`.
        forward_pre_hooks: as for `register_forward_pre_hook`.
        full_backward_hooks: as for `register_full_backward_hook`.
        full_backward_pre_hooks: as for `register_full_backward_pre_hook`.
        model_kwargs: more keyword arguments for the model; the way for those that are called as an option here is.

    Raises:
        SiteNotFound: a path selects nothing; then the model does not run.
        SiteNotReached: a path selects a site that this call did not come by.
        TreeMismatch: a value does not fit its site.
        ContextMisuse: the model itself has a parameter of this name, so it is not clear whose the argument is.
    """
    hooks = {
        "forward_pre_hooks": forward_pre_hooks,
        "forward_hooks": forward_hooks,
        "full_backward_pre_hooks": full_backward_pre_hooks,
        "full_backward_hooks": full_backward_hooks,
    }
    options = {"with_activations": with_activations, **hooks, "model_kwargs": model_kwargs}
    return_activations = False if return_activations is None else return_activations
    given = {name: value for name, value in options.items() if value is not None}
    if given or return_activations is not False:
        _check(model, given, return_activations is not False)
    with ExitStack() as stack:
        if with_activations:
            stack.enter_context(patch(model, with_activations))
        for name, kind in HOOK_KINDS.items():
            for where, hook in _each(hooks[name] or {}):
                stack.enter_context(Hooked(model, where, kind(hook, outlives=True)))
        acts = None if return_activations is False else stack.enter_context(capture(model, return_activations))
        result = model(*args, **kwargs, **(model_kwargs or {}))
    return result if acts is None else (result, acts)


HOOK_KINDS: dict[str, Callable[..., HookAction]] = {
    "forward_pre_hooks": ForwardPreHook,
    "forward_hooks": ForwardHook,
    "full_backward_pre_hooks": FullBackwardPreHook,
    "full_backward_hooks": FullBackwardHook,
}


def _each(hooks: HooksByPath) -> Iterator[tuple[Where, Callable[..., Any]]]:
    for where, hook in hooks.items():
        for one in hook if isinstance(hook, list | tuple) else [hook]:
            yield where, one


def _check(model: nn.Module, given: Mapping[str, Any], capturing: bool) -> None:
    """Refuses what cannot be meant, before anything is entered."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"run(model, …) takes a torch.nn.Module as model, not {type(model).__name__}")
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"run(model, …, {name}=…) takes a dict {MEANT[name]}, not {type(value).__name__}")
    for name in HOOK_KINDS.keys() & given.keys():
        for where, hook in _each(given[name]):
            if not callable(hook):
                shown = f"{name}={{{show_where(where)}: …}}"
                raise TypeError(
                    f"run(model, …, {shown}) takes a function, or a list of them, not {type(hook).__name__}"
                )
    kind, sure = type(unwrap(model)), given.get("model_kwargs", {})
    names = () if torch_private.is_scripted(unwrap(model)) else _parameters_of_forward(kind)
    for name in [*given, *(["return_activations"] if capturing else [])]:
        if name in names and name not in sure:
            raise ContextMisuse(CLASH.format(name=name, kind=kind.__name__))


@torch_private.evaluated_while_tracing
def _parameters_of_forward(kind: Any) -> tuple[str, ...]:
    return tuple(signature_of(kind.forward).parameters)


MEANT = {
    "with_activations": "from paths to values",
    "model_kwargs": "from names to values",
    **dict.fromkeys(HOOK_KINDS, "from paths to hooks, or lists of hooks"),
}

CLASH = (
    "{name!r} is an option of run, and also a parameter of {kind}.forward.\n"
    "  For the model:  run(model, …, model_kwargs={{{name!r}: …}})\n"
    "  For nicehooks:  use the contexts, with capture(model, …), patch(model, …):"
)


def expand_module_path(model: nn.Module, path: Where, value: Any = None) -> list[tuple[ModulePath, nn.Module]]:
    """The single sites that `path` selects, each as its path and its module, in the order of the model's modules.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> [(str(path), type(module).__name__) for path, module in expand_module_path(model, "*[:, 0]")]
    [('0[:, 0]', 'Linear'), ('1[:, 0]', 'ReLU')]
    >>> [str(path) for path, _ in expand_module_path(model, "0[*]", torch.ones(2, 3))]
    ['0[0]', '0[1]']

    Args:
        model: any module.
        path: a path, or whatever selects sites (see `select`).
        value: what the selected modules return, for example: then there is a path for each index that a `[*]` stands
            for. An `ActivationCache`, or a dict that has the path of a module as a key, has a value for each module.

    Raises:
        SiteNotFound: `path` selects nothing, or `value` has no value for a module.
        TreeMismatch: `value` has no such index.
    """
    found = [(site.path, site.module) for site in select(model, path)]
    if value is None:
        return found
    return [(one, module) for each, module in found for one in _expanded(each, value)]


def _expanded(path: ModulePath, value: Any) -> Iterator[ModulePath]:
    if not path.has_stars:
        yield path
        return
    whole = replace(path, chain=())
    by_path = isinstance(value, ActivationCache) or (isinstance(value, Mapping) and str(whole) in value)
    example = ActivationCache(value)[whole] if by_path else value
    try:
        for chain in trees.each_index(example, path.chain):
            yield replace(path, chain=chain)
    except TreeMismatch as error:
        raise TreeMismatch(f"expand_module_path at {str(path)!r}: {error}.") from None
