"""Registering hooks on a model by path: PyTorch's four kinds of hooks, told the path that they act at.

NOTE [Where a registered hook acts]
As in PyTorch, a call registers at once, in every thread and task, until the handle is removed. `with` on the handle
says when that is, and nothing about threads: it removes the hook at the end. What should act in one thread alone is for
`run`, or is an `edit`. A hook on gradients that was removed is gone, and does not act in a backward that comes later;
PyTorch's own would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nicehooks.compat.nice_hooks.backward_hooks import FullBackwardHook, FullBackwardPreHook
from nicehooks.compat.nice_hooks.forward_hooks import ForwardHook, ForwardPreHook, HookAction
from nicehooks.contexts.intervention import Intervention
from nicehooks.contexts.user_functions import show_where
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site, Where
from nicehooks.core.sessions import Session
from nicehooks.core.when import When


class Hooked(Intervention):
    """A context in which hooks act.

    Args:
        model: any module.
        where: a path, a site, … (see `select`).
        action: the hook, as an action.
    """

    def __init__(self, model: nn.Module, where: Where, action: HookAction) -> None:
        self.verb = action.verb
        super().__init__(model)
        if not callable(action.hook):
            raise TypeError(NO_HOOK.format(verb=self.verb, kind=type(action.hook).__name__))
        self.where = where
        self._action = action

    def __repr__(self) -> str:
        return f"{self.verb}(model, {show_where(self.where)}, …)"

    def _actions(self) -> list[tuple[Where, Action]]:
        return [(self.where, self._action)]

    def _rules(self, site: Site, action: Action) -> Pairs:
        return self._action.rules(site, When(None, None, site.path.call))


NO_HOOK = "{verb}(model, path, hook) takes a function as hook, not {kind}"


class RemovableHandleCollection(Hooked):
    """A registered hook; see NOTE [Where a registered hook acts]. `remove` ends it, and so does the end of a `with`.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import RemovableHandleCollection, register_forward_hook
    >>> model, seen = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), []
    >>> handle = register_forward_hook(model, "*", lambda module, path, args, output: seen.append(str(path)))
    >>> isinstance(handle, RemovableHandleCollection), len(handle.handles)
    (True, 2)
    >>> handle.handles[0].remove()
    >>> _ = model(torch.ones(5, 4)), handle.remove()
    >>> seen
    ['1']
    """

    def __init__(self, model: nn.Module, where: Where, action: HookAction, prepend: bool = False) -> None:
        super().__init__(model, where, action)
        self.first = prepend

    def __enter__(self) -> RemovableHandleCollection:
        return self.attach()

    @property
    def handles(self) -> list[ModuleHandle]:
        """One handle for each module that the hook acts at: its `remove` takes the hook off this module alone."""
        modules = dict.fromkeys([rule.site.key[0] for group in self._groups() for rule in group])
        return [ModuleHandle(self, module) for module in modules]

    def _groups(self) -> list[list[SiteRule]]:
        return [] if self._plan is None else [group.rules for group in self._plan.groups]

    def drop(self, module: int) -> None:
        """Takes the hook off the module with this `id`; with the last one, the handle is over."""
        removed = self._action.removed
        removed.add(module)
        if all([rule.site.key[0] in removed for group in self._groups() for rule in group]):
            self.remove()

    def _was_reached(self, session: Session, rule: SiteRule) -> bool:
        return rule.site.key[0] in self._action.removed or super()._was_reached(session, rule)


class ModuleHandle:
    """A registered hook at one of the modules that its path has selected."""

    def __init__(self, of: RemovableHandleCollection, module: int) -> None:
        self._of = of
        self._module = module

    def remove(self) -> None:
        """Takes the hook off this module; once removed, does nothing."""
        self._of.drop(self._module)


def register_forward_hook(
    model: nn.Module, path: Where, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
) -> RemovableHandleCollection:
    """Calls `hook(module, path, args, output)` after each selected module, as `nn.Module.register_forward_hook`.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> def show(module, path, args, output):
    ...     print(path, type(module).__name__, tuple(args[0].shape), tuple(output.shape))
    >>> with register_forward_hook(model, "*", show):
    ...     _ = model(torch.ones(5, 4))
    0 Linear (5, 4) (5, 3)
    1 ReLU (5, 3) (5, 3)
    >>> with register_forward_hook(model, "0[:, 0]", lambda module, path, args, output: output * 0):
    ...     model(torch.ones(5, 4))[:, 0].sum().item()
    0.0

    The hook acts in every thread until the handle is removed: by `.remove()`, or at the end of a `with`. It acts under
    `torch.func` transforms and in compiled code, too.

    Args:
        model: any module.
        path: where (see `select`). With a subscript the hook is given this part of the output, and what it returns
            takes the place of this part alone; `[*]` calls it once for each index.
        hook: returns what takes the place of the output, or None. `path` is the `ModulePath` of the one site.
        prepend: calls it before what acts on these modules already.
        with_kwargs: calls `hook(module, path, args, kwargs, output)`.

    Raises:
        SiteNotFound: `path` selects nothing.
        SiteNotReached: at the end of a `with`: a site was selected, but the forward did not come by.
    """
    return RemovableHandleCollection(model, path, ForwardHook(hook, with_kwargs), prepend).attach()


def register_forward_pre_hook(
    model: nn.Module, path: Where, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
) -> RemovableHandleCollection:
    """Calls `hook(module, path, args)` before each selected module, as `nn.Module.register_forward_pre_hook`.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with register_forward_pre_hook(model, "1", lambda module, path, args: args[0] * 0 + 2):
    ...     model(torch.ones(5, 4)).unique().tolist()
    [2.0]

    Args:
        model: any module.
        path: where (see `select`). With a subscript the hook is given this part of the first argument as its only one:
            `mod[:, 0]` is what `mod@input[0][:, 0]` is to an `edit`.
        hook: returns what takes the place of `args`, a tuple, or a single value for a tuple of one; or None.
        prepend: as for `register_forward_hook`.
        with_kwargs: calls `hook(module, path, args, kwargs)`, which returns `(args, kwargs)` or None.

    Raises:
        SiteNotFound: `path` selects nothing.
        UnsupportedModule: `with_kwargs` with a subscript.
    """
    return RemovableHandleCollection(model, path, ForwardPreHook(hook, with_kwargs), prepend).attach()


def register_full_backward_hook(
    model: nn.Module, path: Where, hook: Callable[..., Any], *, prepend: bool = False
) -> RemovableHandleCollection:
    """Calls `hook(module, path, grad_input, grad_output)` in backward, as `nn.Module.register_full_backward_hook`.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    >>> def double(module, path, grad_input, grad_output):
    ...     return (grad_input[0] * 2,)
    >>> x = torch.ones(5, 4, requires_grad=True)
    >>> (clean,) = torch.autograd.grad(model(x).sum(), x)
    >>> with register_full_backward_hook(model, "0", double):
    ...     (doubled,) = torch.autograd.grad(model(x).sum(), x)
    >>> torch.equal(doubled, 2 * clean)
    True

    It acts in any backward: plain, of `torch.func.grad`, and mapped by `vmap`, where it sees one example.

    Args:
        model: any module.
        path: where (see `select`). With a subscript the hook is given this part of the gradient of the first argument.
        hook: returns what takes the place of `grad_input`, or None. `grad_input` has an entry for each argument that
            was passed by position, `grad_output` one for each element of the output (one, if that is a tensor).
        prepend: as for `register_forward_hook`.

    Raises:
        SiteNotFound: `path` selects nothing.
        SiteNotReached: at the end of a `with`: no gradient came by.
    """
    return RemovableHandleCollection(model, path, FullBackwardHook(hook), prepend).attach()


def register_full_backward_pre_hook(
    model: nn.Module, path: Where, hook: Callable[..., Any], *, prepend: bool = False
) -> RemovableHandleCollection:
    """Calls `hook(module, path, grad_output)` in backward, as `nn.Module.register_full_backward_pre_hook`.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    >>> with register_full_backward_pre_hook(model, "0", lambda module, path, grad_output: grad_output[0] * 0):
    ...     model(torch.ones(5, 4)).sum().backward()
    >>> model[0].bias.grad
    tensor([0., 0., 0.])

    Args:
        model: any module.
        path: where (see `select`). With a subscript the hook is given the gradient of this part of the output.
        hook: returns what takes the place of `grad_output`, or None.
        prepend: as for `register_forward_hook`.

    Raises:
        SiteNotFound: `path` selects nothing.
        SiteNotReached: at the end of a `with`: no gradient came by.
    """
    return RemovableHandleCollection(model, path, FullBackwardPreHook(hook), prepend).attach()
