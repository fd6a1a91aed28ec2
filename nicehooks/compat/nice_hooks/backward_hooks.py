"""Hooks on the gradients of a module: of what comes out of it, and of what goes into it.

They are called as PyTorch calls its own: once for each call of the module, with the gradients of all tensors at once.
`grad_output` has an entry for each element of the output (one, if that is a tensor), `grad_input` one for each argument
that was passed by position; an entry is None where there is no gradient. See also NOTE [What a subscript means to a
hook] and NOTE [One line for each tensor].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private, torch_private_tensors
from nicehooks.compat.nice_hooks.forward_hooks import HookAction, on_argument
from nicehooks.core.frames import Frame
from nicehooks.core.rules import SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.errors import TreeMismatch, UnsupportedModule
from nicehooks.paths.grammar import ModulePath, with_chain
from nicehooks.paths.ports import Port
from nicehooks.ports.arguments import InputRule
from nicehooks.ports.gradient_lines import GradientLines, Gradients, made_differentiable, may_have_gradient
from nicehooks.ports.gradients import NO_GRADIENT, lines_of, own_use, used_by
from nicehooks.values import trees
from nicehooks.values.trees import Chain


class _Call:
    """What a hook is told of the call that its gradients belong to, and no value that it would keep alive.

    Attributes:
        module: the module that was called.
        grad_output: the gradients of its output, once they have come by.
    """

    __slots__ = ("grad_output", "module")

    def __init__(self, module: Any) -> None:
        self.module = module
        self.grad_output: tuple[Any, ...] = ()


# --- the hooks --------------------------------------------------------------------------------------------------------


class FullBackwardPreHook(HookAction):
    """`hook(module, path, grad_output)`, when the gradients of the output have been computed."""

    __slots__ = ()
    verb = "register_full_backward_pre_hook"

    def rule(self, site: Site, when: When) -> SiteRule:
        return _GradOutputRule(site.at(replace(site.path, port=Port("grad"))), self, when)

    def call_hook(self, call: _Call, value: Any, key: str, site: Site) -> Any:
        gradients = value if isinstance(value, tuple) else (value,)
        return _returned(value, gradients, self.hook(call.module, self.told(key, site), gradients))


class FullBackwardHook(HookAction):
    """`hook(module, path, grad_input, grad_output)`, when the gradients of the arguments have been computed."""

    __slots__ = ()
    verb = "register_full_backward_hook"

    def rule(self, site: Site, when: When) -> SiteRule:
        path = replace(site.path, port=Port("input.grad"))
        return _GradInputRule(site.at(on_argument(path, "input.grad") if path.chain else path), self, when)

    def call_hook(self, call: _Call, value: Any, key: str, site: Site) -> Any:
        gradients = value if isinstance(value, tuple) else (value,)
        return _returned(value, gradients, self.hook(call.module, self.told(key, site), gradients, call.grad_output))


def _returned(value: Any, gradients: tuple[Any, ...], new: Any) -> Any:
    """What takes the place of `value`, a gradient or a tuple of them, after a hook returned `new` for `gradients`."""
    if new is None:
        return value
    given: tuple[Any, ...] = tuple(new) if isinstance(new, tuple | list) else (new,)
    if len(given) != len(gradients):
        raise TreeMismatch(f"the hook was given {_count(gradients)}, and returned {_count(given)}")
    fitting = tuple([_fitting(old, one) for old, one in zip(gradients, given, strict=True)])
    return fitting if isinstance(value, tuple) else fitting[0]


def _fitting(old: Any, new: Any) -> Any:
    if old is None and new is not None:
        raise TreeMismatch(f"{trees.structure_of(new)} came where there is no gradient")
    return torch.zeros_like(old) if new is None and old is not None else trees.assign(old, new)


def _count(gradients: tuple[Any, ...]) -> str:
    return "1 gradient" if len(gradients) == 1 else f"{len(gradients)} gradients"


# --- the rules --------------------------------------------------------------------------------------------------------


class _GradOutputRule(SiteRule):
    """The gradients of what a module returns."""

    __slots__ = ()
    reason = NO_GRADIENT
    action: HookAction  # pyright: ignore[reportIncompatibleVariableOverride]

    def before(self, frame: Frame) -> None:
        self.number(frame)

    def after(self, frame: Frame) -> None:
        key = self.key_of(frame)
        if key is not None:
            frame.value, _ = _watched(self, frame, _Call(frame.tap.module()), key, frame.value, self.chain, make=True)


class _GradInputRule(InputRule):
    """The gradients of the arguments of a module, with those of what it returns."""

    __slots__ = ()
    reason = NO_GRADIENT
    action: HookAction  # pyright: ignore[reportIncompatibleVariableOverride]

    def before(self, frame: Frame) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedModule(TRACED)
        if self.chain:
            super().before(frame)
        else:
            self.number(frame)
            frame.args = self.through(frame, frame.args, ())

    def through(self, frame: Frame | None, value: Any, chain: Chain | None = None) -> Any:
        key = self.key_of(frame)
        if frame is None or key is None:
            return value
        wanted, call = chain or (), _Call(frame.tap.module())
        new, found = _watched(self, frame, call, key, value, wanted)
        nothing = None if self.chain else (None,) * len(value)
        keys = [] if found else [_key_at(key, wanted, at) for at in trees.each_index(value, wanted)]
        inputs = [
            (leaf, torch_private_tensors.version(leaf))
            for leaf in trees.leaves(new)
            if found and isinstance(leaf, Tensor)
        ]
        frame.kept[self] = (partial(self._record, call, [(each, nothing) for each in keys]), inputs)
        return new

    def after(self, frame: Frame) -> None:
        if self not in frame.kept:
            return
        record, inputs = frame.kept[self]
        lines, used = lines_of(frame, "grad"), used_by(frame, frame.value)
        frame.value, found = _watched_part(lines, used, frame.value, record, last=True)
        if found and not inputs:
            _note_reached(self)
        if any([torch_private_tensors.version(tensor) != version for tensor, version in inputs]):
            raise UnsupportedModule(OVERWRITTEN.format(key=self.path))

    def _record(self, call: _Call, without: list[tuple[str, Any]], value: Any) -> Any:
        """Keeps the gradients of the output for the hook, or calls it, if no argument requires a gradient."""
        call.grad_output = value if isinstance(value, tuple) else (value,)
        for key, nothing in without:
            _act(self, call, key, (), nothing)
        return value


OVERWRITTEN = (
    "register_full_backward_hook: {key} is of a module that overwrites its input in place, so no gradient of the input "
    "comes by. Hook the module before it, or make this one work out of place."
)

TRACED = (
    "register_full_backward_hook cannot act in compiled code, where the gradients of the output are gone when those of "
    "the input come by. register_full_backward_pre_hook can act there, and both can in a model that is not compiled."
)


def _watched(
    rule: Any, frame: Frame, call: _Call, key: str, value: Any, chain: Chain, make: bool = False
) -> tuple[Any, bool]:
    """`value` with the hook on the gradients at the end of `chain` in it, and whether it has any."""
    found = False
    used, lines = used_by(frame, value), lines_of(frame, rule.path.port.kind)
    try:
        for way, rest in list(_ways(value, chain)):
            act = partial(_act, rule, call, _key_at(key, chain, (*way, *rest)), rest)
            new, has_any = _watched_part(lines, used, trees.get(value, way), act, make)
            found = found or has_any
            value = trees.rewrite(value, way, lambda _, new=new: new)
    except TreeMismatch as error:
        raise rule.at_edge(error, value, key) from None
    if found:
        _note_reached(rule)
    return value, found


def _note_reached(rule: Any) -> None:
    """Says that the site was reached where backward cannot: it may come later, and a compiled one keeps no notes."""
    if rule.action.outlives or torch.compiler.is_compiling():
        rule.session.reached[rule.key] = True


def _act(rule: Any, call: _Call, key: str, rest: Chain, gradients: Any) -> Any:
    if rule.session.ended and not rule.action.outlives:
        return gradients
    for at in list(trees.each_index(gradients, rest)):
        where = _key_at(key, rest, at)
        if torch.compiler.is_compiling():  # where backward may write nothing down
            act = partial(rule.action.act_in_call, call, key=where, site=rule.site)
            gradients = trees.rewrite(gradients, at, act)
        else:
            gradients = rule.act_at(gradients, at, where, call)
    return gradients


def _key_at(key: str, chain: Chain, at: Chain) -> str:
    """The path `key`, which ends in `chain`, with `at` in the place of that."""
    if at == chain:
        return key
    whole = ModulePath.parse(key).chain
    return with_chain(key, (*whole[: len(whole) - len(chain)], *at))


def _ways(value: Any, chain: Chain) -> Iterator[tuple[Chain, Chain]]:
    """The steps of `chain` that lead to a tensor, or to the end, and those that lead on in it."""
    if not chain or isinstance(value, Tensor):
        yield (), chain
        return
    for first in trees.each_index(value, chain[:1]):
        for way, rest in _ways(trees.get(value, first), chain[1:]):
            yield (*first, *way), rest


def _watched_part(
    lines: GradientLines,
    used: list[Tensor],
    part: Any,
    act: Callable[[Any], Any],
    make: bool = False,
    last: bool = False,
) -> tuple[Any, bool]:
    """`part` with `act` on the gradient of it, or on a tuple of those of its elements, and whether it has any.

    Args:
        lines: those of this side of the call.
        used: the tensors that have other uses.
        part: a tensor, or a container of some.
        act: what acts on the gradients, all at once.
        make: whether a tensor that nothing has made differentiable is made so.
        last: whether `act` comes after everything else.
    """
    node = None if isinstance(part, Tensor) else trees.open_node(part)
    children = [part] if node is None else list(node.children)
    possible = [at for at, child in enumerate(children) if may_have_gradient(child)]
    wanted = [at for at in possible if torch_private_tensors.requires_gradient(children[at])]
    if not wanted and make and torch_private.innermost_transform() is None:
        wanted = possible
    if not wanted:
        return part, False
    tensors = [children[at] if children[at] in lines else own_use(children[at], used) for at in wanted]
    if make:
        tensors = [made_differentiable(tensor) for tensor in tensors]
    on = partial(_on_alone, act) if node is None else partial(_on_elements, act, wanted, len(children))
    for at, tensor in zip(wanted, lines.watch(tensors, on, last), strict=True):
        children[at] = tensor
    return (children[0] if node is None else node.rebuild(children)), True


def _on_alone(act: Callable[[Any], Any], gradients: Gradients) -> Gradients:
    return [act(gradients[0])]


def _on_elements(act: Callable[[Any], Any], wanted: list[int], count: int, gradients: Gradients) -> Gradients:
    found = dict(zip(wanted, gradients, strict=True))
    new = act(tuple([found.get(at) for at in range(count)]))
    return [new[at] for at in wanted]
