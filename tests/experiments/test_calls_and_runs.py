"""Experiments on modules that are called several times, and on models of which no two runs are equal.

What an intervention does in each call, estimates and exact effects say alike: it is that of the context that users
write. Where runs differ from each other there is no effect, and every experiment says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import body
from gallery.architectures import VOCABULARY
from gallery.swept import CountsRuns, FirstCallCounts, Looped, Tagger, Twice
from torch import Tensor, nn

from nicehooks import (
    NiceHooksError,
    TreeMismatch,
    acdc,
    anatomy,
    attribute,
    capture,
    circuit,
    edges,
    edit,
    faithfulness,
    sweep,
)
from nicehooks.errors import SweepMismatch

WAYS = ["auto", "growing", "vmap", "loop"]


def first(output: Tensor) -> Tensor:
    return output[:, 0]


def by_contexts(model: nn.Module, paths: list[str], fns: list[Callable[[Any], Any]]) -> Tensor:
    """`[path]`, the mean effects of editing each, by the loop that users write."""
    x = inputs()
    with torch.no_grad():
        base = first(model(x))
        effects = []
        for path, fn in zip(paths, fns, strict=True):
            with edit(model, path, fn):
                effects.append((first(model(x)) - base).mean())
    return torch.stack(effects)


def inputs() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


VALUES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "a function": (lambda value: 2 * value, lambda value: 2 * value),
    "a function that writes in place": (lambda value: value.mul_(2), lambda value: 2 * value),
    "a number": (0.5, lambda value: torch.full_like(value, 0.5)),
    "a vector": (torch.tensor(0.25), lambda value: torch.full_like(value, 0.25)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_where_the_rest_is_linear_the_estimate_counts_every_call(kind: str) -> None:
    model, (values, by_hand) = made(Twice), VALUES[kind]
    expected = by_contexts(model, [f"a[:, {at}]" for at in range(4)], [by_hand] * 4)
    for method in ("gradient", "integrated"):
        estimate = attribute(model, "a[:, *]", values, first, inputs(), method=method)
        assert torch.allclose(estimate.values, expected, atol=1e-6)
        assert torch.allclose(estimate.verify(4).values, expected, atol=1e-6)


@pytest.mark.parametrize("kind", VALUES)
def test_exact_effects_of_a_looped_module_are_those_of_the_context_around_all_its_calls(kind: str) -> None:
    model, (values, by_hand) = made(Looped), VALUES[kind]
    expected = by_contexts(model, [f"block.0[:, {at}]" for at in range(4)], [by_hand] * 4)
    verified = attribute(model, "block.0[:, *]", values, first, inputs()).verify(4)
    assert torch.allclose(verified.values, expected, atol=1e-6)
    for engine in WAYS[:1] + WAYS[3:]:
        swept = sweep(model, "block.0[:, *]", values, first, inputs(), engine=engine)
        assert torch.allclose(swept.values, expected, atol=1e-6)


def test_within_a_subspace_each_call_keeps_the_rest_of_its_own_value() -> None:
    model, basis = made(Looped), torch.eye(4)[:, :2]
    expected = by_contexts(model, ["block"], [lambda value: value * torch.tensor([0.0, 0.0, 1.0, 1.0])])
    for found in (
        attribute(model, "block", 0.0, first, inputs(), subspace=basis).verify(1),
        sweep(model, "block", 0.0, first, inputs(), subspace=basis),
    ):
        assert torch.allclose(found.values.flatten(), expected, atol=1e-6)


def test_a_function_of_the_value_is_told_the_site_as_in_edit() -> None:
    model, told = made(Looped), set[str]()

    def fn(value: Tensor, site: Any = None) -> Tensor:
        told.add(str(site))
        return 2 * value

    sweep(model, "block.0[:, *]", fn, first, inputs())
    assert told == {f"block.0[:, {at}]" for at in range(4)}
    told.clear()
    attribute(model, "head[:, *]", fn, first, inputs()).verify(1)
    assert told == {f"head[:, {at}]" for at in range(2)}


def test_a_call_that_the_metric_does_not_depend_on_has_no_effect() -> None:
    model = made(FirstCallCounts)
    expected = by_contexts(model, [f"a[:, {at}]" for at in range(4)], [lambda value: 2 * value] * 4)
    assert torch.allclose(attribute(model, "a[:, *]", lambda value: 2 * value, first, inputs()).values, expected)
    with pytest.raises(NiceHooksError, match="has no gradient"):
        attribute(model, "a#1[:, *]", 0.0, first, inputs())


# --- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [*WAYS, "attribute"])
def test_resampling_gives_each_call_what_the_next_example_has_in_it(engine: str) -> None:
    model, x = made(Looped), inputs()
    with torch.no_grad(), capture(model, "block", keep="all") as acts:
        model(x)
    calls = [iter(acts["block"]) for _ in range(4)]
    nexts = [lambda value, at=at: next(calls[at])[:, at].roll(-1, 0) for at in range(4)]
    expected = by_contexts(model, [f"block[:, {at}]" for at in range(4)], nexts)
    if engine == "attribute":
        found = attribute(model, "block[:, *]", "resample", first, x).verify(4)
    elif engine in ("growing", "vmap"):  # say that they do not fit
        with pytest.raises(NiceHooksError, match="is called several times"):
            sweep(model, "block[:, *]", "resample", first, x, engine=engine)
        return
    else:
        found = sweep(model, "block[:, *]", "resample", first, x, engine=engine)
    assert torch.allclose(found.values, expected, atol=1e-6)


NO_NEXT: dict[str, tuple[type[nn.Module], str, Tensor, str]] = {
    "a parameter": (Looped, "head@bias", torch.ones(2, 4), "is not that of the 2 examples"),
    "layers first": (Tagger, "lstm[1][0]", torch.ones(3, 5, dtype=torch.long), "is not that of the 3 examples"),
    "one example": (Looped, "block", torch.ones(1, 4), "there is 1 in the batch"),
}


@pytest.mark.parametrize("run", [sweep, attribute])
@pytest.mark.parametrize("case", NO_NEXT)
def test_resampling_where_there_is_no_next_example_is_refused(run: Any, case: str) -> None:
    kind, where, x, said = NO_NEXT[case]
    with pytest.raises(TreeMismatch, match=said):
        run(made(kind), where, "resample", first, x)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_estimates_are_told_apart_by_example_only_where_the_values_are() -> None:
    model, x = made(Looped), inputs()
    assert attribute(model, "block[:, *]", 0.0, first, x).examples.shape == (4, 3)
    estimate = attribute(model, "head@bias[*]", 0.0, first, x)
    assert estimate.examples is None and estimate.notes[-1].startswith("examples are not told apart")
    assert torch.allclose(estimate.values, sweep(model, "head@bias[*]", 0.0, first, x).values, atol=1e-6)


def prompts() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


# --- runs that differ -------------------------------------------------------------------------------------------------


def test_in_training_mode_every_experiment_says_so() -> None:
    model, ids = (
        copy.deepcopy(body("gpt2")),
        torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0)),
    )
    parts, metric = anatomy(model), lambda output: output.logits[:, -1, 5]
    with torch.no_grad(), capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as values:
        model(ids.flip(1))
    found = circuit(edges(model, values, metric, ids, method="eap"), top=20)
    for dropout in [module for module in model.modules() if isinstance(module, nn.Dropout)]:
        dropout.p = 0.5
    model.train()
    runs: dict[str, Callable[..., Any]] = {
        "attribute": lambda **more: attribute(model, parts.z, 0.0, metric, ids, **more),
        "edges": lambda **more: edges(model, values, metric, ids, method="eap", **more),
        "faithfulness": lambda **more: faithfulness(model, found, values, metric, ids, **more),
        "acdc": lambda **more: acdc(model, values, metric, ids, threshold=100.0, start=found, **more),
    }
    for verb, run in runs.items():
        with pytest.raises(SweepMismatch, match=f"^{verb}: the model, or a function that was given, draws random"):
            run()
        run(check=False)


def test_effects_of_a_model_that_changes_from_run_to_run_are_not_called_exact() -> None:
    estimate = attribute(made(CountsRuns), "a[:, *]", 0.0, first, inputs())
    with pytest.raises(SweepMismatch, match=r"^verify: runs of the model that should be equal are not"):
        estimate.verify(2)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_edges_under_inference_mode(method: str) -> None:
    model, ids = body("gpt2"), prompts()
    metric = lambda output: output.logits[:, -1, 5]  # noqa: E731
    some = {"senders": "embed", "receivers": "logits"}
    expected = edges(model, 0.0, metric, ids, method=method, **some)
    with torch.inference_mode():
        found = edges(model, 0.0, metric, ids, method=method, **some)
    assert torch.allclose(found.values, expected.values, atol=1e-5)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_what_is_resumed_has_to_be_of_the_same_sweep() -> None:
    model, x = made(Looped), inputs()
    part = sweep(model, "block[:, *]", 0.0, first, x)
    for where, metric, given, said in (
        ("block.0[:, *]", first, x, "of other sites"),
        ("block[:, *]", lambda output: 2 * output[:, 0], x, "the metric was"),
        ("block[:, *]", first, x + 1, "the metric was"),
    ):
        with pytest.raises(NiceHooksError, match=said):
            sweep(model, where, 0.0, metric, given, resume=part)
    with pytest.raises(TypeError, match="what an earlier sweep has returned"):
        sweep(model, "block[:, *]", 0.0, first, x, resume=5)
