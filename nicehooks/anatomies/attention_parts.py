"""The parts of an attention branch, found in a recorded forward: queries, keys, values, scores, pattern and z."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nicehooks.anatomies.columns import columns_of, columns_path, leading_columns_of, without_repeats
from nicehooks.anatomies.cores import Core
from nicehooks.anatomies.mlp_parts import is_packed, is_projection
from nicehooks.anatomies.noted_values import Value, key_of
from nicehooks.anatomies.packed import ONE_ROW
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.recording import SCALING, NotedCall
from nicehooks.anatomies.streams import Flow, is_norm
from nicehooks.anatomies.tables import Lacks
from nicehooks.ports.attention import FUSED_KERNELS

QKV = ("q", "k", "v")


def attention_parts(flow: Flow, calls: Sequence[NotedCall], core: Core, places: PartPlaces) -> None:
    """Writes into `places` where the parts of the attention `core` are, which is among the `calls` of a branch."""
    _owner(flow, core, places)
    _pattern(flow, core, places)
    _z(flow, core, places)
    before = [call for call in calls if call.end < core.call.begin or call.begin < core.call.begin < call.end]
    for what, target in zip(QKV, (core.q, core.k, core.v), strict=True):
        search = _Projection(flow, before, core, what)
        found = None if target is None else search.path_to(target)
        places.put(what, Lacks(NO_PROJECTION.format(what=what)) if found is None else found[0])
        if found is not None:
            places.latent |= frozenset() if _reads_stream(flow, found[2]) else {what}
            places.heads[what] = found[1]
            places.compared[what] = (
                FIRST if what != "v" and not search.is_normed else NORMED_HEADS if search.is_normed else READ
            )


def _reads_stream(flow: Flow, projection: NotedCall) -> bool:
    """Whether what it reads is the stream, or a norm of it; True where nothing is known of the stream."""
    if not flow.stream or projection.function:
        return True
    normed = {call.outputs[0].key for call in flow.calls if flow.is_norm_of_stream(call)}
    return any(value.key in flow.stream or value.key in normed for value in projection.inputs)


def _owner(flow: Flow, core: Core, places: PartPlaces) -> None:
    owner = core.call.around
    if owner is not None:
        places.role("attn", owner.owner)
        stream = [value for value in owner.inputs if value.shape == flow.layer.reads.shape]
        if stream:
            places.put("attn_in", flow.record.path(owner, stream[0], read=True))


def _pattern(flow: Flow, core: Core, places: PartPlaces) -> None:
    path, row = flow.record.path(core.call), ONE_ROW if core.call.outputs[0].is_in_row else ""
    places.heads["scores"] = places.heads["pattern"] = core.n_heads
    if core.call.function in FUSED_KERNELS:
        places.put("scores", f"{path}.scores")
        places.put("pattern", f"{path}.pattern")
    elif core.call.outputs[0].tensor.ndim != 4:
        places.put("scores", Lacks(PACKED_HEADS))
        shaped = _as_heads(flow, core)
        places.put("pattern", Lacks(PACKED_HEADS) if shaped is None else flow.record.path(*shaped))
    else:
        cut = (
            ""
            if core.pattern is None or core.keys == core.pattern.shape[-1]
            else f"[:, :, :, :{core.keys - core.pattern.shape[-1]}]"
        )
        places.put("scores", f"{path}.input[0]{row}{cut}")
        places.put("pattern", f"{path}{row}{cut}")


def _as_heads(flow: Flow, core: Core) -> tuple[NotedCall, Value] | None:
    """Where the pattern is seen with a dimension of its own for the heads."""
    if core.pattern is None:
        return None
    made = flow.made.get(key_of(core.pattern), [])
    return next(
        ((call, value) for call, value in made if call.function and value.shape == tuple(core.pattern.shape)), None
    )


def _z(flow: Flow, core: Core, places: PartPlaces) -> None:
    z = core.z.transpose(1, 2)
    key, heads = key_of(z), core.n_heads
    places.heads["z"] = heads
    read = [
        (call, value) for call, value in flow.read.get(key, []) if not call.function and call.begin > core.call.begin
    ]
    for call, value in sorted(read, key=lambda pair: not is_projection(pair[0])):
        chain = _to_heads(value, heads, z)
        if chain is not None:
            places.put("z", flow.record.path(call, value, read=True) + chain)
            if is_projection(call):
                places.role("attn_proj", call.owner)
            return
    for call, value in flow.made.get(key, []):
        chain = "" if value.shape == tuple(z.shape) else _to_heads(value, heads, z)
        if chain is not None and call.function and call.begin > core.call.begin:
            places.put("z", flow.record.path(call, value) + chain)
            return
    places.put("z", Lacks("no module and no function gives the sums of values with positions before heads"))


def _to_heads(value: Value, heads: int, z: Tensor) -> str | None:
    batch, positions, _, size = z.shape
    if value.shape == (batch, positions, heads * size):
        return f"/{heads}"
    return f"/rows/{heads}" if value.shape == (batch * positions, heads * size) else None


def _has_matrix(call: NotedCall) -> bool:
    module = call.module
    return module is not None and (is_packed(module) or any(one.ndim > 1 for one in module.parameters()))


class _Projection:
    """The search for one of queries, keys and values among what the projections before the attention gave."""

    def __init__(self, flow: Flow, before: Sequence[NotedCall], core: Core, what: str) -> None:
        self.flow = flow
        self.what = what
        self.core = core
        self.before = list(before)
        scaled = [number for call in before if call.function in SCALING for number in call.numbers if number]
        self.factors = tuple(dict.fromkeys([1.0, *scaled, *(1 / number for number in scaled)]))
        self.batch = core.z.shape[0]
        self.is_normed = False
        self.norms: list[NotedCall] = []

    def path_to(self, seen: Tensor) -> tuple[str, int, NotedCall] | None:
        """Where `seen`, `[batch, head, pos, d_head]`, comes from: the path, its heads, and the projection.

        Rotary embedding does nothing at the first position, so queries and keys are compared there.
        """
        target, rows = seen.transpose(1, 2), slice(None) if self.what == "v" else slice(0, 1)
        found = self._among_projections(target, rows)
        while found is None:
            normed = self._through_norm(target, rows)
            if normed is None:
                return self._among_functions(target, rows)
            target, self.is_normed = normed, True
            found = self._among_projections(target, rows)
        return found

    def _among_projections(self, target: Tensor, rows: slice) -> tuple[str, int, NotedCall] | None:
        for call in self.before:
            if call.function or not _has_matrix(call):
                continue
            for value in call.outputs:
                given, chain = self._with_positions(value, target.shape[1])
                if given is None or given.shape[-1] < 2 or not given.is_floating_point():
                    continue
                path = self._columns(target[:, rows], given[:, rows])
                if path is not None:
                    return self.flow.record.path(call, value) + chain + path[0], path[1], call
        return None

    def _with_positions(self, value: Value, positions: int) -> tuple[Tensor | None, str]:
        shape = value.shape
        if len(shape) == 4 and shape[:3] == (self.batch, 1, positions):  # latent attention has one head there
            return value.tensor[:, 0], "[:, 0]"
        if len(shape) == 3 and shape[:2] == (self.batch, positions):
            return value.tensor, ""
        if len(shape) == 2 and shape[0] == self.batch * positions:
            return value.tensor.unflatten(0, (self.batch, positions)), "/rows"
        return None, ""

    def _columns(self, target: Tensor, given: Tensor) -> tuple[str, int] | None:
        factors = self.factors
        if target[0, 0].numel() % given.shape[-1] == 0:  # a factor of rotary embedding (YaRN), say
            repeats = target[0, 0].numel() // given.shape[-1]
            factors = (*factors, float(target[0, 0].norm() / given[0, 0].norm().clamp_min(1e-30)) * repeats**-0.5)
        columns = columns_of(target, given, factors)
        if columns is None and self.what == "k":
            columns = leading_columns_of(target, given)
        if columns is None:
            return None
        columns = columns if self.what == "q" else without_repeats(columns)
        path = None if columns is None else columns_path(columns, given.shape[-1])
        return None if path is None or columns is None else (path, len(columns))

    def _among_functions(self, target: Tensor, rows: slice) -> tuple[str, int, NotedCall] | None:
        """A view that has the heads already, where no subscript of the projection would."""
        batch, positions, heads, size = target.shape
        for call in self.before:
            if not call.function or call.around is not self.core.call.around:
                continue
            for value in call.outputs:
                fits = (
                    value.shape[:2] == (batch, positions) and value.shape[3:] == (size,) and heads % value.shape[2] == 0
                )
                if fits and len(value.shape) == 4 and value.tensor.is_floating_point():
                    groups = heads // value.shape[2]
                    seen = value.tensor.repeat_interleave(groups, 2)
                    if any(_close(seen[:, rows] * factor, target[:, rows]) for factor in self.factors):
                        return self.flow.record.path(call, value), value.shape[2], call
        return None

    def _through_norm(self, target: Tensor, rows: slice) -> Tensor | None:
        """What the norm of queries or keys reads that gives `target`."""
        for call in reversed(self.before):
            if not is_norm(call) or call in self.norms:
                continue
            for view in self._views(call.outputs[0].tensor, target):
                if _close(view(call.outputs[0].tensor)[:, rows], target[:, rows]):
                    self.norms.append(call)
                    return view(call.inputs[0].tensor)
        return None

    def _views(self, value: Tensor, target: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        batch, positions, heads, size = target.shape
        if value.ndim == 4 and value.shape[-1] == size:
            for swapped in (False, True):
                shape = value.transpose(1, 2).shape if swapped else value.shape
                if shape[:2] == (batch, positions) and heads % shape[2] == 0:
                    yield lambda one, swapped=swapped, n=heads // shape[2]: (
                        one.transpose(1, 2) if swapped else one
                    ).repeat_interleave(n, 2)
        fits = value.ndim == 3 and value.shape[:2] == (batch, positions) and value.shape[2] % size == 0
        if fits and (heads * size) % value.shape[2] == 0:
            yield lambda one: one.unflatten(-1, (-1, size)).repeat_interleave(heads * size // one.shape[2], 2)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


NO_PROJECTION = "no projection of the model gives the {what} that its attention reads, each head in columns of its own"

READ = "it is what attention reads"

FIRST = "it is what attention reads, at the first position"

NORMED_HEADS = "the norm of it is what attention reads, at the first position"

PACKED_HEADS = "its attention has the heads in the dimension of the batch"
