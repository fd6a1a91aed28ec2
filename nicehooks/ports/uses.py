"""The port `@weight.uses()`: the results of the operations that a parameter enters in its module's own forward.

NOTE [What a use is]
A use is a call of a torch function, in the own forward of the module that owns the parameter, with the parameter among
its arguments, alone or in lists. Its value is what the call returns. Calls that return no tensor (`.shape`, `.dim()`)
are none, and calls that give the parameter back as it is (`.to()` of its own dtype) hand it on to the next. A view
(`.T`, `[0]`) is the result of an operation like any other.

The parameter is known by its owner and its name, at the moment of the call. So `functional_call`, a patched parameter,
and a transform's own stand-ins are found, and a tensor that two modules share is told apart by whose forward runs.

A parametrized tensor is computed anew each time the forward reads it: there, what was computed is the parameter.

What a `ParameterList` or a `ParameterDict` owns is used by the module around it, the first one that is called itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from nicehooks.core.calling import has_forward
from nicehooks.core.census import Census
from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Pairs, register_port
from nicehooks.core.rules import Action
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.paths.names import unescape
from nicehooks.paths.ports import Port, Words
from nicehooks.paths.subscripts import fault
from nicehooks.ports.calls import (
    GRAD_OF_CALL,
    STEPS,
    STEPS_OF_CALL,
    Call,
    CallRule,
    OtherForwardRule,
    forward_around,
    others_below,
)
from nicehooks.ports.gradients import NO_GRADIENT, ComesBack, watched_at
from nicehooks.ports.weights import OfParameter, escaped_word
from nicehooks.values import trees
from nicehooks.values.trees import Chain


class UseRule(CallRule):
    """The results of the operations that a parameter enters; see NOTE [What a use is]."""

    __slots__ = ("is_computed",)
    reason = (
        "its module was not called, or the parameter enters no torch function in that module's own forward (a child, "
        "or an autograd function of one's own, may take it)."
    )

    def __init__(self, site: Site, action: Action, when: When) -> None:
        super().__init__(site, action, when)
        self.is_computed = site.path.port.name in parametrizations_of(site.module)

    def is_about(self, frame: Frame, name: str, call: Call) -> bool:
        function, args, kwargs = call
        if isinstance(function, MethodType) or getattr(function, "__self__", None) is Tensor.grad:
            return False  # a method of the module, whose operations count, and not it; no function of the value
        return any([_holds((args, kwargs), tensor) for tensor in self.held(frame)])

    def held(self, frame: Frame) -> list[Any]:
        """What stands under the name of the parameter now."""
        if self.is_computed:
            return frame.watcher.computed.get(self, [])
        owner: Any = self.site.module
        owner = frame.module if owner is frame.tap.module() else owner
        name, parameters = self.path.port.name, owner._parameters
        return [parameters[name] if name in parameters else getattr(owner, name, None)]

    def methods(self, module: Any) -> list[str]:
        return []

    def on(self, frame: Frame, name: str, number: int, value: Any, chain: Chain | None = None) -> Any:
        no_tensor = not any([isinstance(leaf, Tensor) for leaf in trees.leaves(value)])
        if no_tensor or any([value is tensor for tensor in self.held(frame)]):
            return value
        counts = frame.watcher.counts
        counts[self] = counts.get(self, -1) + 1
        return self.on_use(frame, counts[self], value)

    def on_use(self, frame: Frame, number: int, value: Any) -> Any:
        """`value`, the result of use `number` in one run of the forward, after the action has been at it."""
        return super().on(frame, "", number, value)


class UseGradientRule(UseRule):
    """The gradients of what is differentiated with respect to these results."""

    __slots__ = ()
    companion = ComesBack
    reason = NO_GRADIENT

    def on_use(self, frame: Frame, number: int, value: Any) -> Any:
        key = self.key_of_call(frame, "", number)
        return value if key is None else watched_at(self, frame, key, value, self.chain, [])


class ComputedRule(Rule):
    """Tells a rule on the uses of a parametrized tensor what the tensor has just been computed to be."""

    __slots__ = ("use",)

    def __init__(self, use: UseRule) -> None:
        self.use = use

    def before(self, frame: Frame) -> None:
        around = forward_around(frame)
        if around is not None and around.watcher is not None:
            frame.enter(_Computed(around.watcher.computed.setdefault(self.use, []), frame))


class _Computed(AbstractContextManager[None]):
    def __init__(self, values: list[Any], frame: Frame) -> None:
        self.values = values
        self.frame = frame

    def __exit__(self, *_: object) -> None:
        self.values.append(self.frame.value)


def _holds(values: Any, tensor: Tensor | None) -> bool:
    """Whether `tensor` itself is among `values`, or in a list of theirs."""
    if isinstance(values, list | tuple):
        return any([_holds(value, tensor) for value in values])
    if isinstance(values, dict):
        return any([_holds(value, tensor) for value in values.values()])
    return tensor is not None and values is tensor


def parametrizations_of(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute the parametrized tensors of `module`."""
    found: Any = getattr(module, "parametrizations", None)
    return dict(found.items()) if isinstance(found, nn.ModuleDict) else {}


