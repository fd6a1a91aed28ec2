"""A sequence of functions that is a function: `Hooks`, and the kinds that act only sometimes, or wrap what they get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nicehooks.compat.transformer_debugger.gradient_hooks import GradientHook, grad_hook_wrapper
from nicehooks.errors import HooksMisuse, UnsupportedModule

if TYPE_CHECKING:
    from typing_extensions import Self


class HookNode:
    """What `Hooks` and collections of them have in common: keywords can be bound to them, and they show as a tree."""

    def bind(self, **kwargs: Any) -> Self:
        """Gives every hook below `kwargs`, in each call from now on. All of them, or in case of an error none."""
        nodes = self.every_list()
        for hooks in nodes:
            hooks.check_unbound(kwargs)
        for hooks in nodes:
            hooks.bound_kwargs.update(kwargs)
        return self

    def unbind(self, keys: Iterable[str]) -> Self:
        """Undoes `bind` for the keywords `keys`."""
        keys = [keys] if isinstance(keys, str) else list(keys)
        nodes = self.every_list()
        for hooks in nodes:
            hooks.check_bound(keys)
        for hooks in nodes:
            for key in keys:
                del hooks.bound_kwargs[key]
        return self

    def is_empty(self) -> bool:
        """Whether nothing has been appended."""
        raise NotImplementedError  # abstract

    def append_all(self, hook: Callable[..., Any]) -> Self:
        """Appends `hook` to every list of hooks below that can have any."""
        raise NotImplementedError  # abstract

    def every_list(self) -> list[Hooks]:
        """Every list of hooks below, once each: one list may hang in several places."""
        raise NotImplementedError  # abstract

    def __repr__(self, indent: int = 0, name: str | None = None) -> str:
        raise NotImplementedError  # abstract


class Hooks(HookNode):
    """Functions that a value goes through, one after the other.

    >>> hooks = Hooks().append(lambda x: x + 1).append(lambda x: x * 10)
    >>> hooks(2)
    30
    >>> hooks = Hooks().append(lambda x, layer: x + layer).bind(layer=3)
    >>> hooks(2)
    5

    A hook is called as `hook(x, …)` with the arguments of the call and the keywords that are bound, and returns the new
    value, or None to leave the old one.

    Attributes:
        bound_kwargs: the keywords that every hook is given.
        refusal: why nothing can be appended; None where it can.
    """

    def __init__(self) -> None:
        self._hooks: list[Callable[..., Any]] = []
        self.bound_kwargs: dict[str, Any] = {}
        self.refusal: str | None = None

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What `x` has become after the last hook."""
        kwargs = self._all_keywords(kwargs)
        for hook in self._hooks:
            new = hook(x, *args, **kwargs)
            x = x if new is None else new
        return x

    def append(self, hook: Callable[..., Any]) -> Self:
        """Adds `hook` behind those that are there. Returns the hooks, as every method here does."""
        if self.refusal is not None:
            raise UnsupportedModule(self.refusal)
        if not callable(hook):
            raise TypeError(f"{self.name}.append(hook) takes a function of the value, not {type(hook).__name__}")
        self._hooks.append(self._made_of(hook))
        return self

    def append_all(self, hook: Callable[..., Any]) -> Self:
        """As `append`, but passes over what can have no hooks."""
        return self if self.refusal is not None else self.append(hook)

    def is_empty(self) -> bool:
        """Whether nothing has been appended."""
        return not self._hooks

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """What is called, in its order."""
        return iter(self._hooks)

    @property
    def name(self) -> str:
        """How the hooks are called where they are shown."""
        return type(self).__name__

    def check_unbound(self, keys: Iterable[str]) -> None:
        """Raises if one of `keys` is bound already."""
        for key in keys:
            if key in self.bound_kwargs:
                raise HooksMisuse(BOUND_ALREADY.format(key=key, value=self.bound_kwargs[key], name=self.name))

    def check_bound(self, keys: Iterable[str]) -> None:
        """Raises unless all of `keys` are bound."""
        for key in keys:
            if key not in self.bound_kwargs:
                have = ", ".join(self.bound_kwargs) or "none"
                raise HooksMisuse(f"{key!r} is not bound to {self.name}; the keywords that are: {have}.")

    def __repr__(self, indent: int = 0, name: str | None = None) -> str:
        """The hooks as a tree; `indent` and `name` are for the trees that these hooks hang in."""
        bound = f" {self.bound_kwargs}" if self.bound_kwargs else ""
        lines = [f"{' ' * indent}{self.name if name is None else name}{bound}"]
        for hook in self._hooks:
            nested = isinstance(hook, HookNode)
            lines.append(hook.__repr__(indent + 4) if nested else f"{' ' * (indent + 4)}{hook!r}")
        return "\n".join(lines)

    def every_list(self) -> list[Hooks]:
        return [self]

    def _made_of(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """What is called in the place of `hook`."""
        return hook

    def _all_keywords(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call with those that are bound."""
        if not self.bound_kwargs:
            return kwargs
        self.check_unbound(kwargs)
        return {**kwargs, **self.bound_kwargs}


BOUND_ALREADY = (
    "keyword {key!r} is bound to {name} already, as {value!r}.\n"
    "  To bind another value, take it away first:  .unbind([{key!r}]).bind({key}=…)\n"
    "  hooks.on(model) says layer= by itself: nothing has to be bound for it."
)


class WrapperHooks(Hooks):
    """Hooks that are wrapped when they are appended.

    >>> twice = WrapperHooks(lambda hook: lambda x: hook(hook(x)))
    >>> twice.append(lambda x: x + 1)(0)
    2

    Args:
        wrapper: makes what is called out of what is appended.
    """

    def __init__(self, wrapper: Callable[..., Callable[..., Any]]) -> None:
        super().__init__()
        if not callable(wrapper):
            raise TypeError(f"WrapperHooks(wrapper) takes a function of a hook, not {type(wrapper).__name__}")
        self.wrapper = wrapper

    def _made_of(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = self.wrapper(hook)
        if not callable(wrapped):
            raise TypeError(f"the wrapper of {self.name} made {type(wrapped).__name__} of a hook, not a function")
        return wrapped


class ConditionalHooks(Hooks):
    """Hooks that act where a condition holds, and leave the value as it is elsewhere.

    >>> positive = ConditionalHooks(lambda x: x > 0).append(lambda x: x * 10)
    >>> positive(2), positive(-2)
    (20, -2)

    Args:
        condition: is called as a hook is, with the value, the arguments and the bound keywords.
    """

    def __init__(self, condition: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(condition):
            raise TypeError(f"ConditionalHooks(condition) takes a function, not {type(condition).__name__}")
        self.condition = condition

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What `x` has become; `x` itself where the condition does not hold."""
        if not self.condition(x, *args, **self._all_keywords(kwargs)):
            return x
        return super().__call__(x, *args, **kwargs)


class AtLayers(ConditionalHooks):
    """Hooks that act in some layers only.

    >>> hooks = AtLayers([0, 3]).append(lambda x, layer: x * 10)
    >>> hooks(2, layer=3), hooks(2, layer=4)
    (20, 2)

    Args:
        at_layers: the number of a layer, or several. A call says which layer it is in with the keyword `layer`.
    """

    def __init__(self, at_layers: int | Iterable[int]) -> None:
        self.at_layers = [at_layers] if isinstance(at_layers, int) else list(at_layers)
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in self.at_layers):
            raise TypeError(f"AtLayers(layers) takes the numbers of layers, not {at_layers!r}")
        super().__init__(_IsAt(self.at_layers))

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.at_layers})"

    def check_layers(self, place: str, n_layers: int) -> None:
        """Raises if a layer is meant that a model with `n_layers` does not have: the hooks would never act there."""
        missing = [layer for layer in self.at_layers if not 0 <= layer < n_layers]
        if missing:
            shown = ", ".join(map(str, missing))
            raise HooksMisuse(
                NO_SUCH_LAYER.format(name=self.name, place=place, n=n_layers, last=n_layers - 1, no=shown)
            )


