"""`check_auto_hook`: whether hooks do on a model what they should, and if not, which check failed at which hook point.

Every run of the model starts from the same random state and the same buffers, and on copies of the inputs, so that two
runs may be compared bit by bit.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.compat.auto_hookpoint.auto_hook import OWN_ENTRIES, auto_hook, is_hooked
from nicehooks.compat.auto_hookpoint.places_to_hook import SUFFIX, AutoPoint
from nicehooks.compat.auto_hookpoint.reports import Failure, HookCheckReport
from nicehooks.errors import HookCheckFailed, HookCheckWarning, NotReachedWarning, warn_caller
from nicehooks.values import trees


def check_auto_hook(
    model: type[nn.Module] | nn.Module,
    input_kwargs: dict[str, Any],
    init_kwargs: dict[str, Any] | None = None,
    strict: bool = False,
) -> HookCheckReport:
    """Checks that hooks do on a model what they should, and says where they do not.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks.hookpoints import check_auto_hook
    >>> print(check_auto_hook(nn.Linear, {"input": torch.randn(2, 3)}, {"in_features": 3, "out_features": 4}))
    Linear: 10 checks passed at 1 hook point
    >>> model = nn.Sequential(nn.Linear(3, 3), nn.Flatten())
    >>> check_auto_hook(model, {"input": torch.randn(2, 3)}).hook_points
    ('hook_point', '0.hook_point', '1.hook_point')

    The checks, in order:

    - `repeatable`: the model, without hooks, gives the same output twice.
    - `structure`: type, attributes, `state_dict`, modules and parameters are what they were.
    - `output`: the output is the same, bit by bit, without hooks, with hooks that look, and with hooks that return what
      they are given.
    - `forward`: every hook is called.
    - `backward`: every hook on a gradient is called, where the value can have one.
    - `gradients`: the gradients of parameters and inputs are the same, bit by bit, with hooks and without.
    - `edits`: a changed value changes the output, at each hook point.
    - `restored`: the modules are what they were, once the hooks are gone.
    - `copies`: copies and what is unpickled have hook points of their own, and no hooks.
    - `unwrap`: `unwrap()` leaves the plain model.

    Args:
        model: a class, decorated or not, or an instance, of which a copy is checked.
        input_kwargs: the arguments of a call of the model, by name.
        init_kwargs: the arguments for the class, by name.
        strict: raises an error if a check fails, where otherwise there is a warning.

    Raises:
        HookCheckFailed: a check failed, and `strict` is set. It is a `RuntimeError`.
    """
    with torch.random.fork_rng():
        plain = model(**(init_kwargs or {})) if isinstance(model, type) else copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReachedWarning)  # what it would say is found by the checks
        report = _Checks(plain, input_kwargs).report()
    if not report.ok and strict:
        raise HookCheckFailed(str(report))
    if not report.ok:
        warn_caller(str(report), HookCheckWarning)
    return report


class _Checks:
    """The checks of one model: `plain` has no hooks, `hooked` is a copy of it that has."""

    def __init__(self, plain: nn.Module, inputs: dict[str, Any]) -> None:
        if not isinstance(plain, nn.Module):
            raise TypeError(f"check_auto_hook takes a class of torch.nn.Modules, or a torch.nn.Module, not {plain!r}")
        self.plain: Any = plain.unwrap() if is_hooked(plain) else plain  # type: ignore[operator]
        self.inputs = inputs
        self.clean = self.run(self.plain).output  # what fails here is no matter of hooks, and is the caller's to see
        self.hooked: Any = auto_hook(copy.deepcopy(self.plain))
        self.before = _state(self.hooked)
        self.names = list(self.hooked.hook_dict)
        self.values: dict[str, Any] = {}
        self.notes: list[str] = []

    def report(self) -> HookCheckReport:
        checks = {
            "repeatable": self.repeatable,
            "structure": self.structure,
            "output": self.output,
            "forward": self.forward,
            "backward": self.backward,
            "gradients": self.gradients,
            "edits": self.edits,
            "restored": self.restored,
            "copies": self.copies,
            "unwrap": self.unwrap,
        }
        failures = [Failure(name, *found) for name, check in checks.items() for found in _guarded(check)]
        without = tuple([name for name in self.names if name in self.values and not self.can_have_gradient(name)])
        names, notes = tuple(self.names), tuple(self.notes)
        return HookCheckReport(type(self.plain).__name__, names, tuple(checks), tuple(failures), without, notes)

    def run(self, model: Any, fwd: Any = (), bwd: Any = (), backward: bool = False) -> _Run:
        """One run, from the same random state, buffers and inputs each time."""
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        leaves, inputs = _copies_of(self.inputs, backward)
        model.zero_grad()
        hooks = model.hooks(fwd_hooks=fwd, bwd_hooks=bwd) if fwd or bwd else nullcontext()
        with torch.random.fork_rng(), torch.set_grad_enabled(backward), hooks:
            output = model(**inputs)
            if backward:
                _differentiate(output)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients.update({f"input {i}": leaf.grad for i, leaf in enumerate(leaves)})
        model.zero_grad()
        return _Run(output, gradients)

    def can_have_gradient(self, name: str) -> bool:
        """Whether a value with a floating-point tensor came by the hook point."""
        return any(map(trees.has_fractions, trees.leaves(self.values.get(name))))

    # the checks: each yields the name of a hook point, or "", and what is wrong there

    def repeatable(self) -> Finding:
        if not _equal(self.run(self.plain).output, self.clean):
            yield "", "the model gives another output each time, also without hooks: nothing can be compared with it."

    def structure(self) -> Finding:
        for what, of in STRUCTURE.items():
            if of(self.hooked) != of(self.plain):
                yield "", f"auto_hook changes {what}: {_difference(of(self.plain), of(self.hooked))}."
        modules = set(map(id, self.hooked.modules()))
        for name, point in self.hooked.hook_dict.items():
            if isinstance(point, AutoPoint) and id(point) in modules:
                yield name, "the hook point is a module of the model."

    def output(self) -> Finding:
        looks = _Looks()
        ways: dict[str, Any] = {
            "after auto_hook": (),
            "with hooks that look": [(_every, looks)],
            "with hooks that return what they are given": [(_every, _returns)],
        }
        for how, fwd in ways.items():
            if not _equal(self.run(self.hooked, fwd).output, self.clean):
                yield "", f"the output is another one {how}."

    def forward(self) -> Finding:
        looks = _Looks()
        self.run(self.hooked, [(_every, looks)])
        self.values = looks.seen
        for name in self.names:
            if name not in looks.seen:
                yield name, UNUSED if getattr(self.hooked.hook_dict[name], "is_of_parameter", False) else UNCALLED

    def backward(self) -> Finding:
        if not any(map(self.can_have_gradient, self.names)):
            return
        looks = _Looks()
        self.run(self.hooked, (), [(_every, looks)], backward=True)
        for name in self.names:
            if self.can_have_gradient(name) and name not in looks.seen:
                yield name, "no gradient comes by: the output does not depend on the value there, or it is detached."

    def gradients(self) -> Finding:
        clean = self.run(self.plain, backward=True).gradients
        bwd = [(_every, _Looks())] if any(map(self.can_have_gradient, self.names)) else ()
        hooked = self.run(self.hooked, [(_every, _returns)], bwd, backward=True).gradients
        for name, gradient in clean.items():
            if not _equal(gradient, hooked[name]):
                yield "", f"the gradient of {name} is another one with hooks."

    def edits(self) -> Finding:
        for name in [name for name in self.names if self.can_have_gradient(name)]:
            for _, says in _guarded(lambda name=name: self.edit(name)):
                yield name, says

    def edit(self, name: str) -> Finding:
        if _equal(self.run(self.hooked, [(name, _disturbed)]).output, self.clean):
            yield name, "a changed value there does not change the output."

    def restored(self) -> Finding:
        after = _state(self.hooked)
        for name, entries in self.before.items():
            if after.get(name) != entries:
                changed = sorted(set(entries) ^ set(after.get(name, {}))) or ["forward"]
                yield "", f"module {name!r} was left with other entries: {', '.join(changed)}."

    def copies(self) -> Finding:
        for model in (self.plain, self.hooked):
            self.run(model)  # what it keeps of a run is without a graph now: it can be copied
        for how, copied in COPIES.items():
            try:
                copied(self.plain)
            except Exception as error:  # the model itself cannot be copied so
                self.notes.append(f"copies by {how}: the model itself has none ({_headline(error)})")
                continue
            looks = _Looks()
            with self.hooked.hooks(fwd_hooks=[(_every, looks)]):
                other = copied(self.hooked)
                self.run(self.hooked)
                looks.seen.clear()
                self.run(other)
            if looks.seen:
                yield "", f"the hooks of the model act on what {how} makes of it."
            if type(other) is not type(self.hooked) or not is_hooked(other):
                yield "", f"what {how} makes is no hooked {type(self.plain).__name__}."
                continue
            if list(other.hook_dict) != self.names:
                yield "", f"what {how} makes has other hook points: {', '.join(other.hook_dict)}."
            if not _equal(self.run(other).output, self.clean):
                yield "", f"what {how} makes gives another output."

    def unwrap(self) -> Finding:
        model = self.hooked.unwrap()
        left = sorted(set(vars(model)) ^ set(vars(self.plain)))
        if model is not self.hooked or left:
            yield "", f"unwrap() does not give back the plain model: {', '.join(left) or 'it is another object'}."
        elif not _equal(self.run(model).output, self.clean):
            yield "", "the output is another one after unwrap()."


class _Run(NamedTuple):
    """What came of one run."""

    output: Any
    gradients: dict[str, Any]


Finding = Iterator[tuple[str, str]]

UNCALLED = "its hook is never called: the forward does not call this module, with these inputs."
UNUSED = "its hook is never called: the parameter enters no operation of torch in the forward of its module."

STRUCTURE: dict[str, Callable[[Any], Any]] = {
    "the type": type,
    "attributes": lambda model: [name for name in vars(model) if name not in OWN_ENTRIES],
    "state_dict": lambda model: list(model.state_dict()),
    "modules": lambda model: [(name, type(module).__name__) for name, module in model.named_modules()],
    "parameters": lambda model: [name for name, _ in model.named_parameters()],
}

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


class _Looks:
    """A hook that notes what it has seen, by the names of the hook points, and changes nothing."""

    only_looks = True

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def __call__(self, value: Any, hook: Any) -> None:
        name, part, _ = hook.name.partition(f"{SUFFIX}[")  # a gradient of a tuple comes in parts
        self.seen[name + SUFFIX if part else name] = value


def _difference(before: Any, after: Any) -> str:
    """What two lists do not have in common, or two other things."""
    if not isinstance(before, list):
        return f"{before} became {after}"
    lost = [item for item in before if item not in after]
    new = [item for item in after if item not in before]
    shown = ", ".join([f"-{item}" for item in lost[:3]] + [f"+{item}" for item in new[:3]])
    return (shown or "another order") + (", …" if len(lost) > 3 or len(new) > 3 else "")


def _returns(value: Any, hook: Any) -> Any:
    return value


def _disturbed(value: Any, hook: Any) -> Any:
    generator = torch.Generator().manual_seed(1)

    def noisy(tensor: Tensor) -> Tensor:
        if not trees.has_fractions(tensor):
            return tensor
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return trees.map_tensors(noisy, value)


def _every(name: str) -> bool:
    return True


def _copies_of(inputs: dict[str, Any], differentiable: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """The leaves that gradients go to, and the inputs made of them, which a model may overwrite."""
    leaves: list[Tensor] = []

    def one(tensor: Tensor) -> Tensor:
        if not (differentiable and trees.has_fractions(tensor)):
            return tensor.detach().clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()

    return leaves, trees.map_tensors(one, inputs)


def _differentiate(output: Any) -> None:
    floats = [leaf.abs() for leaf in trees.leaves(output) if trees.has_fractions(leaf) and leaf.requires_grad]
    if floats:
        torch.stack([(leaf.double() + leaf.double().sin()).sum() for leaf in floats]).sum().backward()


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal, bit by bit; what is no tensor has to be of the same type."""
    x, y = trees.leaves(a), trees.leaves(b)
    return len(x) == len(y) and all(map(_equal_leaf, x, y))


def _equal_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _state(model: nn.Module) -> dict[str, dict[str, int]]:
    """The entries of each module, and which forward it has in its own."""
    return {
        name: {entry: id(value) if entry == "forward" else 0 for entry, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def _guarded(check: Callable[[], Finding]) -> Finding:
    """What `check` yields; an error on the way is one more finding."""
    try:
        yield from check()
    except Exception as error:
        yield "", f"{type(error).__name__}: {_headline(error)}"


def _headline(error: Exception) -> str:
    return str(error).partition("\n")[0]
