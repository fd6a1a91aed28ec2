"""Where a branch computes its attention pattern, and what goes into that: a softmax, or a fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.recording import CUT, PRODUCTS, NotedCall
from nicehooks.ports.attention import FUSED_KERNELS


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
        _fused(call) if call.function in FUSED_KERNELS else _explicit(call, calls, batch)
        for call in calls
        if call.outputs
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
    found = _product_with(pattern, [one for one in beside if one.begin > call.end])
    if found is None or len(found[0].inputs) != 2:
        return None
    of_values, side = found
    read = of_values.inputs[side]
    before = [one for one in beside if one.end < call.begin and one.function in PRODUCTS]
    scores = [one for one in before if one.outputs and one.outputs[0].tensor.numel() == read.tensor.numel()]
    q, k = _factors(scores[-1]) if scores else (None, None)
    shaped = _by_letters(of_values, pattern.tensor, batch, side)
    if any(one is None for one in shaped):
        return None
    p, v, z = (one for one in shaped if one is not None)
    if p.shape[:2] != z.shape[:2] or v.shape[-2] != read.shape[-1] or v.shape[-1] != z.shape[-1]:
        return None
    q, k = (None if one is None else _by_head(one, batch) for one in (q, k))
    return Core(call, p, read.shape[-1], q, k, v, z)


def _product_with(pattern: Value, later: Sequence[NotedCall]) -> tuple[NotedCall, int] | None:
    """The product of the pattern and the values, and which factor the pattern is.

    Dropout, a cast, or the cut of a sink may be between.
    """
    known = {pattern.key}
    for call in later:
        if call.function in PRODUCTS and call.inputs and call.inputs[0].key in known:
            return call, 0
        if _letters(call) is not None and call.inputs[1].key in known:
            return call, 1
        if call.function in CUT and any(value.key in known for value in call.inputs):
            known.update(value.key for value in call.outputs)
    return None


def _by_letters(product: NotedCall, pattern: Tensor, batch: int, side: int) -> list[Tensor | None]:
    """The pattern, the values and what becomes of them, `[batch, head, …, …]` each."""
    parts = [pattern, product.inputs[1 - side].tensor, product.outputs[0].tensor]
    letters = _letters(product)
    if letters is None:
        return [_by_head(one, batch) for one in parts]
    of_pattern, of_values, of_result = letters = (letters[side], letters[1 - side], letters[2])
    both = [one for one in of_pattern if one in of_values and one in of_result]
    query = [one for one in of_pattern if one in of_result and one not in of_values]
    key = [one for one in of_pattern if one in of_values and one not in of_result]
    wide = [one for one in of_values if one in of_result and one not in of_pattern]
    if [len(one) for one in (both, query, key, wide)] != [2, 1, 1, 1]:
        return [None, None, None]
    orders = [[*both, *query, *key], [*both, *key, *wide], [*both, *query, *wide]]
    return [_ordered(*pair) for pair in zip(parts, letters, orders, strict=True)]


def _letters(product: NotedCall) -> tuple[str, str, str] | None:
    """The dimensions of both factors and of the result of an `einsum`; None of another product."""
    if product.function != "einsum" or len(product.inputs) != 2 or len(product.words) != 1:
        return None
    read, _, given = product.words[0].replace(" ", "").partition("->")
    first, _, second = read.partition(",")
    shapes = (product.inputs[0].shape, product.inputs[1].shape, product.outputs[0].shape)
    fits = all(
        len(set(one)) == len(one) == len(shape) for one, shape in zip((first, second, given), shapes, strict=True)
    )
    return (first, second, given) if fits else None


def _ordered(value: Tensor, letters: str, order: list[str]) -> Tensor:
    return value.permute([letters.index(one) for one in order])


def _factors(product: NotedCall) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys of the product that the scores come from, keys the right way round."""
    if len(product.inputs) < 2:
        return None, None
    if (letters := _letters(product)) is not None:
        return _factors_of_einsum(product, letters)
    q, k = (value.tensor for value in product.inputs[-2:])
    return (q, k.transpose(-1, -2)) if product.function != "einsum" and k.ndim == q.ndim else (None, None)


def _factors_of_einsum(product: NotedCall, letters: tuple[str, str, str]) -> tuple[Tensor | None, Tensor | None]:
    of_queries, of_keys, of_scores = letters
    if len(of_scores) != 4 or len(of_queries) != 4 or len(of_keys) != 4:
        return None, None
    *both, query, key = of_scores
    wide = [one for one in of_queries if one in of_keys and one not in of_scores]
    first, second = (value.tensor for value in product.inputs)
    if query in of_keys:  # keys come first
        of_queries, of_keys, first, second = of_keys, of_queries, second, first
    if len(wide) != 1 or {*both, query, *wide} != {*of_queries} or {*both, key, *wide} != {*of_keys}:
        return None, None
    return _ordered(first, of_queries, [*both, query, *wide]), _ordered(second, of_keys, [*both, key, *wide])


def _by_head(value: Tensor, batch: int) -> Tensor | None:
    """`value` as `[batch, head, …, …]`; several heads may stand in the dimension of the batch."""
    if value.ndim == 4:
        return value
    return value.unflatten(0, (batch, -1)) if value.ndim == 3 and value.shape[0] % batch == 0 else None
