"""What a layer adds to its stream: the sum that it returns, taken apart into what came in and its branches.

NOTE [Walking back]
From what a layer returns, one walks back over the additions that were recorded, to what came into it. On the way a norm
may stand on the stream, or a number that scales it. What was added on the way, in order, are the terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from nicehooks.anatomies.noted_values import Key, Value
from nicehooks.anatomies.recording import ADDING, SCALING, NotedCall, Record
from nicehooks.anatomies.stacks import Layer
from nicehooks.ports.attention import FUSED_KERNELS

PLAIN_STREAM = ("add",)
SCALED = ("add", "scale")
NORMED = ("add", "scale", "norm")


@dataclass(eq=False)
class Term:
    """What one branch adds to the stream.

    Attributes:
        key: the key of its value.
        calls: what ran for it.
    """

    key: Key
    calls: list[NotedCall]


@dataclass(eq=False)
class StreamStep:
    """One step of the stream through a layer.

    Attributes:
        kind: `"add"`, `"norm"` or `"scale"`.
        call: the function, or the norm.
        before, after: the stream before and after it.
        terms: what was added.
    """

    kind: str
    call: NotedCall
    before: Key
    after: Key
    terms: list[Term] = field(default_factory=list[Term])


class Flow:
    """Where the values of one layer come from.

    Attributes:
        calls: what ran in the layer.
        made: by key, the calls that returned this value, in order, with the value.
        sums: by key, the additions with this result.
        kept: by key, the norms and scalings with this result.
    """

    def __init__(self, record: Record, layer: Layer) -> None:
        self.record = record
        self.layer = layer
        self.calls = record.within(layer.call)
        self.made: dict[Key, list[tuple[NotedCall, Value]]] = {}
        self.read: dict[Key, list[tuple[NotedCall, Value]]] = {}
        self.sums: dict[Key, list[NotedCall]] = {}
        self.norms: dict[Key, list[NotedCall]] = {}
        self.scales: dict[Key, list[NotedCall]] = {}
        self.stream: set[Key] = set()
        for call in self.calls:
            for value in call.outputs:
                self.made.setdefault(value.key, []).append((call, value))
            for value in call.inputs:
                self.read.setdefault(value.key, []).append((call, value))
            self._sort(call)

    def _sort(self, call: NotedCall) -> None:
        if len(call.outputs) != 1:
            return
        key = call.outputs[0].key
        if call.function in ADDING and call.function not in ("sub", "isub") and len(call.inputs) == 2:
            self.sums.setdefault(key, []).append(call)
        elif call.function in SCALING and call.inputs and call.inputs[0].key != key:
            self.scales.setdefault(key, []).append(call)
        elif is_norm(call) and call.inputs[0].key != key:
            self.norms.setdefault(key, []).append(call)

    def steps(self) -> list[StreamStep] | None:
        """The steps of the stream through the layer; None if no sum leads from what it reads to what it gives."""
        for allowed in (PLAIN_STREAM, SCALED, NORMED):
            found = self._back(self.layer.gives.key, allowed, set())
            if found is not None and any(step.kind == "add" for step in found):
                self.stream = {self.layer.reads.key, *(step.after for step in found)}
                return self._with_terms(found)
        return None

    def _back(self, key: Key, allowed: tuple[str, ...], seen: set[Key]) -> list[StreamStep] | None:
        if key == self.layer.reads.key:
            return []
        if key in seen:
            return None
        seen.add(key)
        for kind, call, before in self._ways(key, allowed):
            found = self._back(before, allowed, seen)
            if found is not None:
                return [*found, StreamStep(kind, call, before, key)]
        return None

    def _ways(self, key: Key, allowed: tuple[str, ...]) -> Iterator[tuple[str, NotedCall, Key]]:
        for call in self.sums.get(key, []):
            yield from (("add", call, value.key) for value in call.inputs)
        if "scale" in allowed:
            yield from (("scale", call, call.inputs[0].key) for call in self.scales.get(key, []))
        if "norm" in allowed:
            yield from (("norm", call, call.inputs[0].key) for call in self.norms.get(key, []))

    def _with_terms(self, steps: list[StreamStep]) -> list[StreamStep]:
        since = self.layer.call.begin
        for step in steps:
            if step.kind == "add":
                keys = self._terms(step)
                if len(keys) == 1:
                    ran = [one for one in self.calls if since < one.begin < step.call.begin]
                    step.terms = [Term(keys[0], ran or self._branch(keys[0], step.call))]  # or before the other branch
                else:
                    step.terms = [Term(key, self._branch(key, step.call)) for key in keys]
                since = step.call.end
        return steps

    def added(self, step: StreamStep) -> Key:
        """The whole of what an addition brings to the stream."""
        return next((value.key for value in step.call.inputs if value.key != step.before), step.before)

    def _terms(self, step: StreamStep) -> list[Key]:
        """What is added: two branches that were added to each other first are two terms."""
        return list(self._leaves(self.added(step), step.call.around))

    def _leaves(self, key: Key, around: NotedCall | None) -> Iterator[Key]:
        inner = next((call for call in self.sums.get(key, []) if call.around is around), None)
        if inner is None:
            yield key
        else:
            for value in inner.inputs:
                yield from self._leaves(value.key, around)

    def _branch(self, key: Key, add: NotedCall) -> list[NotedCall]:
        """What ran in the module that a term comes from, below the module in which it is added."""
        call = self.source(key)
        while call is not None and call.around is not None and not add.is_in(call.around):
            call = call.around
        return [] if call is None else [call, *(one for one in self.calls if one.is_in(call))]

    def source(self, key: Key, among: Sequence[NotedCall] | None = None) -> NotedCall | None:
        """The module that has made a value, the first of `among`: not the norm or the factor behind it."""
        for _ in range(8):
            made = [call for call, _ in self.made.get(key, []) if not call.function]
            found = next((call for call in made if among is None or call in among), None)
            behind = [*self.norms.get(key, []), *self.scales.get(key, [])]
            if (among is not None and found is not None) or not behind:
                return found
            key = behind[0].inputs[0].key
        return None

    def is_norm_of_stream(self, call: NotedCall) -> bool:
        """Whether the call is that of a norm that reads the stream."""
        return is_norm(call) and call.inputs[0].key in self.stream


def is_norm(call: NotedCall) -> bool:
    """Whether the call is that of a norm: a module without matrices, from one value to another one of its shape."""
    if call.function or call.module is None or len(call.inputs) != 1 or len(call.outputs) != 1:
        return False
    module: nn.Module = call.module
    weights = [one for one in module.parameters() if one.ndim > 1]
    named = "norm" in type(module).__name__.lower() or any(True for _ in module.parameters(recurse=False))
    return not weights and named and call.inputs[0].shape == call.outputs[0].shape


def is_attention(call: NotedCall) -> bool:
    """Whether the call makes an attention pattern: a softmax over keys, or a fused kernel."""
    return call.function in FUSED_KERNELS or (
        call.function == "softmax" and len(call.outputs) == 1 and len(call.outputs[0].shape) > 2
    )
