"""A sweep cut by prompts: the numbers of the whole batch, or the reason why it is not cut; without a cluster."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bodies import body
from gallery.architectures import VOCABULARY
from gallery.swept import Looped, MeanOfBatch, Tagger
from torch import Tensor

from nicehooks import Effects, NiceHooksError, capture, sweep
from nicehooks.experiments import sweeping
from nicehooks.experiments.prompts import NotCut, rows_in
from nicehooks.experiments.scheduling import Schedule
from nicehooks.experiments.spreading import SpreadSweep

PROMPTS = torch.randint(3, VOCABULARY, (7, 5), generator=torch.Generator().manual_seed(0))
ANSWERS = torch.arange(3, 10)
WHERE = "transformer.h.*[:, *]"


def metric(output: Any) -> Tensor:
    return output.logits[:, -1, 5]


def of_answers(output: Any, answers: Tensor) -> Tensor:
    return output.logits[:, -1].gather(1, answers[:, None])[:, 0]


def first(output: Tensor) -> Tensor:
    return output[:, 0]


def twice(value: Tensor) -> Tensor:
    return 2 * value


def in_parts(schedule: Schedule, spread: SpreadSweep, workers: int, options: Any) -> Tensor:
    """What takes the place of a cluster: each part of the prompts, one after the other, here."""
    rows = rows_in(schedule.base.run.batch, 3)
    assert len(rows) == 3
    spread.refuse_cut(rows)
    for one in rows:
        baseline = one.of_metric(schedule.base.metric)
        nothing = spread.as_effects(baseline.new_full((len(schedule.items), len(baseline)), torch.nan), baseline)
        found = spread.job(one, nothing)
        assert found.examples is not None and found.examples.shape[-1] == one.stop - one.start
        schedule.metrics[:, one.start : one.stop] = found.examples.reshape(len(schedule.items), -1) + found.baseline
    return schedule.metrics


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "spread", in_parts)


def alike(found: Effects, expected: Effects) -> None:
    assert found.axes == expected.axes and found.sites == expected.sites
    assert found.examples is not None and expected.examples is not None
    assert torch.allclose(found.examples, expected.examples, atol=1e-5)


def clean() -> Any:
    with torch.no_grad(), capture(body("gpt2"), "transformer.h.*") as acts:
        body("gpt2")(PROMPTS.flip(0))
    return acts


VALUES: dict[str, Any] = {
    "a cache": clean,
    "a plain dict by cell": lambda: {path: acts[path] for acts in [clean()] for path in cells_of(acts)},
    "means": lambda: clean().mean(0, keepdim=True),
    "a tensor for each prompt": lambda: torch.randn(7, 32),
    "alternatives in a tensor": lambda: torch.randn(2, 7, 32),
    "a list": lambda: [0.0, torch.randn(32), clean(), twice],
}


def cells_of(acts: Any) -> list[str]:
    return [f"{path}[:, {position}]" for path in acts for position in range(5)]


@pytest.mark.parametrize("kind", VALUES)
def test_parts_of_the_prompts_together_are_the_sweep(kind: str) -> None:
    values = VALUES[kind]()
    found = sweep(body("gpt2"), WHERE, values, metric, PROMPTS, engine="ray")
    alike(found, sweep(body("gpt2"), WHERE, values, metric, PROMPTS))


def test_a_basis_and_parameters_are_what_they_are_for_all() -> None:
    model, basis = body("gpt2"), torch.linalg.qr(torch.randn(32, 7))[0]
    found = sweep(model, WHERE, clean(), metric, PROMPTS, subspace=basis, engine="ray")
    alike(found, sweep(model, WHERE, clean(), metric, PROMPTS, subspace=basis))
    where, ids = "transformer.h.*.ln_1@bias", torch.randint(3, VOCABULARY, (32, 5))  # as many as a bias has numbers
    alike(sweep(model, where, [twice], metric, ids, engine="ray"), sweep(model, where, [twice], metric, ids))
    where = "transformer.h.*.ln_1@bias[:7]"
    alike(sweep(model, where, 3.0, metric, PROMPTS, engine="ray"), sweep(model, where, 3.0, metric, PROMPTS))


def test_keyword_arguments_answers_and_calls_are_cut_as_well() -> None:
    model, mask = body("gpt2"), torch.ones(7, 5, dtype=torch.long)
    mask[2:, 0] = 0
    known = partial(of_answers, answers=ANSWERS)
    found = sweep(model, WHERE, clean(), known, engine="ray", input_ids=PROMPTS, attention_mask=mask)
    alike(found, sweep(model, WHERE, clean(), known, input_ids=PROMPTS, attention_mask=mask))
    looped, x = Looped().eval(), torch.randn(7, 4)
    with capture(looped, "block#*") as acts:
        looped(x.flip(0))
    alike(sweep(looped, "block#*", acts, first, x, engine="ray"), sweep(looped, "block#*", acts, first, x))
    tagger, ids = Tagger().eval(), torch.randint(11, (7, 4))
    alike(
        sweep(tagger, "lstm[0][:, *]", 0.0, first, ids, engine="ray"), sweep(tagger, "lstm[0][:, *]", 0.0, first, ids)
    )


DEPENDENT: dict[str, tuple[Any, Any, Any, str]] = {
    "a metric": (WHERE, 0.0, lambda output: output.logits[:, -1, 5].mean(), "the metric is one number for all"),
    "next": (WHERE, "resample", metric, "'resample' takes the value of the next one"),
    "mean": (WHERE, lambda value: value.mean(0, keepdim=True), metric, r"what is put at 'transformer\.h\.0\[:, 0\]'"),
    "the first one": (WHERE, [0.0, lambda value: value - value[0]], metric, "what is put at"),
    "one example": ("transformer.h.*[0]", 0.0, metric, r"what is put at 'transformer\.h\.0\[0\]' depends on all"),
    "each example": ("transformer.h.0[*, 1]", 0.0, metric, "what is put at"),
    "some examples": ("transformer.h.0[1:]", 0.0, metric, "what is put at"),
    "answers": (WHERE, 0.0, lambda output: of_answers(output, ANSWERS), "."),
    "first answers": (
        WHERE,
        0.0,
        lambda output: of_answers(output, ANSWERS[: len(output.logits)]),
        "the metric of some",
    ),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_prompts_that_depend_on_each_other_are_not_cut(kind: str) -> None:
    where, values, measure, why = DEPENDENT[kind]
    with pytest.raises(NotCut, match=why):
        sweep(body("gpt2"), where, values, measure, PROMPTS, engine="ray")


def test_a_model_in_which_they_depend_on_each_other_is_refused_where_it_runs() -> None:
    with pytest.raises(NiceHooksError, match="without an intervention the metric was"):
        sweep(MeanOfBatch().eval(), "a[:, *]", 0.0, first, torch.randn(7, 4), engine="ray")
