"""How a value is reached: the rules for the output of a module, its input, and its parameters.

Each rule brings the value at its site to an `Action`, and puts what the action returns in its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import internals, trees
from nicehooks.errors import TreeMismatch, UnsupportedModule
from nicehooks.parameters import Override, StandIn
from nicehooks.paths import EVERY_CALL, ModulePath, expand_stars
from nicehooks.rebinding import Frame, Passing, Rule, StopForward
from nicehooks.selection import Census, Site, has_forward
from nicehooks.sessions import Session
from nicehooks.trees import STAR, Chain


class Action:
    """What an intervention does with a value. One action serves all sites of a context.

    Attributes:
        verb: the name of the intervention, for messages.
        changes: whether it may change the value.
    """

    __slots__ = ()
    verb = ""
    changes = True

    def act(self, session: Session, value: Any, key: str, site: Site) -> Any:
        """What takes the place of `value`, which stands at the path `key`; `value` itself leaves it."""
        raise NotImplementedError  # abstract: every intervention has its own


class When:
    """Which steps and which calls an intervention acts at.

    Args:
        steps, calls: an int, a slice, a list of ints, a predicate `(number) -> bool`, or None for all.
        call: the call number of the path, if it has one.

    Attributes:
        counts: whether anything is filtered or told apart by numbers.
        optional: whether it may never admit anything, and that is fine.
        shown: the filters as text.
    """

    __slots__ = ("admits_call", "admits_step", "counts", "optional", "shown")

    def __init__(self, steps: Any, calls: Any, call: int | str | None) -> None:
        number = None if call == EVERY_CALL else call
        self.admits_step = _filter("steps", steps)
        by_option, by_path = _filter("calls", calls), _filter("calls", number)
        self.admits_call = lambda number: by_option(number) and by_path(number)
        self.counts = not (steps is None and calls is None and call is None)
        self.optional = callable(steps) or callable(calls)  # a predicate may well never say yes
        given = {"steps": steps, "calls": calls, "call": call}
        self.shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)

    def admits(self, step: int, call: int) -> bool:
        """Whether to act at this call of this step."""
        return self.admits_step(max(step, 0)) and self.admits_call(call)


def _filter(name: str, wanted: Any) -> Callable[[int], bool]:
    if wanted is None:
        return lambda number: True
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return lambda number: number == wanted
    if isinstance(wanted, slice):
        if any(bound is not None and bound < 0 for bound in (wanted.start, wanted.stop, wanted.step)):
            raise ValueError(f"{name}={wanted}: how many there will be is not known, so counting from the end cannot work")
        return lambda number: number in range(*wanted.indices(number + 1))
    if callable(wanted):
        return lambda number: bool(wanted(number))
    if isinstance(wanted, list | tuple | range | set | frozenset) and all(type(number) is int for number in wanted):
        return lambda number: number in wanted
    raise TypeError(f"{name}={wanted!r}: give an int, a slice, a list of ints or a predicate (number) -> bool")


ALWAYS = When(None, None, None)


# --- the rules --------------------------------------------------------------------------------------------------------


class SiteRule(Rule):
    """Brings the values at one site to an action."""

    __slots__ = ("action", "chain", "index", "key", "path", "simple", "site", "stars", "when")

    def __init__(self, site: Site, action: Action, when: When) -> None:
        self.site = site
        self.path: ModulePath = site.path
        self.key = str(site)
        self.chain: Chain = site.path.chain
        self.stars = site.path.has_stars
        self.action = action
        self.when = when
        self.simple = not when.counts
        self.index = 0  # among the rules of its context

    def number(self, frame: Frame) -> None:
        """Counts this call, if calls matter."""
        if self.when.counts:
            calls = self.session.progress().calls
            frame.numbers[self.index] = calls[self.index] = calls.get(self.index, -1) + 1

    def through(self, frame: Frame | None, value: Any) -> Any:
        """`value` after the action has been at the site in it."""
        key = self.key
        if frame is not None and self.when.counts:
            number = frame.numbers[self.index]
            if not self.when.admits(self.session.progress().step, number):
                return value
            if self.path.call == EVERY_CALL:
                key = key.replace("#*", f"#{number}", 1)
        if self.action.changes and not torch.compiler.is_compiling():
            self._note_checkpoint()
        self.session.reached[self.key] = True
        if self.stars:
            return self._through_stars(value, key)
        return self._at(value, self.chain, key)

    def _note_checkpoint(self) -> None:
        """Notices a forward that backward will run again, and that it does; the stack is searched once per site."""
        session = self.session
        if session.checkpointed and internals.in_backward():
            session.recomputed = True
        elif self.key not in session.reached and internals.in_checkpoint():
            session.checkpointed = True

    def _through_stars(self, value: Any, key: str) -> Any:
        try:
            sizes = list(_star_ranges(value, self.chain))
        except TreeMismatch as error:
            raise self._at_edge(error, value, key) from None
        for path in expand_stars(ModulePath.parse(key), sizes):
            value = self._at(value, path.chain, str(path))
        return value

    def _at(self, value: Any, chain: Chain, key: str) -> Any:
        act = partial(self.action.act, self.session, key=key, site=self.site)
        try:
            return trees.rewrite(value, chain, act) if chain else act(value)
        except TreeMismatch as error:
            raise self._at_edge(error, value, key) from None

    def _at_edge(self, error: TreeMismatch, value: Any, key: str) -> TreeMismatch:
        """The bare fact, with the site and the line to write instead."""
        verb = self.action.verb
        text = f"{verb} at {key!r}: {error}."
        node = trees.open_node(value)
        tensors = [] if node is None else [e for e, c in zip(node.entries, node.children, strict=True) if isinstance(c, Tensor)]
        if not self.chain and tensors:
            text += f'\n  the value there is {trees.describe(value)}; choose a part of it:'
            text += f'\n    {verb}(model, "{key}{trees.show_step(tensors[0])}", …)'
        return TreeMismatch(text)


def _star_ranges(value: Any, chain: Chain) -> Iterator[range]:
    for step in chain:
        items = list(step) if isinstance(step, tuple) else [step]
        for position, item in enumerate(items):
            if item is STAR:
                yield range(trees.length(value, items, position))
                items[position] = 0
        value = trees.get(value, (tuple(items) if isinstance(step, tuple) else items[0],))


class OutputRule(SiteRule):
    """The result of a module."""

    __slots__ = ()

    def output(self, value: Any) -> Any:
        return self.through(None, value)

    def before(self, frame: Frame) -> None:
        self.number(frame)

    def after(self, frame: Frame) -> None:
        frame.value = self.through(frame, frame.value)


class InputRule(SiteRule):
    """The arguments of a module, as an `Arguments`."""

    __slots__ = ()

    def __init__(self, site: Site, action: Action, when: When) -> None:
        super().__init__(site, action, when)
        self.simple = False

    def before(self, frame: Frame) -> None:
        self.number(frame)
        names, defaults = frame.tap.parameters
        arguments = Arguments(_named(names, frame))
        if self.chain:
            self._complete(arguments, names, defaults)
        changed = self.through(frame, arguments)
        if changed is not arguments:
            _write_back(frame, arguments, changed, names)

    def _complete(self, arguments: Arguments, names: tuple[str, ...], defaults: dict[str, Any]) -> None:
        """Adds the default of the argument that the path names, where the caller did not pass it."""
        first = self.chain[0]
        name = names[first] if type(first) is int and 0 <= first < len(names) else first
        if isinstance(name, str) and name not in arguments and name in defaults:
            arguments[name] = defaults[name]

    def after(self, frame: Frame) -> None:
        pass


class Arguments(dict[Any, Any]):
    """The arguments of a call by parameter name, in the order of the signature; `arguments[0]` is the first.

    What the signature does not name (`*args`) is known by its position.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key not in self:
            return list(self.values())[key]
        return super().__getitem__(key)


