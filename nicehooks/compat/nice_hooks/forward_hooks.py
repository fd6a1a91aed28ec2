"""Hooks on what goes into a module and on what comes out of it: the rules that call them as PyTorch calls its own.

NOTE [What a subscript means to a hook]
A subscript chooses a part of what the hook may change: of the output, of the first argument, and of the gradient of
either. The hook is given this part in the place of the whole, and what it returns takes the place of this part alone.
What a hook is only shown (the arguments beside an output, the gradient of the output beside that of the input) is
whole. So `mod[:, 0]` is to a hook before the forward what `mod@input[0][:, 0]` is to an `edit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nicehooks import torch_private
from nicehooks.core.frames import Frame
from nicehooks.core.register import Pairs
from nicehooks.core.rules import Action, OutputRule, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.errors import TreeMismatch, UnsupportedModule
from nicehooks.paths.grammar import ModulePath
from nicehooks.paths.ports import OUTPUT, Port
from nicehooks.ports.arguments import INPUT, InputRule
from nicehooks.ports.gradients import INPUT_GRADIENT
from nicehooks.values import trees


class HookAction(Action):
    """Calls one hook.

    Attributes:
        hook: the user's function.
        with_kwargs: whether it is given the keyword arguments of the call, too.
        outlives: whether it still acts in backward after its context was left.
        paths: the paths that hooks are told, by key; made before, because compiled code cannot read one.
        removed: the modules, by `id`, that the hook was taken off again while it stays at others.
    """

    __slots__ = ("hook", "outlives", "paths", "removed", "with_kwargs")
    wants_call = True

    def __init__(self, hook: Callable[..., Any], with_kwargs: bool = False, outlives: bool = False) -> None:
        self.hook = hook
        self.with_kwargs = with_kwargs
        self.outlives = outlives
        self.paths: dict[str, ModulePath] = {}
        self.removed: set[int] = set()

    def rules(self, site: Site, when: When) -> Pairs:
        """The rules that bring what happens at `site` to the hook."""
        if not site.path.port.is_output:
            plain = replace(site.path, port=OUTPUT)
            raise UnsupportedModule(NO_PORT.format(verb=self.verb, path=site.path, plain=plain))
        rule = self.rule(site, when)
        self.paths[rule.key] = site.path
        return [(site.module, rule)]

    def rule(self, site: Site, when: When) -> SiteRule:
        """The rule for one site."""
        raise NotImplementedError  # abstract: every kind of hook has its own

    def act_in_call(self, call: Any, value: Any, key: str, site: Site) -> Any:
        return value if site.key[0] in self.removed else self.call_hook(call, value, key, site)

    def call_hook(self, call: Any, value: Any, key: str, site: Site) -> Any:
        """What the hook makes of `value`."""
        raise NotImplementedError  # abstract: every kind of hook has its own

    def told(self, key: str, site: Site) -> ModulePath:
        """The path that the hook is told, where the value at the path `key` comes by."""
        found = self.paths.get(key)
        return _as_told(key) if found is None else found


@torch_private.evaluated_while_tracing
def _as_told(key: str) -> ModulePath:
    """The path of the site at `key`, as the user of a hook would write it."""
    path = ModulePath.parse(key)
    chain = path.chain[1:] if path.port in (INPUT, INPUT_GRADIENT) else path.chain
    return replace(path, port=OUTPUT, chain=chain)


NO_PORT = (
    "{verb}(model, '{path}', …): a hook says by itself which value it is about, the path says where.\n"
    "  {verb}(model, '{plain}', hook)    # a hook\n"
    "  edit(model, '{path}', fn)    # any other value"
)


def on_argument(path: ModulePath, port: str) -> ModulePath:
    """The path at `port` for a subscript on the first argument; see NOTE [What a subscript means to a hook]."""
    return replace(path, port=Port(port), chain=(0, *path.chain))


# --- after the forward ------------------------------------------------------------------------------------------------


class ForwardHook(HookAction):
    """`hook(module, path, args, output)`, or with the keyword arguments behind `args`."""

    __slots__ = ()
    verb = "register_forward_hook"

    def rule(self, site: Site, when: When) -> SiteRule:
        return _ForwardHookRule(site, self, when)

    def call_hook(self, call: Frame, value: Any, key: str, site: Site) -> Any:
        given = (call.args, call.kwargs) if self.with_kwargs else (call.args,)
        new = self.hook(call.tap.module(), self.told(key, site), *given, value)
        if new is None:
            return value
        return trees.assign(value, new) if site.path.chain else new


class _ForwardHookRule(OutputRule):
    """Not the short way of an `OutputRule`: a hook is told of the call."""

    __slots__ = ()
    output_only = False


# --- before the forward -----------------------------------------------------------------------------------------------


class ForwardPreHook(HookAction):
    """`hook(module, path, args)`, or with the keyword arguments behind `args`."""

    __slots__ = ()
    verb = "register_forward_pre_hook"

    def rule(self, site: Site, when: When) -> SiteRule:
        if not site.path.chain:
            return _AllArgumentsRule(site, self, when)
        if self.with_kwargs:
            raise UnsupportedModule(KEYWORDS.format(verb=self.verb, path=site.path))
        return InputRule(site.at(on_argument(site.path, "input")), self, when)

    def call_hook(self, call: Frame, value: Any, key: str, site: Site) -> Any:
        module, path = call.tap.module(), self.told(key, site)
        if site.path.chain:
            new = self.hook(module, path, (value,))
            return value if new is None else trees.assign(value, _only(new))
        if not self.with_kwargs:
            new = self.hook(module, path, value)
            return value if new is None else new if isinstance(new, tuple) else (new,)
        new = self.hook(module, path, *value)
        if new is None:
            return value
        if not (isinstance(new, tuple) and len(new) == 2 and isinstance(new[0], tuple) and isinstance(new[1], dict)):
            raise TreeMismatch(
                f"a hook with keyword arguments returns None or (args, kwargs), not {trees.structure_of(new)}"
            )
        return new


KEYWORDS = (
    "{verb}(model, '{path}', …, with_kwargs=True): a subscript chooses a part of the first argument, and the hook is "
    "given that alone.\n"
    "  Leave out with_kwargs, or the subscript."
)


def _only(new: Any) -> Any:
    """What a hook on one value returned for it: the value, or a tuple with just that."""
    if not isinstance(new, tuple):
        return new
    if len(new) != 1:
        raise TreeMismatch(f"the hook was given one value, and returned {trees.structure_of(new)}")
    return new[0]


class _AllArgumentsRule(SiteRule):
    """All arguments of a call, as the caller passed them."""

    __slots__ = ()
    action: ForwardPreHook  # pyright: ignore[reportIncompatibleVariableOverride]

    def before(self, frame: Frame) -> None:
        self.number(frame)
        if self.action.with_kwargs:
            frame.args, frame.kwargs = self.through(frame, (frame.args, frame.kwargs))
        else:
            frame.args = self.through(frame, frame.args)

    def after(self, frame: Frame) -> None:
        pass
