"""The parts of one layer, found in a recorded forward: the stream, and what its branches add to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nicehooks.anatomies.attention_parts import attention_parts
from nicehooks.anatomies.cores import Core, cores_of
from nicehooks.anatomies.expert_parts import expert_parts
from nicehooks.anatomies.mlp_parts import is_packed, mlp_parts
from nicehooks.anatomies.noted_values import Key, Value
from nicehooks.anatomies.places import PartPlaces, Step
from nicehooks.anatomies.recording import PRODUCTS, NotedCall, Record
from nicehooks.anatomies.stacks import Layer
from nicehooks.anatomies.streams import Flow, StreamStep, Term, is_attention
from nicehooks.anatomies.tables import PARALLEL, Lacks

MIXING_FUNCTIONS = ("cumsum", "logcumsumexp", "conv1d", "fft_fft", "fft_rfft", "fft_fft2", "fft_irfft", "roll")
"""Functions that bring together what stands at several positions, beside products of what was computed."""


def layer_places(record: Record, layer: Layer) -> PartPlaces:
    """Where the parts of `layer` are."""
    return _BranchFinder(Flow(record, layer)).places()


class _BranchFinder:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.record = flow.record
        self.layer = flow.layer
        self.found = PartPlaces(flow.layer.call.owner)
        self.batch = flow.layer.reads.shape[0]

    def places(self) -> PartPlaces:
        found, layer = self.found, self.layer
        found.gives = self.record.path(layer.call, layer.gives)
        found.put("resid_pre", self.record.path(layer.call, layer.reads, read=True))
        steps = self.flow.steps()
        if steps is None:
            for part in ("attn_out", "mlp_out", "resid_mid"):
                found.put(part, Lacks(NO_SUM))
            found.put("resid_post", found.gives)
            if sum(value.shape == layer.gives.shape for value in layer.call.outputs) > 1:
                found.refuse("resid_pre", SEVERAL_STREAMS)
                found.refuse("resid_post", SEVERAL_STREAMS)
            self._attention(self.flow.calls)
            return found
        for step in steps:
            self._step(step, steps)
        self._ends(steps)
        return found

    def _step(self, step: StreamStep, steps: Sequence[StreamStep]) -> None:
        if step.kind != "add":
            value = step.call.outputs[0]
            reads = self.record.path(step.call, step.call.inputs[0], read=True) if not step.call.function else ""
            self.found.form.append(Step(step.kind, self.record.path(step.call, value), reads))
            return
        terms = [(self._name(term), term) for term in step.terms]
        if len(terms) > 1 and len({name for name, _ in terms}) < len(terms):
            whole = self.flow.added(step)
            every = [call for _, term in terms for call in term.calls]
            terms = [(self._name(Term(whole, every)), Term(whole, every))]
        for name, term in terms:
            self._term(self._free(name), term)

    def _free(self, name: str) -> str:
        """A name that no term of this layer has yet."""
        taken = [step.what for step in self.found.form]
        if name not in taken:
            return name
        return next(f"{name}_{number}" for number in range(2, 99) if f"{name}_{number}" not in taken)

    def _term(self, name: str, term: Term) -> None:
        self.found.form.append(Step("add", name))
        self.found.put(name, self._last_path(term.key))
        norms = self.flow.norms.get(term.key, [])
        role = "mlp" if name.startswith("mlp") else "attn"
        if norms:
            self.found.role(f"{role}_post_norm", norms[0].owner)
        if name == "attn_out":
            self._attention(term.calls)
        elif name == "cross_attn_out":
            self._cross_attention(term.calls)
        elif name == "mlp_out":
            mlp_parts(self.flow, term, self.found)
            expert_parts(self.flow, term, self.found)
        self._norm_before(role, term)

    def _norm_before(self, role: str, term: Term) -> None:
        """The norm on the stream that the branch reads."""
        modules = [call for call in term.calls if not call.function]
        read = {value.key for call in modules[:2] for value in call.inputs}
        of_stream = [call for call in self.flow.calls if self.flow.is_norm_of_stream(call)]
        norm = next((call for call in of_stream if call in modules or call.outputs[0].key in read), None)
        if norm is not None:
            self.found.role(f"{role}_norm", norm.owner)

    def _last_path(self, key: Key) -> str:
        """The path of a term: of what the last module gives that returns it, or else of the last function."""
        made = self.flow.made[key]
        modules = [(call, value) for call, value in made if not call.function]
        inner = [pair for pair in modules if pair[0].end < self.layer.call.end]
        call, value = (inner or made)[-1]
        if inner:  # the module that ends last: what is around the others
            call, value = max(inner, key=lambda pair: pair[0].end)
        rows = "/rows" if len(value.shape) == 2 and len(self.layer.reads.shape) == 3 else ""
        return self.record.path(call, value) + rows

    # what a branch is

    def _name(self, term: Term) -> str:
        cores = cores_of(term.calls, self.batch)
        positions = self.layer.reads.shape[1]
        if any(self._is_cross(core, term.calls, positions) for core in cores):
            return "cross_attn_out"
        if cores or self._attends(term):
            return "attn_out"
        return "mixer_out" if self._mixes_positions(term) else "mlp_out"

    def _attends(self, term: Term) -> bool:
        """Whether a pattern is computed for it in the forward of the layer itself, which no module alone shows."""
        return any(is_attention(call) and call.around is self.layer.call and _is_pattern(call) for call in term.calls)

    def _is_cross(self, core: Core, calls: Sequence[NotedCall], positions: int) -> bool:
        return core.z.shape[2] == positions and core.v.shape[2] != positions and core.keys != positions

    def _mixes_positions(self, term: Term) -> bool:
        """Whether a position of what the branch gives depends on another one of what it reads: tried on its module."""
        modules = self._modules_of(term)
        own = [call for call in term.calls if call.around is self.layer.call]
        return any(_mixes(call) for call in modules) or (not modules and any(map(self._is_mixing, own)))

    def _is_mixing(self, call: NotedCall) -> bool:
        """Whether it is a function, in the forward of the layer itself, that is about several positions."""
        if call.function not in PRODUCTS:
            return call.function in MIXING_FUNCTIONS
        return len(call.inputs) == 2 and all(len(one.shape) > 2 and one.shape[0] == self.batch for one in call.inputs)

    def _modules_of(self, term: Term) -> list[NotedCall]:
        outer = [call for call in term.calls if not call.function and call.module is not None]
        return [call for call in outer if not any(call.is_in(other) for other in outer) and not _is_small(call)]

    # attention

    def _attention(self, calls: Sequence[NotedCall]) -> None:
        cores = cores_of(calls, self.batch)
        if len(cores) == 1:
            attention_parts(self.flow, calls, cores[0], self.found)
            self.found.d_head = cores[0].z.shape[-1]
            return
        reason = NO_CORE if not cores else SEVERAL_CORES.format(count=len(cores))
        for part in ("q", "k", "v", "scores", "pattern", "z"):
            self.found.put(part, Lacks(reason))

    def _cross_attention(self, calls: Sequence[NotedCall]) -> None:
        cross = PartPlaces(self.found.block)
        cores = cores_of(calls, self.batch)
        if len(cores) == 1:
            attention_parts(self.flow, calls, cores[0], cross)
        for part in ("q", "k", "v", "scores", "pattern", "z"):
            self.found.put(f"cross_{part}", cross.parts.get(part, Lacks(NO_CORE)))
            if part in cross.heads:
                self.found.heads[f"cross_{part}"] = cross.heads[part]
            if part in cross.compared:
                self.found.compared[f"cross_{part}"] = cross.compared[part]
        for role in ("attn", "attn_proj"):
            if role in cross.roles:
                self.found.role(f"cross_{role}", cross.roles[role])

    # the stream

    def _ends(self, steps: Sequence[StreamStep]) -> None:
        adds = [step for step in steps if step.kind == "add"]
        after = {step.before: step for step in steps if step.kind == "norm"}
        found = self.found
        if len(adds) > 1:
            is_read = self._is_read(steps, adds[-2], adds[-1])
            found.put("resid_mid", self._sum_path(adds[-2], after) if is_read else SIDE_BY_SIDE)
        elif len(adds) == 1 and len(adds[0].terms) > 1:
            found.put("resid_mid", PARALLEL)
        else:
            found.put("resid_mid", Lacks("the layer has one branch alone: there is no stream between two"))
        last = adds[-1]
        found.put("resid_post", found.gives if last is steps[-1] else self._sum_path(last, after))
        for step, add in zip(steps[1:], steps, strict=False):
            if step.kind == "norm" and add.kind == "add":
                role = "mlp_norm" if add is last else "attn_norm"
                found.roles[role] = step.call.owner
        for part in ("attn_out", "mlp_out"):
            found.put(part, Lacks(NO_BRANCH[part]))

    def _is_read(self, steps: Sequence[StreamStep], first: StreamStep, last: StreamStep) -> bool:
        """Whether the branch that `last` adds may read the stream behind `first`: of one that is a module, it shows."""
        if not any(not call.function for term in last.terms for call in term.calls):
            return True
        between = {step.after for step in steps[steps.index(first) : steps.index(last)]}
        own = [step.call for step in steps]
        return any(call not in own for key in between for call, _ in self.flow.read.get(key, []))

    def _sum_path(self, step: StreamStep, after: dict[Key, StreamStep]) -> str:
        norm = after.get(step.after)
        if norm is not None:
            return self.record.path(norm.call, norm.call.inputs[0], read=True)
        return self.record.path(step.call, step.call.outputs[0])


def _is_pattern(call: NotedCall) -> bool:
    """Whether what a softmax gives has a dimension for the batch, heads, queries and keys each."""
    return len(call.outputs) == 1 and len(call.outputs[0].shape) == 4


def _is_small(call: NotedCall) -> bool:
    """Whether the module maps each position for itself by what it is."""
    return isinstance(call.module, nn.Linear | nn.LayerNorm | nn.Dropout | nn.Identity | nn.Embedding)


def _mixes(call: NotedCall) -> bool:
    if call.module is None or not call.inputs or call.arguments is None:
        return False
    stream = next((value for value in call.inputs if len(value.shape) == 3), None)
    if stream is None or not call.outputs:
        return False
    outputs = [_run_with(call, stream, changed) for changed in (stream.tensor, _as_changed(stream.tensor))]
    if any(one is None for one in outputs):
        return True
    a, b = (one for one in outputs if one is not None)
    if a.shape[:2] != stream.shape[:2]:
        return False
    # numbers that are quantised as they come by share a scale over all positions: it moved 0.06 in a tiny Llama's MLP
    least = 0.15 if any(is_packed(module) for module in call.module.modules()) else 1e-6
    return not torch.allclose(a[:, 1:], b[:, 1:], rtol=1e-4, atol=least * float(a.abs().max()))


def _as_changed(value: Tensor) -> Tensor:
    other = value.clone()
    other[:, 0] = value[:, 0].flip(-1) * 1.5 + 0.1
    return other


def _run_with(call: NotedCall, stream: Value, new: Tensor) -> Tensor | None:
    """What the module gives if it reads `new` in the place of `stream`; None if it does not run like that."""
    args, kwargs = call.arguments
    old, new = (stream.tensor[0], new[0]) if stream.is_in_row else (stream.tensor, new)

    def put(one: object) -> object:
        same = isinstance(one, Tensor) and one.shape == old.shape and torch.equal(one, old)
        return new.clone() if same else one

    module: nn.Module | None = call.module
    assert module is not None
    try:
        with torch.no_grad():
            output = module(*map(put, args), **{name: put(one) for name, one in kwargs.items()})
    except Exception:  # a module that keeps state runs only once
        return None
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        return None
    return output[None] if stream.is_in_row else output


SIDE_BY_SIDE = Lacks(
    "the branch that is added last reads what was there before another one was added: the sum in between is read by "
    "nothing, and is no stream between two branches"
)

NO_SUM = "what the layer returns is no sum of what it reads and of what modules or functions in it give"

SEVERAL_STREAMS = "the layer gives several values of one shape, and nothing shows which of them is the stream"

NO_CORE = "no softmax over keys, and no fused kernel, whose result is multiplied with values was seen in it"

SEVERAL_CORES = "its attention computes {count} patterns"

NO_BRANCH = {"attn_out": "the layer has no attention", "mlp_out": "the layer has no MLP"}