def _named(names: tuple[str, ...], frame: Frame) -> dict[Any, Any]:
    given: dict[Any, Any] = {names[i] if i < len(names) else i: value for i, value in enumerate(frame.args)}
    given.update((name, frame.kwargs[name]) for name in names if name in frame.kwargs)
    given.update((name, value) for name, value in frame.kwargs.items() if name not in given)
    return given


def _write_back(frame: Frame, old: Arguments, new: Arguments, names: tuple[str, ...]) -> None:
    """Puts changed arguments where the caller had put the old ones."""
    args, kwargs = list(frame.args), dict(frame.kwargs)
    for name, value in new.items():
        if name in old and old[name] is value and (name in kwargs or name not in names[len(args) :]):
            continue
        position = name if isinstance(name, int) else names.index(name) if name in names else len(args)
        if position < len(args) and name not in kwargs:
            args[position] = value
        else:
            kwargs[name] = value
    frame.args, frame.kwargs = tuple(args), kwargs


FLAT_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
"""What an `nn.RNNBase` derives from its parameters and keeps in its `__dict__` (torch 2.2 … 2.13)."""


class ParameterRule(SiteRule):
    """A parameter or buffer, while the model or a module that holds it runs."""

    __slots__ = ("is_swapped", "places")

    def __init__(self, site: Site, action: Action, when: When, places: list[tuple[nn.Module, str]]) -> None:
        super().__init__(site, action, when)
        self.simple = self.is_swapped = False
        self.places = [(weakref.ref(module), name) for module, name in places]

    def modules(self) -> list[nn.Module]:
        """The modules that hold the tensor."""
        return [module for reference, _ in self.places if (module := reference()) is not None]

    def before(self, frame: Frame) -> None:
        if not Override.is_open(self):
            self.number(frame)
            old = getattr(self.site.module, self.path.port.name)
            new = self.through(frame, old)
            places = list(zip(self.modules(), (name for _, name in self.places), strict=True))
            frame.enter(Override(self, places, None if new is old else new))
        module = frame.tap.module()
        if isinstance(module, nn.RNNBase) and any(module is holder for holder in self.modules()):
            weights = [getattr(module, name) for name in module._flat_weights_names]
            frame.module = frame.enter(StandIn(module, {"_flat_weights": weights}, FLAT_WEIGHTS))

    def after(self, frame: Frame) -> None:
        pass


