"""`acdc`: a circuit by exact patching, edge by edge: what can go without the metric noticing goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.errors import TreeMismatch
from nicehooks.experiments.circuits import Circuit, check_circuit_of, connected, edge_at, edges_in
from nicehooks.experiments.edge_effects import TwoRuns
from nicehooks.experiments.estimates import Metric
from nicehooks.experiments.given import check_model_and_metric, threshold_given
from nicehooks.experiments.wiring import Wiring


def acdc(
    model: nn.Module,
    values: Any,
    metric: Metric,
    *args: Any,
    threshold: float,
    start: Circuit | None = None,
    check: bool = True,
    **kwargs: Any,
) -> Circuit:
    """A circuit by greedy exact patching (Conmy et al. 2023, "Towards Automated Circuit Discovery").

    It goes through the receivers from the logits back, and patches each edge into them, on top of all that was patched
    before. Where that moves the metric by less than `threshold`, the edge stays patched, and is not in the circuit.
    What only leads to such edges is not tried. It takes one run for each edge that is tried.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)).eval()
    >>> parts, difference = anatomy(model), lambda output: output.logits[:, -1, 8] - output.logits[:, -1, 9]
    >>> with capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
    ...     _ = model(torch.tensor([[3, 1, 7, 1, 5]]))
    >>> len(acdc(model, values, difference, torch.tensor([[3, 1, 4, 1, 5]]), threshold=100.0))
    0

    Args:
        model: a transformer that `anatomy` knows, with its norms on the branches.
        values: what patched edges carry, as for `edges`.
        metric: `metric(output)` is a scalar tensor, or one number per example, of which the mean counts.
        args: what the model is called with.
        threshold: how far an edge has to move the metric to stay.
        start: a circuit to begin from: only its edges are tried, the others are patched. All edges if None.
        check: as for `edges`.
        kwargs: what the model is called with.

    Raises:
        TypeError, ValueError: `threshold` is no number.
        TreeMismatch: `start` is of a model with other parts; the metric is no number, or NaN.
    """
    check_model_and_metric(model, metric, "acdc")
    threshold = threshold_given(threshold, "acdc(…, threshold")
    wiring = Wiring(model)
    if start is not None:
        check_circuit_of(wiring, start, "acdc")
    runs = TwoRuns.of(wiring, values, metric, args, kwargs, "acdc", check)
    kept = wiring.there.clone() if start is None else start.mask
    effects = torch.zeros(kept.shape)
    now = runs.patched(wiring.there & ~kept).mean()
    for receiver in reversed(range(len(wiring.receivers))):
        if not _leads_on(wiring, kept, receiver):
            kept[:, receiver] = False
            continue
        for sender in reversed(kept[:, receiver].nonzero().flatten().tolist()):
            kept[sender, receiver] = False
            without = runs.patched(wiring.there & ~kept).mean()
            if without.isnan():
                raise TreeMismatch(NAN_WITHOUT.format(edge=edge_at(wiring, effects, sender, receiver)))
            if (without - now).abs() < threshold:
                now = without
            else:
                kept[sender, receiver] = True
                effects[sender, receiver] = without - now
    found = connected(wiring, kept)
    return Circuit(wiring, [edge_at(wiring, effects, *place) for place in edges_in(found)])


NAN_WITHOUT = "acdc: the metric is NaN without the edge {edge.sender} → {edge.receiver}, so nothing can be told of it."


def _leads_on(wiring: Wiring, kept: Tensor, receiver: int) -> bool:
    """Whether what the receiver is an input of still writes to something; what comes later was tried already."""
    into = [wiring.place_of_sender[node] for node in wiring.receivers[receiver].into if node != "logits"]
    return not into or bool(kept[into].any())
