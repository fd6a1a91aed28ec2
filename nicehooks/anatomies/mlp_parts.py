"""The parts of an MLP branch, found in a recorded forward: what it reads, its neurons, and its projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nicehooks.anatomies.columns import columns_of, columns_path
from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.recording import ACTIVATIONS, NotedCall
from nicehooks.anatomies.streams import Flow, Term, is_norm
from nicehooks.anatomies.tables import Lacks


def mlp_parts(flow: Flow, term: Term, places: PartPlaces) -> None:
    """Writes into `places` where the parts of the MLP are that adds `term` to the stream."""
    projections = [call for call in term.calls if is_projection(call)]
    last = flow.source(term.key, projections)
    reads = next((call for call in term.calls if not call.function and not is_norm(call) and call.inputs), None)
    if reads is not None and (path := _positional(flow, reads, reads.inputs[0], read=True)) is not None:
        places.put("mlp_in", path)
        places.role("mlp", reads.owner)
    if last is None:
        reason = SEVERAL_MLPS if len(projections) != 1 else NO_NEURONS
        places.put("mlp_post", Lacks(reason))
        places.put("mlp_pre", Lacks(reason))
        return
    path = _positional(flow, last, last.inputs[0], read=True)
    places.put("mlp_post", Lacks(NO_NEURONS) if path is None else path)
    places.role("mlp_proj", last.owner)
    before = [call for call in projections if call.end < last.begin]
    pre = _pre(flow, term.calls, before)
    places.put("mlp_pre", Lacks(NO_NEURONS) if pre is None else pre[0])
    if pre is not None:
        places.role("mlp_act", pre[1].owner)


def _pre(flow: Flow, calls: Sequence[NotedCall], before: Sequence[NotedCall]) -> tuple[str, NotedCall] | None:
    """The path of what the activation function takes: what a projection gives, or some of its columns."""
    for call in calls:
        if not _is_activation(call) or not call.inputs:
            continue
        for projection in before:
            for value in projection.outputs:
                path = _positional(flow, projection, value)
                if path is not None and value.key == call.inputs[0].key:
                    return path, projection
                columns = _mlp_columns(call.inputs[0], value)
                if path is not None and columns is not None:
                    return path + columns, projection
    return None


def _mlp_columns(taken: Value, given: Value) -> str | None:
    """The subscripts of `taken` on `given`, of which it is a slice."""
    if taken.shape[:-1] != given.shape[:-1] or taken.shape[-1] >= given.shape[-1] or len(given.shape) != 3:
        return None
    columns = columns_of(taken.tensor.unsqueeze(2), given.tensor)
    path = None if columns is None else columns_path(columns, given.shape[-1])
    return None if path is None else path.removesuffix("/1")


def _is_activation(call: NotedCall) -> bool:
    if call.function:
        return call.function in ACTIVATIONS
    module = call.module
    return module is not None and not any(True for _ in module.parameters()) and not isinstance(module, nn.Dropout)


def _positional(flow: Flow, call: NotedCall, value: Value, *, read: bool = False) -> str | None:
    """The path of a value with batch and positions in front, or None if it has others."""
    batch, positions = flow.layer.reads.shape[:2]
    path = flow.record.path(call, value, read=read)
    if value.shape[:2] == (batch, positions) and len(value.shape) == 3:
        return path
    return f"{path}/rows" if value.shape[:1] == (batch * positions,) and len(value.shape) == 2 else None


def is_projection(call: NotedCall) -> bool:
    """Whether the call is that of a linear layer: a module with a matrix of its own, or an affine one around it."""
    if call.function or call.module is None or len(call.inputs) != 1 or len(call.outputs) != 1:
        return False
    if is_packed(call.module):
        return True
    if isinstance(call.module, nn.Embedding) or not any(one.ndim == 2 for one in call.module.parameters()):
        return False
    return any(one.ndim == 2 for one in call.module.parameters(recurse=False)) or _is_affine(call)


def is_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer of torch's own quantisation: its matrix is no parameter, a method gives it."""
    weight = getattr(module, "weight", None)
    return callable(weight) and hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_affine(call: NotedCall) -> bool:
    """Tried on the module: of a linear layer with adapters beside it, say."""
    x, module = call.inputs[0].tensor, call.module
    assert module is not None
    try:
        with torch.no_grad():
            none, once, twice = (module(x * factor) for factor in (0.0, 1.0, 2.0))
            return bool(torch.allclose(twice - once, once - none, rtol=1e-3, atol=1e-4 * float(once.abs().max())))
    except Exception:  # it takes more than one value, or gives more
        return False


SEVERAL_MLPS = "its MLP is no chain of projections: see router and experts of a mixture of experts"

NO_NEURONS = "no projection of the MLP was seen that reads or gives its neurons"
