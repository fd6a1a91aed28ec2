"""Where a branch computes its attention pattern, and what goes into that: a softmax, or a fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.recording import CUT, FUSED, PRODUCTS, NotedCall


@dataclass(eq=False)
class Core:
    """One computation of attention.

    Attributes:
        call: the softmax, or the fused kernel.
        pattern: after the softmax, `[batch, head, query, key]`; None of a fused kernel.
        keys: how many keys the values are taken of: one less than there are columns where one is a sink.
        q, k, v: what it reads, `[batch, head, pos, d_head]`; q and k are None where no product was seen.
        z: what it gives, `[batch, head, pos, d_head]`.
    """

    call: NotedCall
    pattern: Tensor | None
    keys: int
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    z: Tensor

    @property
    def n_heads(self) -> int:
        return self.z.shape[1]


def cores_of(calls: Sequence[NotedCall], batch: int) -> list[Core]:
    """The computations of attention among `calls`."""
    found = [
        _fused(call) if call.function == FUSED else _explicit(call, calls, batch) for call in calls if call.outputs
    ]
    return [core for core in found if core is not None]


def _fused(call: NotedCall) -> Core | None:
    given = {value.step: value.tensor for value in call.inputs}
    q, k, v = (given.get(str(index), given.get(name)) for index, name in enumerate(("query", "key", "value")))
    if q is None or k is None or v is None or q.ndim != 4:
        return None
    return Core(call, None, k.shape[-2], q, k, v, call.outputs[0].tensor)


def _explicit(call: NotedCall, calls: Sequence[NotedCall], batch: int) -> Core | None:
    if call.function != "softmax":
        return None
    pattern = call.outputs[0]
    beside = [one for one in calls if one.around is call.around]
    of_values = _product_with(pattern, [one for one in beside if one.begin > call.end])
    if of_values is None or len(of_values.inputs) != 2:
        return None
    read = of_values.inputs[0]
    before = [one for one in beside if one.end < call.begin and one.function in PRODUCTS]
    scores = [one for one in before if one.outputs and one.outputs[0].tensor.numel() == read.tensor.numel()]
    q, k = _factors(scores[-1]) if scores else (None, None)
    parts = [pattern.tensor, of_values.inputs[1].tensor, of_values.outputs[0].tensor]
    shaped = [_by_head(one, batch) for one in parts]
    if any(one is None for one in shaped):
        return None
    p, v, z = (one for one in shaped if one is not None)
    if p.shape[:2] != z.shape[:2] or v.shape[-2] != read.shape[-1] or v.shape[-1] != z.shape[-1]:
        return None
    q, k = (None if one is None else _by_head(one, batch) for one in (q, k))
    return Core(call, p, read.shape[-1], q, k, v, z)


def _product_with(pattern: Value, later: Sequence[NotedCall]) -> NotedCall | None:
    """The product of the pattern and the values: dropout, a cast, or the cut of a sink may be between."""
    known = {pattern.key}
    for call in later:
        if call.function in PRODUCTS and call.inputs and call.inputs[0].key in known:
            return call
        if call.function in CUT and any(value.key in known for value in call.inputs):
            known.update(value.key for value in call.outputs)
    return None


def _factors(product: NotedCall) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys of the product that the scores come from, keys the right way round."""
    if len(product.inputs) < 2:
        return None, None
    q, k = (value.tensor for value in product.inputs[-2:])
    return (q, k.transpose(-1, -2)) if product.function != "einsum" and k.ndim == q.ndim else (None, None)


def _by_head(value: Tensor, batch: int) -> Tensor | None:
    """`value` as `[batch, head, …, …]`; several heads may stand in the dimension of the batch."""
    if value.ndim == 4:
        return value
    return value.unflatten(0, (batch, -1)) if value.ndim == 3 and value.shape[0] % batch == 0 else None
