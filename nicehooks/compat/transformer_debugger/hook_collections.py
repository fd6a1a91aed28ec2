"""Trees of hooks: places with names, each with hooks on its value and on its gradient."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from nicehooks.compat.transformer_debugger.hook_lists import HookNode, Hooks, gradient_hooks
from nicehooks.errors import HooksMisuse, NoSuchHooks

if TYPE_CHECKING:
    from typing_extensions import Self


class HookCollection(HookNode):
    """Hooks by name, and collections of them: a tree.

    >>> tree = HookCollection().add_subhooks("inner", HookCollection().add_subhooks("leaf", Hooks()))
    >>> tree.inner.leaf.append(abs).append(float).bound_kwargs
    {}
    >>> tree.append_to_path("inner.leaf", round)
    HookCollection
        inner
            inner.leaf
                <built-in function abs>
                <class 'float'>
                <built-in function round>
    >>> tree.inner.leaf(-2.4)
    2

    Attributes:
        all_hooks: what hangs directly below, by name.
    """

    def __init__(self) -> None:
        self.all_hooks: OrderedDict[str | int, HookNode] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        below = self.__dict__.get("all_hooks")  # not there yet in a copy or an unpickled tree that is being made
        if below is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        if name in below:
            return below[name]
        raise NoSuchHooks(self._unknown(name))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in self.all_hooks if isinstance(name, str))]

    def add_subhooks(self, name: str | int, subhooks: HookNode) -> Self:
        """Hangs `subhooks` into the tree as `name`, in the place of what may be there.

        >>> layers = HookCollection().add_subhooks(0, Hooks()).add_subhooks(1, Hooks())
        >>> layers.append_to_path("1", abs).all_hooks[1](-2)
        2
        """
        if not isinstance(subhooks, HookNode):
            raise TypeError(f"add_subhooks(name, hooks) takes Hooks or a HookCollection, not {type(subhooks).__name__}")
        if isinstance(name, str) and not self._is_free(name):
            raise HooksMisuse(f"{name!r} cannot be a place in a {type(self).__name__}: it is not read as an attribute.")
        self.all_hooks[name] = subhooks
        return self

    def _is_free(self, name: str) -> bool:
        """Whether `name`, read as an attribute, would be what hangs there."""
        return name.isidentifier() and not hasattr(type(self), name) and name not in vars(self)

    def append_all(self, hook: Callable[..., Any]) -> Self:
        """Appends `hook` to every list of hooks in the tree that can have any, those on gradients included."""
        for hooks in self.all_hooks.values():
            hooks.append_all(hook)
        return self

    def append_to_path(self, hook_location_name: str, hook: Callable[..., Any]) -> Self:
        """Appends `hook` at a place in the tree.

        >>> tree = ResidualStreamHooks().append_to_path("torso.post_mlp.fwd", abs)
        >>> tree.torso.post_mlp(-3)
        3

        Args:
            hook_location_name: names with dots between them, which lead to a list of hooks.
            hook: what is appended.

        Raises:
            NoSuchHooks: a name is not in the tree, or the names lead to no list of hooks.
        """
        node = self.at(hook_location_name)
        if not isinstance(node, Hooks):
            ends = [f"{hook_location_name}.{name}" for name, _ in _lists_in(node)]
            raise NoSuchHooks(NO_LIST.format(path=hook_location_name, kind=type(node).__name__, end=ends[0], all=ends))
        node.append(hook)
        return self

    def at(self, path: str) -> HookNode:
        """What hangs at `path`, names with dots between them."""
        node: HookNode = self
        for name in path.split("."):
            if not isinstance(node, HookCollection):
                raise NoSuchHooks(f"there is nothing below {path.rpartition('.')[0]!r}, which is a list of hooks.")
            node = node._below(name, path)
        return node

    def _below(self, name: str, path: str) -> HookNode:
        """What hangs directly below as `name`, a number or not."""
        for own, hooks in self.all_hooks.items():
            if str(own) == name:
                return hooks
        raise NoSuchHooks(self._unknown(name, path))

    def is_empty(self) -> bool:
        """Whether there is no hook anywhere in the tree."""
        return all(hooks.is_empty() for hooks in self.all_hooks.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Goes by the attributes: a subclass may take any arguments."""
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(deepcopy(self.__dict__, memo))
        return new

    def __repr__(self, indent: int = 0, name: str | None = None) -> str:
        """The tree; `indent` and `name` are for the trees that it hangs in."""
        prefix = "" if name is None else f"{name}."
        below = [hooks.__repr__(indent + 4, f"{prefix}{own}") for own, hooks in self.all_hooks.items()]
        return "\n".join([f"{' ' * indent}{type(self).__name__ if name is None else name}", *below])

    def every_list(self) -> list[Hooks]:
        return list({id(hooks): hooks for _, hooks in _lists_in(self)}.values())

    def _unknown(self, name: str, path: str = "") -> str:
        names = [str(own) for own in self.all_hooks]
        near = difflib.get_close_matches(name, names, n=1)
        text = f"{type(self).__name__} has no {name!r}{f' (in {path!r})' if path not in ('', name) else ''}"
        text += f"; it has: {', '.join(names) or 'nothing'}."
        return f"{text} Did you mean {near[0]!r}?" if near else text