class _IsAt:
    """Whether a call is in one of some layers; a class, because a function made in another one cannot be pickled."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _IsAt) and self.layers == other.layers

    def __hash__(self) -> int:
        return hash(tuple(self.layers))

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        if "layer" not in kwargs:
            raise HooksMisuse(WITHOUT_LAYER.format(layers=self.layers))
        return kwargs["layer"] in self.layers


WITHOUT_LAYER = (
    "AtLayers({layers}) was called without layer=, so it cannot know where it is.\n"
    "  In a tree, append it to a place that every layer has: embedding, final norm and logits are in none.\n"
    "  By hand, say it: hooks(x, layer=3), or hooks.bind(layer=3)."
)


NO_SUCH_LAYER = (
    "{name} at {place!r}: the model has {n} layers, 0 … {last}, and no layer {no}: the hooks would never act there.\n"
    "  Layers count from the first, 0; the last is AtLayers({last})."
)


def hooks_below(hook: object) -> Iterator[Hooks]:
    """The lists of hooks at and below `hook`, also where one is a hook in another, as far as they show."""
    if isinstance(hook, Hooks):
        yield hook
        for inner in hook:
            yield from hooks_below(inner)
    elif isinstance(hook, HookNode):
        for hooks in hook.every_list():
            yield from hooks_below(hooks)
    elif isinstance(hook, GradientHook):
        yield from hooks_below(hook.hook)


def gradient_hooks() -> WrapperHooks:
    """A list for hooks on the gradient."""
    return WrapperHooks(grad_hook_wrapper)
