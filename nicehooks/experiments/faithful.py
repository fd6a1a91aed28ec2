"""`faithfulness`: how much of what a model does a circuit does alone, beside random circuits of the same size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.errors import NiceHooksError
from nicehooks.experiments.circuits import Circuit, check_circuit_of, grown
from nicehooks.experiments.circuits import circuit as circuit_of
from nicehooks.experiments.edge_effects import TwoRuns
from nicehooks.experiments.effects import Axis, Effects
from nicehooks.experiments.estimates import Metric
from nicehooks.experiments.given import check_model_and_metric, count_given
from nicehooks.experiments.wiring import Wiring


class Faithfulness(Effects):
    """What circuits do alone: `[size, circuit]`, the metric with every edge outside of it patched, minus the baseline.

    Attributes:
        model: the metric of the whole model, on average over the examples.
        nothing: that of the empty circuit: every edge is patched.
    """

    model: float
    nothing: float

    def _beside(self) -> dict[str, Any]:
        return {"ends": json.dumps([self.model, self.nothing])}

    def _take_from(self, content: Mapping[str, Any]) -> None:
        self.model, self.nothing = json.loads(content["ends"])

    def _take_over(self, other: Faithfulness, low: float, span: float) -> None:
        self.model, self.nothing = [(end - low) / span for end in (other.model, other.nothing)]

    @property
    def shares(self) -> Tensor:
        """`[size, circuit]`, faithfulness: 0 is the empty circuit, 1 the whole model; it may lie outside."""
        return (self.metrics - self.nothing) / (self.model - self.nothing)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{size} edges {share:.2f}"
            for size, share in zip(self.axes[0].labels, self.shares[:, 0].tolist(), strict=True)
        )
        return f"Faithfulness({shown})"


def faithfulness(
    model: nn.Module,
    circuit: Circuit,
    values: Any,
    metric: Metric,
    *args: Any,
    sizes: Sequence[int] | None = None,
    random: int = 0,
    seed: int = 0,
    check: bool = True,
    **kwargs: Any,
) -> Faithfulness:
    """How much of the metric a circuit brings about alone: every edge outside of it is patched, in one forward.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from nicehooks import anatomy, capture, circuit, edges
    >>> _ = torch.manual_seed(0)
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)).eval()
    >>> clean, corrupted = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[3, 1, 7, 1, 5]])
    >>> parts, difference = anatomy(model), lambda output: output.logits[:, -1, 8] - output.logits[:, -1, 9]
    >>> with capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
    ...     _ = model(corrupted)
    >>> found = circuit(edges(model, values, difference, clean), top=20)
    >>> curve = faithfulness(model, found, values, difference, clean, sizes=[0, 20, 68], random=2)
    >>> curve.shares.shape, torch.allclose(curve.shares[[0, 2], 0], torch.tensor([0.0, 1.0]), atol=1e-4)
    (torch.Size([3, 3]), True)

    Args:
        model: the model that the circuit is of.
        circuit: from `circuit`.
        values: what the edges outside of it carry, as for `edges`. Prompts that it was not found on tell more.
        metric: `metric(output)` is a scalar tensor, or one number per example, `[batch]`.
        args: what the model is called with.
        sizes: a curve: the circuits of so many edges, chosen by the effects that this one was chosen by.
        random: how many random circuits of each size to run beside; they reach the logits, too.
        seed: of these.
        check: as for `edges`.
        kwargs: what the model is called with.

    Raises:
        TypeError, ValueError: a size, or `random`, is no number of circuits.
        TreeMismatch: the circuit is of a model with other parts; the metric is no number, or NaN.
        NiceHooksError: `sizes` of a circuit that no effects are known of.
    """
    check_model_and_metric(model, metric, "faithfulness")
    if not isinstance(circuit, Circuit):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"faithfulness(model, circuit, …) takes a Circuit, not {type(circuit).__name__}")
    random = count_given(random, "faithfulness(…, random")
    sizes = None if sizes is None else [count_given(size, "faithfulness(…, sizes=…, one") for size in sizes]
    if sizes == []:
        raise ValueError("faithfulness(…, sizes=[]): no size is asked for")
    wiring = Wiring(model)
    check_circuit_of(wiring, circuit, "faithfulness")
    runs = TwoRuns.of(wiring, values, metric, args, kwargs, "faithfulness", check)
    masks = [circuit.mask] if sizes is None else [_of_size(circuit, size).mask for size in sizes]
    generator = torch.Generator().manual_seed(seed)
    rows = [[mask, *(_random(wiring, int(mask.sum()), generator) for _ in range(random))] for mask in masks]
    results = torch.stack([torch.stack([runs.patched(wiring.there & ~mask) for mask in row]) for row in rows])
    results = results - runs.baseline
    axes = [
        Axis("size", tuple([str(int(mask.sum())) for mask in masks])),
        Axis("circuit", ("circuit", *(f"random {number}" for number in range(random)))),
    ]
    values_ = results.mean(-1) if runs.baseline.ndim else results
    found = Faithfulness(values_, axes, runs.baseline, (), results if runs.baseline.ndim else None, [NOTE])
    found.model, found.nothing = runs.baseline.mean().item(), runs.patched(wiring.there).mean().item()
    return found


NOTE = "each circuit alone: every edge outside of it carries the values of the other run"


def _of_size(circuit: Circuit, size: int) -> Circuit:
    if circuit.scores is None:
        raise NiceHooksError("sizes=…: of this circuit no effects are known that smaller ones could be chosen by.")
    return circuit_of(circuit.scores, top=size)


def _random(wiring: Wiring, size: int, generator: torch.Generator) -> Tensor:
    """A random circuit of `size` edges that reaches the logits."""
    mask = torch.zeros_like(wiring.there)
    for sender, receiver in grown(wiring, torch.rand(wiring.there.shape, generator=generator), size):
        mask[sender, receiver] = True
    return mask