NO_LIST = (
    "{path!r} is a {kind}, not a list of hooks. Say to which one, of {all}:\n"
    "    hooks.append_to_path({path!r}, hook)  # incorrect\n"
    "    hooks.append_to_path({end!r}, hook)  # correct"
)


def _lists_in(node: HookNode) -> Iterator[tuple[str, Hooks]]:
    """Every list of hooks at or below `node`, with the path that leads to it."""
    if isinstance(node, Hooks):
        yield "", node
    elif isinstance(node, HookCollection):
        for name, child in node.all_hooks.items():
            for rest, hooks in _lists_in(child):
                yield f"{name}.{rest}" if rest else str(name), hooks


class FwdBwdHooks(HookCollection):
    """A place in a model: hooks on its value (`fwd`), on its gradient (`bwd`), and on its value again (`fwd2`).

    >>> import torch
    >>> place = FwdBwdHooks().append_fwd(lambda x: x * 2).append_bwd(lambda gradient: gradient + 1)
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = place(x)
    >>> (y * 3).sum().backward()
    >>> y.tolist(), x.grad.tolist()  # (3 + 1) · 2
    ([2.0, 2.0], [8.0, 8.0])

    The gradient is that of the value after `fwd` and before `fwd2`. For the gradient of a value in between, append
    `grad_hook_wrapper(hook)` to `fwd` where you want it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_subhooks("fwd", Hooks())
        self.add_subhooks("bwd", gradient_hooks())
        self.add_subhooks("fwd2", Hooks())

    def append_fwd(self, fwd_hook: Callable[..., Any]) -> Self:
        """Appends a hook on the value."""
        self.fwd.append(fwd_hook)
        return self

    def append_bwd(self, bwd_hook: Callable[..., Any]) -> Self:
        """Appends a hook on the gradient of the value that all of `fwd` have made."""
        self.bwd.append(bwd_hook)
        return self

    def append_fwd2(self, fwd2_hook: Callable[..., Any]) -> Self:
        """Appends a hook on the value, whose work the gradient hooks do not see the gradient of."""
        self.fwd2.append(fwd2_hook)
        return self

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What `x` has become after `fwd`, `bwd` and `fwd2`."""
        for hooks in (self.fwd, self.bwd, self.fwd2):
            x = hooks(x, *args, **kwargs)
        return x


class MLPHooks(HookCollection):
    """The places in an MLP: before and after its nonlinearity.

    >>> list(MLPHooks().all_hooks)
    ['pre_act', 'post_act']
    """

    def __init__(self) -> None:
        super().__init__()
        _add_places(self, "pre_act", "post_act")


class NormalizationHooks(HookCollection):
    """The places in a normalization: `x - mean`, the scale `sqrt(var + eps)`, and their ratio, before the weights.

    >>> list(NormalizationHooks().all_hooks)
    ['post_mean_subtraction', 'scale', 'post_scale']
    """

    def __init__(self) -> None:
        super().__init__()
        _add_places(self, "post_mean_subtraction", "scale", "post_scale")


class AttentionHooks(HookCollection):
    """The places in attention; `v_out` is what each head has gathered, before the output projection.

    >>> list(AttentionHooks().all_hooks)
    ['q', 'k', 'v', 'qk_logits', 'qk_softmax_denominator', 'qk_probs', 'v_out']
    """

    def __init__(self) -> None:
        super().__init__()
        _add_places(self, "q", "k", "v", "qk_logits", "qk_softmax_denominator", "qk_probs", "v_out")


class ResidualStreamTorsoHooks(HookCollection):
    """The places in the residual stream of each layer, and on the ways out of it and back.

    >>> list(ResidualStreamTorsoHooks().all_hooks)[:4]
    ['post_ln_attn', 'ln_attn', 'delta_attn', 'post_attn']
    """

    def __init__(self) -> None:
        super().__init__()
        _add_places(self, "post_ln_attn")  # in transformer-debugger's order, which is not the same in both halves
        self.add_subhooks("ln_attn", NormalizationHooks())
        _add_places(self, "delta_attn", "post_attn")
        self.add_subhooks("ln_mlp", NormalizationHooks())
        _add_places(self, "post_ln_mlp", "delta_mlp", "post_mlp")


class ResidualStreamHooks(HookCollection):
    """The places in the residual stream: after the embedding, in each layer (`torso`), and at the final norm.

    >>> list(ResidualStreamHooks().all_hooks)
    ['post_emb', 'torso', 'ln_f', 'post_ln_f']
    """

    def __init__(self) -> None:
        super().__init__()
        _add_places(self, "post_emb")
        self.add_subhooks("torso", ResidualStreamTorsoHooks())
        self.add_subhooks("ln_f", NormalizationHooks())
        _add_places(self, "post_ln_f")


def _add_places(tree: HookCollection, *names: str) -> None:
    for name in names:
        tree.add_subhooks(name, FwdBwdHooks())