def users_of(owner: nn.Module, root: nn.Module) -> Iterator[nn.Module]:
    """The modules below `root` in whose own forward the parameters of `owner` are used."""
    if has_forward(owner):
        yield owner
        return
    for module in Census(root).names.values():
        if has_forward(module) and any(below is owner for below in _containers(module)):
            yield module


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """The containers in `module` that are never called themselves, and those in them."""
    for child in module.children():
        if not has_forward(child):
            yield child
            yield from _containers(child)


class UsePort(OfParameter):
    """`@weight.uses()`: the results of the operations that a parameter enters."""

    kind = "use"
    rank = 2
    shown = ""
    rule: type[UseRule] = UseRule

    def read(self, words: Words) -> Port | None:
        if not words.name.endswith(USES):
            return None
        if not words.has_brackets:
            raise fault(words.text, words.end, BRACKETS_OF_USES)
        part, grad = words.part.removesuffix("grad").removesuffix("."), words.part.endswith("grad")
        if part in STEPS:
            raise fault(words.text, words.part_at, STEPS_OF_CALL)
        if part and grad:
            raise fault(words.text, words.end - len("grad"), GRAD_OF_CALL)
        if part:
            raise fault(words.text, words.part_at - 1, INPUT_OF_USES)
        return Port("use.grad" if grad else "use", unescape(words.name.removesuffix(USES)), words.call)

    def written(self, port: Port) -> str:
        number = "" if port.call is None else f"#{port.call}"
        return f"@{escaped_word(port.name)}{USES}{number}(){'.grad' if port.is_gradient else ''}"

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        owner = site.module
        users = list(dict.fromkeys(users_of(owner, root)))
        if not users:
            raise UnsupportedModule(NO_USER.format(site=str(site), kind=type(owner).__name__))
        others = dict.fromkeys([other for user in users for other in others_below(user) if other not in users])
        rule = self.rule(site, action, when)
        computing = parametrizations_of(owner).get(site.path.port.name)
        return [
            *((user, rule) for user in users),
            *([] if computing is None else [(computing, ComputedRule(rule))]),
            *((other, OtherForwardRule()) for other in others),
        ]


class UseGradientPort(UsePort):
    """`@weight.uses().grad`: the gradients of what is differentiated with respect to these results."""

    kind = "use.grad"
    is_gradient = True
    rule = UseGradientRule

    def read(self, words: Words) -> Port | None:
        return None  # `UsePort` reads both


USES = ".uses"
"""What stands between the name of a parameter and the brackets."""
NO_USER = "{site!r}: no module that is ever called itself holds this {kind}."
BRACKETS_OF_USES = "the uses of a parameter are calls, with brackets: @weight.uses()"
INPUT_OF_USES = "the uses of a parameter are results, which have no input"

register_port(UsePort())
register_port(UseGradientPort())
