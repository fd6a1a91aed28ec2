"""What each sender writes to the residual stream, in one run or in another."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nicehooks.anatomies.linear import results_of_heads
from nicehooks.anatomies.parts import Part
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.suspending import suspend
from nicehooks.errors import NotCaptured
from nicehooks.experiments.wiring import Wiring
from nicehooks.values import trees


def written_parts(wiring: Wiring) -> list[Part]:
    """The parts from which one knows what each sender writes."""
    body = wiring.body
    per_layer = [(body.z[layer], *((body.mlp_out[layer],) if wiring.has_mlp else ())) for layer in range(body.n_layers)]
    return [body.resid_pre[0], *[part for parts in per_layer for part in parts]]


def base_of(
    wiring: Wiring, args: tuple[Any, ...], kwargs: Mapping[str, Any], *more: Part
) -> tuple[Any, ActivationCache]:
    """The output of a run, and what was written in it."""
    with torch.no_grad(), capture(wiring.model, *written_parts(wiring), *more) as seen:
        output = wiring.model(*args, **kwargs)
    return output, seen


def values_for(wiring: Wiring, values: Any, base: ActivationCache) -> dict[str, Tensor]:
    """By part, what `values` (another run, means, or a number) put in the place of what is in `base`.

    Raises:
        NotCaptured: `values` lack a part.
        TypeError: they are a text, or a function.
    """
    parts = written_parts(wiring)
    if isinstance(values, str) or callable(values):
        raise TypeError(NO_RUN_OR_NUMBER.format(values=values if callable(values) else repr(values)))
    values = float(values) if isinstance(values, Real) else values
    if not isinstance(values, Mapping):
        return {str(part): trees.assign(base[part], values) for part in parts}
    given = values if isinstance(values, ActivationCache) else ActivationCache({str(at): values[at] for at in values})
    missing = [part.what for part in parts if part not in given]
    if missing:
        mlp = ", parts.mlp_out" if wiring.has_mlp else ""
        raise NotCaptured(NOT_WRITTEN.format(missing=", ".join(missing[:3]), mlp=mlp))
    return {str(part): trees.assign(base[part], given[part]) for part in parts}


NO_RUN_OR_NUMBER = (
    "edges(model, values, …) takes a cache from another run or of means, or a number, as values, not {values}. "
    "'resample' and functions are of sweep and attribute."
)

NOT_WRITTEN = (
    "the values of edges are to have what every part writes, but lack {missing}, …. Capture it in the other run:\n"
    "    parts = anatomy(model)\n"
    "    with capture(model, parts.resid_pre[0], parts.z{mlp}) as values:\n"
    "        model(…)"
)


def written_by(wiring: Wiring, part: Part, value: Tensor) -> Tensor:
    """What the senders of one part write, `[sender, batch, pos, d_model]`: the heads of `z`, or the one of another."""
    if not part.what.startswith("z["):
        return value[None]
    layer = int(part.what[2:].partition("]")[0])
    with suspend(wiring.body.module("block", layer)):
        return results_of_heads(wiring.body, layer, value)[0].movedim(-2, 0)


def written(wiring: Wiring, values: Mapping[str, Tensor]) -> Tensor:
    """What every sender writes, `[sender, batch, pos, d_model]`."""
    with torch.no_grad():
        return torch.cat([written_by(wiring, part, values[str(part)]) for part in written_parts(wiring)])
