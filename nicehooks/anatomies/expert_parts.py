"""The parts of a mixture of experts, found in a recorded forward: what the router says, and what the experts give."""

from __future__ import annotations

from collections.abc import Sequence

from nicehooks.anatomies.noted_values import Value
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.recording import NotedCall
from nicehooks.anatomies.streams import Flow, Term

EXPERT_PARTS = ("router", "router_weights", "router_experts", "experts", "shared_experts")


def expert_parts(flow: Flow, term: Term, places: PartPlaces) -> None:
    """Writes into `places` where the parts of the mixture of experts are that adds `term`, if it is one."""
    choice = next((call for call in term.calls if _is_choice(call)), None)
    if choice is None:
        return
    chosen = flow.record.path(choice)
    places.put("router_weights", f"{chosen}[0]")
    places.put("router_experts", f"{chosen}[1]")
    logits = _logits(term.calls, choice)
    if logits is not None:
        places.put("router", flow.record.path(*logits))
    later = [call for call in term.calls if call.begin > choice.end and not call.function]
    experts = _whole(flow, [call for call in later if _is_about(call, choice)])
    if experts is not None:
        places.put("experts", _router_positional(flow, *experts))
        shared = _rest(flow, term, experts)
        if shared is not None:
            places.put("shared_experts", _router_positional(flow, *shared))


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
