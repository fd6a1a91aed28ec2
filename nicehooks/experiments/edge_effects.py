"""`edges`: the effect of one part of a transformer through another, for every pair or for chosen ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.differentiating import grad_at
from nicehooks.contexts.patching import patch
from nicehooks.errors import SiteNotFound, TreeMismatch, UnsupportedModule
from nicehooks.experiments.contributions import base_of, values_for, written, written_parts
from nicehooks.experiments.effects import Axis, Effects
from nicehooks.experiments.estimates import Metric
from nicehooks.experiments.given import check_model_and_metric, count_given
from nicehooks.experiments.nodes import Nodes, SizesOfNodes
from nicehooks.experiments.reading import slopes_of
from nicehooks.experiments.rewiring import rewired
from nicehooks.experiments.runs import Run, refuse_steps, repeatable
from nicehooks.experiments.telling import Tell, Telling, teller
from nicehooks.experiments.wiring import Wiring


class Edges(Effects):
    """The effect of each sender through each receiver, `[sender, receiver]`; NaN where there is no such edge."""

    wiring: Nodes

    def _beside(self) -> dict[str, Any]:
        return {"nodes": json.dumps([self.wiring.kind, self.wiring.sizes])}

    def _take_from(self, content: Mapping[str, Any]) -> None:
        kind, sizes = json.loads(content["nodes"])
        self.wiring = Nodes(kind, SizesOfNodes(*sizes))

    def _take_over(self, other: Edges, low: float, span: float) -> None:
        self.wiring = other.wiring

    def __repr__(self) -> str:
        there = self.values[~self.values.isnan()]
        span = f"from {there.min().item():.4g} to {there.max().item():.4g}, " if there.numel() else ""
        return f"Edges({there.numel()} edges, {span}baseline {self.baseline.mean().item():.4g})"


@dataclass(frozen=True)
class TwoRuns:
    """A run, what each sender writes in it, and what it would write by the values of another.

    Attributes:
        wiring: the nodes of the model.
        run: the model, what it is called with, and the metric of its output.
        base: what was captured in the run.
        baseline: its metric.
        target: the values that are to be put in, by part.
        new: what each sender writes by these, `[sender, batch, pos, d_model]`.
    """

    wiring: Wiring
    run: Run
    base: ActivationCache
    baseline: Tensor
    target: Mapping[str, Tensor]
    new: Tensor

    @staticmethod
    def of(
        wiring: Wiring,
        values: Any,
        metric: Metric,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        verb: str = "edges",
        check: bool = True,
    ) -> TwoRuns:
        """Runs the model once, without an intervention; with `check`, it may draw no random numbers."""
        refuse_steps(wiring.model, verb)
        run = Run(wiring.model, metric, args, kwargs)
        run.refuse_no_examples(verb)
        with repeatable(wiring.model, verb, check):
            output, base = base_of(wiring, *run.given())
        target = values_for(wiring, values, base)
        baseline = run.measured(output).detach()
        if baseline.isnan().any():
            raise TreeMismatch(NAN_METRIC.format(verb=verb))
        return TwoRuns(wiring, run, base, baseline, target, written(wiring, target))

    def patched(self, edges: Tensor) -> Tensor:
        """The metric of the run with these edges, `[sender, receiver]`, patched."""
        with torch.no_grad(), rewired(self.wiring, edges, self.new):
            return self.run.measured(self.run.output()).detach()


NAN_METRIC = "{verb}: the metric is NaN in the run without an intervention, so nothing can be told from it."


def edges(
    model: nn.Module,
    values: Any,
    metric: Metric,
    *args: Any,
    method: str = "eap-ig",
    senders: Any = None,
    receivers: Any = None,
    points: int = 5,
    check: bool = True,
    progress: Telling = False,
    **kwargs: Any,
) -> Edges:
    """The effect of one part of a transformer *through* another: for each pair, or for chosen ones.

    What a part reads is a sum of what the parts before it have written. An edge's effect is that of replacing one term
    of the sum, at one reader, by what `values` have for it, while every other reader gets the old one.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)).eval()
    >>> clean, corrupted = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[3, 1, 7, 1, 5]])
    >>> parts = anatomy(model)
    >>> with capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
    ...     _ = model(corrupted)
    >>> difference = lambda output: output.logits[:, -1, 8] - output.logits[:, -1, 9]
    >>> edges(model, values, difference, clean).values.shape
    torch.Size([7, 15])
    >>> chosen = edges(model, values, difference, clean, method="exact", senders=parts.z[0].head(1), receivers="logits")
    >>> chosen.axes
    (Axis(name='sender', labels=('z[0].head(1)',)), Axis(name='receiver', labels=('logits',)))

    Senders are `embed` (what the first layer reads), `z[l].head(h)` and `mlp_out[l]`, receivers `q[l].head(h)`, `k`,
    `v`, `mlp_in[l]` and `logits`, as `anatomy` calls them. A whole layer, `attn_out[l]` or `q[l]`, stands for its heads
    together.

    Args:
        model: a transformer that `anatomy` knows, with its norms on the branches.
        values: what takes the place of what parts write: a cache with `resid_pre[0]`, `z` and `mlp_out` from another
            run, or means of these; or a number.
        metric: `metric(output)` is a scalar tensor, or one number per example, `[batch]`.
        args: what the model is called with, in the run that is intervened on.
        method: `"eap"`, edge attribution patching (Syed et al. 2023): the change times the gradient of the metric at
            the reader, from one forward and one backward for all pairs; `"eap-ig"`, the mean of that gradient over
            `points` runs between the embeddings of the run and those in `values` (Hanna et al. 2024); `"exact"`, path
            patching (Goldowsky-Dill et al. 2023) with one run for each pair.
        senders: which senders: parts, or their names; all if None.
        receivers: which receivers, likewise.
        points: how many runs `"eap-ig"` takes.
        check: refuses a model that draws random numbers, as with dropout in training mode.
        progress: shows how far it is, in edges for `"exact"` and in runs otherwise; or a function of how many are done,
            and of how many there are.
        kwargs: what the model is called with.

    Raises:
        NotCaptured: `values` lack a part; the message has the line that captures it.
        SiteNotFound: there is no such sender or receiver, or no edge between those that were chosen.
        SweepMismatch: the model draws random numbers.
        TreeMismatch: the metric is no number, or one per example, or NaN; a value does not fit.
        TypeError: `values` is a text.
        UnsupportedModule: the model has no anatomy, or one of an encoder and a decoder, or its norms are on the stream;
            `method` is none of these.
    """
    if method not in METHODS_OF_EDGES:
        known = ", ".join(map(repr, METHODS_OF_EDGES))
        raise UnsupportedModule(f"edges(…, method={method!r}): the methods are {known}.")
    check_model_and_metric(model, metric, "edges")
    points = count_given(points, "edges(…, points", 1)
    wiring = Wiring(model)
    names = wiring.chosen(senders, True), wiring.chosen(receivers, False)
    there = torch.tensor([[bool(wiring.there[s][:, r].any()) for r in names[1].values()] for s in names[0].values()])
    if not there.any():
        raise SiteNotFound(NO_EDGE.format(sender=next(iter(names[0])), receiver=next(iter(names[1]))))
    runs = TwoRuns.of(wiring, values, metric, args, kwargs, "edges", check)
    # [sender, receiver], with [batch] where the metric has it
    each = METHODS_OF_EDGES[method](runs, *names, points, teller(progress, "edges"))
    return _as_edges(wiring, each, there.to(each.device), names, runs.baseline, NOTES_ON_EDGES[method])


NO_EDGE = (
    "edges(…, senders=…, receivers=…): no edge leads from any of these to any of those: {sender} writes after "
    "{receiver} has read. Are they the wrong way round?"
)

Places = Mapping[str, list[int]]


def _as_edges(
    wiring: Wiring, each: Tensor, there: Tensor, names: tuple[Places, Places], baseline: Tensor, note: str
) -> Edges:
    examples = each.masked_fill(~there[..., None], float("nan")) if baseline.ndim else None
    values = each.masked_fill(~there, float("nan")) if examples is None else examples.mean(-1)
    axes = [Axis(what, tuple(places)) for what, places in zip(("sender", "receiver"), names, strict=True)]
    sites = [f"{sender} → {receiver}" for sender in names[0] for receiver in names[1]]
    found = Edges(values, axes, baseline, sites, examples, [note])
    found.wiring = wiring
    return found


# --- the methods ------------------------------------------------------------------------------------------------------


def _exactly(runs: TwoRuns, senders: Places, receivers: Places, points: int, tell: Tell) -> Tensor:
    there = runs.wiring.there
    rows: list[Tensor] = []
    for sender in senders.values():
        for receiver in receivers.values():
            wanted = torch.zeros_like(there)
            wanted[torch.tensor(sender)[:, None], torch.tensor(receiver)] = True
            wanted &= there
            rows.append(runs.patched(wanted) - runs.baseline if wanted.any() else torch.zeros_like(runs.baseline))
            tell(len(rows), len(senders) * len(receivers))
    return torch.stack(rows).reshape(len(senders), len(receivers), *runs.baseline.shape)


def _attributed(runs: TwoRuns, senders: Places, receivers: Places, shares: list[float], tell: Tell) -> Tensor:
    """The change times the gradient, for all pairs, with the embeddings at each of `shares` of the way."""
    wiring = runs.wiring
    change = runs.new - written(wiring, {str(part): runs.base[part] for part in written_parts(wiring)})
    every = change.new_zeros(len(wiring.senders), len(wiring.receivers), change.shape[1])
    for number, share in enumerate(shares):
        for rows, before, slopes in _slopes(runs, share):
            every[:before, rows] += torch.einsum("sbpd,rbpd->srb", change[:before], slopes) / len(shares)
        tell(number + 1, len(shares))
    every = every if runs.baseline.ndim else every.sum(-1)
    picked = torch.stack([every[places].sum(0) for places in senders.values()])
    return torch.stack([picked[:, places].sum(1) for places in receivers.values()], 1)


def _slopes(runs: TwoRuns, share: float) -> list[tuple[slice, int, Tensor]]:
    """By receivers: their places, how many senders write to them, and the gradient at the stream that each reads."""
    wiring, body, model = runs.wiring, runs.wiring.body, runs.wiring.model
    first = body.resid_pre[0]
    embedded = torch.lerp(runs.base[first], runs.target[str(first)].to(runs.base[first].dtype), share)
    kinds = ("q", "k", "v", *(("mlp_in",) if wiring.has_mlp else ()))
    sites = [part for kind in kinds for part in getattr(body, kind)] + [body.resid_post[-1]]
    streams = [*body.resid_pre, *(body.attn_out if wiring.has_mlp and not wiring.parallel else ())]
    moved = patch(model, first, embedded) if share else nullcontext()
    with moved, capture(model, *streams, detach=True) as seen:
        args, kwargs = runs.run.given()
        _, gradients = grad_at(model, sites, lambda output: runs.run.differentiable(output).sum())(*args, **kwargs)
    found = [(slice(-1, None), len(wiring.senders), gradients[body.resid_post[-1]].detach()[None])]
    for layer in range(body.n_layers):
        for kind in kinds:
            is_mlp = kind == "mlp_in"
            stream = seen[body.resid_pre[layer]]
            stream = stream + seen[body.attn_out[layer]] if is_mlp and not wiring.parallel else stream
            slopes = slopes_of(wiring, kind, layer, stream, gradients[getattr(body, kind)[layer]].detach())
            found.append((wiring.rows(kind, layer), wiring.before(layer, is_mlp), slopes))
    return found


METHODS_OF_EDGES: dict[str, Callable[[TwoRuns, Places, Places, int, Tell], Tensor]] = {
    "eap": lambda runs, senders, receivers, points, tell: _attributed(runs, senders, receivers, [0.0], tell),
    "eap-ig": lambda runs, senders, receivers, points, tell: _attributed(
        runs, senders, receivers, [(number + 0.5) / points for number in range(points)], tell
    ),
    "exact": _exactly,
}

NOTES_ON_EDGES = {
    "eap": "estimated by edge attribution patching: the change of what is read, times the slope of the metric",
    "eap-ig": "estimated by edge attribution patching with gradients along the way between the embeddings",
    "exact": "exact: one run for each edge",
}