class AttributeRule(SiteRule):
    """A tensor that a pre-hook of the module computes and keeps as a plain attribute, as `weight_norm` does."""

    __slots__ = ()

    def __init__(self, site: Site, action: Action, when: When) -> None:
        super().__init__(site, action, when)
        self.simple = False

    def before(self, frame: Frame) -> None:
        self.number(frame)
        name = self.path.port.name
        old = getattr(frame.module, name)
        new = self.through(frame, old)
        if new is not old:
            frame.module = frame.enter(StandIn(frame.module, {name: new}))

    def after(self, frame: Frame) -> None:
        pass


# --- rules that every session has -------------------------------------------------------------------------------------


class StepRule(Rule):
    """Counts the steps of the root model, and ends a forward that was stopped."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        self.session.called = True
        if not self.session.counting:
            return
        progress = self.session.progress()
        if progress.depth == 0:
            progress.next_step()
        frame.enter(_Deeper(progress))

    def caught(self, stop: StopForward) -> bool:
        return stop.session is self.session and self.session.progress().depth == 1


class _Deeper(AbstractContextManager[None]):
    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def __enter__(self) -> None:
        self.progress.depth += 1

    def __exit__(self, *_: object) -> None:
        self.progress.depth -= 1


class SlowPathRule(Rule):
    """Keeps an `nn.TransformerEncoder` or its layer from a fused kernel that would not call its submodules."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        frame.enter(Passing())


class SuspendRule(Rule):
    """Silences the rules before it."""

    __slots__ = ()
    suspends = True


# --- from sites to rules ----------------------------------------------------------------------------------------------

MakeRule = Callable[[Site], SiteRule]
NOT_YET = "{path!r}: the port {port} cannot be reached yet; outputs, @input, parameters and heads can."


def rules_for(site: Site, action: Action, when: When, root: nn.Module) -> list[tuple[nn.Module, Rule]]:
    """The rules that bring the values at `site` to `action`, each with the module whose tap it belongs to."""
    kind = site.path.port.kind
    if kind == "output":
        return [(site.module, OutputRule(site, action, when))]
    if kind == "input":
        return [(site.module, InputRule(site, action, when))]
    if kind == "parameter":
        return _parameter_rules(site, action, when, root)
    raise UnsupportedModule(NOT_YET.format(path=str(site), port=site.path.port))


def _parameter_rules(site: Site, action: Action, when: When, root: nn.Module) -> list[tuple[nn.Module, Rule]]:
    owner, name = site.module, site.path.port.name
    if name in getattr(owner, "parametrizations", {}):
        return [(owner.parametrizations[name], OutputRule(site, action, when))]  # type: ignore[index]
    if name in vars(owner):
        return [(owner, AttributeRule(site, action, when))]
    places = _places(owner, name, root)
    holders = [module for module, _ in places]
    around = [module for module in root.modules() if any(m is holder for m in module.modules() for holder in holders)]
    modules = {id(module): module for module in (root, *around, *holders)}
    rule = ParameterRule(site, action, when, places)
    return [(module, rule) for module in modules.values() if has_forward(module)]


def _places(owner: nn.Module, name: str, root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module and name below `root` that holds the very tensor which `owner` holds as `name`."""
    tensor = getattr(owner, name)
    modules = {id(module): module for module in (*Census(root).names.values(), owner)}
    places = [(owner, name)]
    for module in modules.values():
        for table in (module._parameters, module._buffers):
            places += [(module, n) for n, t in table.items() if t is tensor and not (module is owner and n == name)]
    return places


def slow_path_rules(sites: list[Site]) -> list[tuple[nn.Module, Rule]]:
    """A rule for each encoder that contains one of `sites`."""
    encoders = {id(encoder): encoder for site in sites if site._encoders for encoder in site.encoders}
    return [(encoder, SlowPathRule()) for encoder in encoders.values()]
