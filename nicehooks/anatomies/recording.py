"""One forward, recorded: every call of a module, and every torch function in a module's own forward, in order."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from nicehooks.anatomies.noted_values import Copied, Value, given_tensors, given_to_module, tensors_of
from nicehooks.core.census import Census
from nicehooks.paths.names import escape
from nicehooks.ports.attention import FUSED_KERNELS
from nicehooks.ports.calls import plain_function_name
from nicehooks.torch_private_tensors import FLEX_ATTENTION, flex_attention_shown, opened, unseen, version


@dataclass(eq=False, slots=True)
class NotedCall:
    """One call of a module, or of a function in a module's own forward.

    Attributes:
        owner: the name of the module; of a function, of the module in whose own forward it was called.
        function: the name of the function; empty for the call of a module.
        number: which call of the module in this forward, or of the function in this run of the module's own forward.
        around: the call of the module that it was made in.
        begin, end: its place in the order of all beginnings and ends.
        numbers, words: the plain numbers, and the texts, among the arguments of a function.
    """

    owner: str
    function: str
    number: int
    around: NotedCall | None
    begin: int
    module: nn.Module | None = None
    end: int = -1
    inputs: list[Value] = field(default_factory=list[Value])
    outputs: list[Value] = field(default_factory=list[Value])
    numbers: list[float] = field(default_factory=list[float])
    words: list[str] = field(default_factory=list[str])
    arguments: Any = None
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def is_in(self, outer: NotedCall) -> bool:
        """Whether it was made while `outer` ran."""
        return outer.begin < self.begin and self.end < outer.end

    def __repr__(self) -> str:
        return f"Call({self.owner}#{self.number}{f'@{self.function}' if self.function else ''})"


class Record:
    """What happened in one forward.

    Attributes:
        calls: every call, in the order in which they began.
        names: the modules by their names.
    """

    def __init__(self, names: dict[str, nn.Module]) -> None:
        self.calls: list[NotedCall] = []
        self.names = names
        self.times: dict[str, int] = {}

    def of_modules(self) -> Iterator[NotedCall]:
        """The calls of modules."""
        return (call for call in self.calls if not call.function)

    def within(self, outer: NotedCall) -> list[NotedCall]:
        """The calls that were made while `outer` ran."""
        first = bisect_right(self.calls, outer.begin, key=attrgetter("begin"))
        return self.calls[first : bisect_right(self.calls, outer.end, first, key=attrgetter("begin"))]

    def path(self, call: NotedCall, value: Value | None = None, *, read: bool = False) -> str:
        """The path of a result of a call; of an argument, where `read`."""
        several = self.times.get(call.owner, 1) > 1
        module = call if not call.function else call.around
        number = f"#{module.number}" if several and module is not None else ""
        port = ""
        if call.function:
            counted = self._several(call)
            port = f"@{call.function}{f'#{call.number}' if counted else ''}()"
        step = "" if value is None else value.step
        return f"{escape(call.owner)}{number}{port}{'@' if read else ''}{step}"

    def _several(self, call: NotedCall) -> bool:
        return call.around is not None and call.around.counts.get(call.function, 0) > 0


def record_forward(model: nn.Module, run: nn.Module, inputs: Any) -> tuple[Any, Record]:
    """Runs the module `run` of `model` once, and records what its modules and their forwards do.

    Returns:
        The output, and the record.
    """
    census = Census(model)
    names = dict(census.unwrapped())
    record = Record(names)
    with ExitStack() as stack:
        recorder = _Recorder(record)
        for name, module in names.items():
            if census.first[id(module)] == name and hasattr(module, "register_forward_pre_hook"):
                stack.callback(module.register_forward_pre_hook(recorder.begins(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.ends, with_kwargs=True).remove)
        if FLEX_ATTENTION in sys.modules:
            stack.enter_context(flex_attention_shown())
        stack.enter_context(recorder)
        output = called_with(run, inputs)
    return output, record


def called_with(run: nn.Module, inputs: Any) -> Any:
    """What `run` gives for its inputs: arguments by name, several in order, or one."""
    if isinstance(inputs, Mapping):
        return run(**inputs)
    return run(*inputs) if isinstance(inputs, tuple | list) else run(inputs)


class _Recorder(TorchFunctionMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.running: list[NotedCall] = []
        self.now = 0
        self.copies: dict[int, tuple[int | None, Copied, Tensor]] = {}

    def begins(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = self.record.times.get(name, 0)
            self.record.times[name] = number + 1
            call = self._new(name, "", number)
            call.module, call.arguments = module, (args, kwargs)
            with unseen():  # to look at a value is no call of the model's
                call.inputs = [self._value(step, one) for step, one in given_to_module(module, args, kwargs)]
            self.running.append(call)

        return hook

    def ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.running.pop()
        with unseen():
            call.outputs = [self._value(step, one) for step, one in tensors_of(output)]
        self._over(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        raw = getattr(func, "__name__", "")
        if raw in NOT_CALLS or not self.running:
            return func(*args, **kwargs)
        name = plain_function_name(raw)
        if func is multi_head_attention_forward:
            with self:  # its lines are those of the module's forward
                return opened(func)(*args, **kwargs)
        around = self.running[-1]
        around.counts[name] = around.counts.get(name, -1) + 1
        call = self._new(around.owner, name, around.counts[name])
        if name in LOOKED_INTO:
            call.inputs = [self._value(step, one) for step, one in given_tensors(args, kwargs)]
            call.numbers = [float(one) for one in args if isinstance(one, int | float)]
            call.words = [one for one in args if isinstance(one, str)]
            call.arguments = kwargs
        output = func(*args, **kwargs)
        call.outputs = [self._value(step, one) for step, one in tensors_of(output)]
        self._over(call)
        return output

    def _new(self, owner: str, function: str, number: int) -> NotedCall:
        self.now += 1
        call = NotedCall(owner, function, number, self.running[-1] if self.running else None, self.now)
        self.record.calls.append(call)
        return call

    def _over(self, call: NotedCall) -> None:
        self.now += 1
        call.end = self.now

    def _value(self, step: str, value: Tensor) -> Value:
        known = self.copies.get(id(value))  # the id of a tensor that is kept alive
        number = None if value.is_inference() else version(value)
        if known is not None and number is not None and known[0] == number:
            return Value(step, known[1])
        copied = Copied(value.detach().clone())
        self.copies[id(value)] = number, copied, value
        return Value(step, copied)


NOT_CALLS = frozenset(
    (
        "__get__",
        "__set__",
        "size",
        "dim",
        "numel",
        "is_floating_point",
        "is_complex",
        "shape",
        "device",
        "dtype",
        "__len__",
    )
)
ADDING = ("add", "iadd", "radd", "add_", "sub", "isub")
SCALING = ("mul", "imul", "rmul", "truediv", "itruediv", "div")
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "rmatmul")
WITH_VALUES = ("softmax", *FUSED_KERNELS, *PRODUCTS)
ACTIVATIONS = ("gelu", "relu", "silu", "tanh", "sigmoid", "square", "pow", "softplus", "hardswish", "mish", "relu6")
CUT = ("chunk", "split", "getitem", "narrow", "masked_fill", "where", "dropout", "float", "to", "type_as")
LOOKED_INTO = frozenset((*ADDING, *SCALING, *WITH_VALUES, *ACTIVATIONS, *CUT, "layer_norm", "rms_norm", "topk"))
"""The functions whose arguments are looked at."""
