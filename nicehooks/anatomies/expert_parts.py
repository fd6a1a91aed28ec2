"""The parts of a mixture of experts, found in a recorded forward: what the router says, and what the experts give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.recording import NotedCall
from nicehooks.anatomies.streams import Flow, Term
from nicehooks.anatomies.tables import Lacks
from nicehooks.paths.grammar import ModulePath

TOLD = ("experts_in", "router_experts", "router_weights")
"""The parts that the experts of a layer read, where they are one module that is told which of them to be."""


def expert_parts(flow: Flow, term: Term, places: PartPlaces) -> None:
    """Writes into `places` where the parts of the mixture of experts are that adds `term`, if it is one."""
    choices = [call for call in term.calls if _is_choice(call)]
    if not choices:
        return
    choice, told = _chosen_and_told(term.calls, choices)
    chosen = flow.record.path(choice)
    weights = None if told is None else _weights(told, choice)
    if told is None or weights is None:
        places.put("router_weights", f"{chosen}[0]")
        places.put("router_experts", f"{chosen}[1]")
    else:  # what the experts are told: groups may have been chosen first, and weights made to sum to 1
        which = next(value for value in told.inputs if value.key == choice.outputs[1].key)
        places.put("router_weights", flow.record.path(told, weights, read=True))
        places.put("router_experts", flow.record.path(told, which, read=True))
        places.put("experts_in", _experts_in(flow, told))
        places.role("experts", told.owner)
    logits = _logits(term.calls, choice)
    if logits is not None:
        places.put("router", flow.record.path(*logits))
    later = [call for call in term.calls if call.begin > choice.end and not call.function]
    experts = _whole(flow, [told] if told is not None else [call for call in later if _is_about(call, choice)])
    if experts is not None:
        places.put("experts", _router_positional(flow, *experts))
        shared = _rest(flow, term, experts)
        if shared is not None:
            places.put("shared_experts", _router_positional(flow, *shared))


def _chosen_and_told(calls: Sequence[NotedCall], choices: Sequence[NotedCall]) -> tuple[NotedCall, NotedCall | None]:
    """The choice of the experts, and the module that is told of it; of several, a first one may be of groups."""
    for choice in reversed(choices):
        key = choice.outputs[1].key
        later = (call for call in calls if call.begin > choice.end and not call.function)
        told = next((call for call in later if any(value.key == key for value in call.inputs)), None)
        if told is not None:
            return choice, told
    return choices[-1], None


def _weights(told: NotedCall, choice: NotedCall) -> Value | None:
    """What the module is told to multiply each of the chosen experts with."""
    shape = choice.outputs[1].shape
    return next((one for one in told.inputs if one.shape == shape and one.tensor.is_floating_point()), None)


def _experts_in(flow: Flow, told: NotedCall) -> str | Lacks:
    width = flow.layer.reads.shape[-1]
    read = next((one for one in told.inputs if one.shape[-1] == width and one.tensor.is_floating_point()), None)
    if read is None:
        return Lacks("its experts were not seen to read the stream")
    return flow.record.path(told, read, read=True) + ("/rows" if len(read.shape) == 2 else "")


def _is_choice(call: NotedCall) -> bool:
    """Whether the call chooses the experts of each token: the `topk` of scores, of which there are more."""
    if call.function != "topk" or len(call.outputs) != 2 or not call.inputs:
        return False
    return call.inputs[0].shape[-1] > call.outputs[1].shape[-1] or len(call.inputs[0].shape) == 2


def _logits(calls: Sequence[NotedCall], choice: NotedCall) -> tuple[NotedCall, Value] | None:
    """What the projection of the router gives: one number per expert."""
    count = choice.inputs[0].shape[-1]
    for call in calls:
        is_linear = not call.function or call.function == "linear"
        if call.begin < choice.begin and is_linear:
            for value in call.outputs:
                if value.shape[-1] == count and value.tensor.is_floating_point():
                    return call, value
    return None


def _is_about(call: NotedCall, choice: NotedCall) -> bool:
    """Whether the module is told which experts were chosen."""
    which = choice.outputs[1]
    return any(not value.tensor.is_floating_point() and value.shape == which.shape for value in call.inputs)


def _whole(flow: Flow, calls: Sequence[NotedCall]) -> tuple[NotedCall, Value] | None:
    """The first of these modules that gives a stream, and what it gives."""
    width = flow.layer.reads.shape[-1]
    found = ((call, value) for call in calls for value in call.outputs if value.shape[-1] == width)
    return next(found, None)


def _rest(flow: Flow, term: Term, experts: tuple[NotedCall, Value]) -> tuple[NotedCall, Value] | None:
    """What is added to the experts to make the term: the shared expert."""
    for sum_ in flow.sums.get(term.key, []):
        keys = [value.key for value in sum_.inputs]
        if experts[1].key in keys:
            other = next((key for key in keys if key != experts[1].key), None)
            return None if other is None else next(iter(flow.made.get(other, [])), None)
    return None


def _router_positional(flow: Flow, call: NotedCall, value: Value) -> str:
    return flow.record.path(call, value) + ("/rows" if len(value.shape) == 2 else "")


def each_choice(experts: nn.Module, paths: list[str], told: list[Tensor]) -> Tensor:
    """What `experts` give for one choice after the other, `[batch, pos, choice, d_model]`.

    Args:
        experts: the module.
        paths: where it was told: of the stream, of the choices, of their weights.
        told: the values there.
    """
    stream, which, weights = told
    rows = stream.flatten(0, 1) if paths[0].endswith("/rows") else stream
    steps = [ModulePath.parse(path).chain[0] for path in paths]
    every: list[Tensor] = []
    for choice in range(which.shape[-1]):
        one = slice(choice, choice + 1)
        given = dict(zip(steps, (rows, which[..., one], weights[..., one]), strict=True))
        in_order = [given[number] for number in sorted(step for step in given if isinstance(step, int))]
        made = experts(*in_order, **{step: value for step, value in given.items() if isinstance(step, str)})
        every.append(made.reshape(stream.shape))
    return torch.stack(every, 2)
