"""Hooks on gradients as hooks on values: what `grad_hook_wrapper` makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import TreeMismatch
from nicehooks.ports.gradient_lines import made_differentiable, may_have_gradient, with_gradient_hook
from nicehooks.values import trees


class GradientScope:
    """Which gradients were asked for in one entry of a context, and which came.

    Attributes:
        over: whether the context was left; from then on the hooks do nothing.
        asked: the names of the places where a gradient hook was set.
        came: the names of those where a gradient came by.
    """

    def __init__(self) -> None:
        self.over = False
        self.asked: set[str] = set()
        self.came: set[str] = set()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Gradient hooks that are set inside belong to this entry, and to `place`."""
        token = _place.set((self, place))
        try:
            yield
        finally:
            _place.reset(token)


_place: ContextVar[tuple[GradientScope, str] | None] = ContextVar("nicehooks.gradient_hooks", default=None)


class GradientHook:
    """A hook on a value whose work is a hook on its gradient; see `grad_hook_wrapper`."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        if not callable(hook):
            raise TypeError(f"grad_hook_wrapper(hook) takes a function of a gradient, not {type(hook).__name__}")
        self.hook = hook

    def __repr__(self) -> str:
        return f"grad_hook_wrapper({self.hook!r})"

    def __call__(self, act: Any, *args: Any, **kwargs: Any) -> Any:
        """The value itself, with the hook on its gradient; `args` and `kwargs` go to the hook."""
        if not isinstance(act, Tensor):
            raise TreeMismatch(f"{trees.structure_of(act)} has no gradient that a hook could see")
        place = None if torch.compiler.is_compiling() else _place.get()
        if place is not None:
            place[0].asked.add(place[1])
        if not may_have_gradient(act):
            return act
        return with_gradient_hook(made_differentiable(act), partial(self._on_gradient, place, args, kwargs))

    def _on_gradient(
        self, place: tuple[GradientScope, str] | None, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor
    ) -> Tensor:
        if place is not None:
            if place[0].over:
                return gradient
            place[0].came.add(place[1])
        new = self.hook(gradient, *args, **kwargs)
        return gradient if new is None else trees.assign(gradient, new)


def grad_hook_wrapper(grad_hook: Callable[..., Any]) -> GradientHook:
    """Makes a hook on a value out of a hook on its gradient.

    >>> import torch
    >>> x = torch.ones(3, requires_grad=True)
    >>> doubled = grad_hook_wrapper(lambda gradient: gradient * 2)
    >>> (doubled(x) * 5).sum().backward()
    >>> x.grad
    tensor([10., 10., 10.])

    The value passes as it is. When backward comes by, `grad_hook(gradient)` returns what flows on instead, or None to
    leave it. It works under `torch.func.grad`, `vmap` in any order, and in double backward. A value that nothing has
    made differentiable (frozen parameters) is made so, as by the port `@grad`. In a context (`hooks.on(model)`) it acts
    until the context is left: backward belongs inside.

    Args:
        grad_hook: `grad_hook(gradient)`; it is also given the further arguments of the call, as `layer=3`.
    """
    return GradientHook(grad_hook)
