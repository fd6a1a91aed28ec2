"""`attribute`: what is exact of it, what it finds that a gradient misses, and `.verify`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bodies import body
from by_hooks import one_thread
from gallery.architectures import VOCABULARY
from gallery.reading import ReadsHeads
from torch import Tensor, nn

from nicehooks import (
    ActivationCache,
    NotCaptured,
    TreeMismatch,
    UnsupportedModule,
    anatomy,
    attribute,
    capture,
    patch,
    sweep,
)
from nicehooks.experiments.effects import Effects

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)


def metric(output: Any) -> Tensor:
    """One number per example."""
    return output.logits[:, -1, 5] - output.logits[:, -1, 6]


def prompts() -> tuple[Tensor, Tensor]:
    """Two batches that differ in one position."""
    random = torch.Generator().manual_seed(0)
    clean = torch.randint(3, VOCABULARY, (3, 6), generator=random)
    corrupted = clean.clone()
    corrupted[:, 2] = torch.randint(3, VOCABULARY, (3,), generator=random)
    return clean, corrupted


def seen(model: nn.Module, ids: Tensor, *where: Any) -> ActivationCache:
    with torch.no_grad(), capture(model, *where) as acts:
        model(ids)
    return acts


def exact(model: nn.Module, sites: list[str], values: Any, ids: Tensor) -> Tensor:
    """`[site, batch]`, by a loop."""
    effects: list[Tensor] = []
    with torch.no_grad():
        base = metric(model(ids))
        for site in sites:
            with patch(model, site, values[site] if isinstance(values, dict) else values):
                effects.append(metric(model(ids)) - base)
    return torch.stack(effects)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


# --- what is exact ----------------------------------------------------------------------------------------------------


def linear_behind() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(5, 4), torch.randn(5, 4)


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_where_the_rest_is_linear_the_estimates_are_the_effects(method: str) -> None:
    model, clean, corrupted = linear_behind()
    acts = seen(model, clean, "1")
    effects = attribute(model, "1[:, *]", acts, lambda output: output[:, 0], corrupted, method=method)
    expected = torch.stack([(acts["1"] - model[:2](corrupted))[:, i] * model[2].weight[0, i] for i in range(3)])
    assert torch.allclose(effects.examples, expected, atol=1e-6)
    assert torch.allclose(effects.values, expected.mean(-1), atol=1e-6)
    assert torch.equal(effects.baseline, model(corrupted)[:, 0])
    assert effects.sites == ("1[:, 0]", "1[:, 1]", "1[:, 2]")


def test_straight_lines_add_up_to_the_effect_of_all_cells_together() -> None:
    model, (clean, corrupted) = body("gpt2"), prompts()
    site = str(anatomy(model).resid_post[0])
    acts = seen(model, clean, site)
    effects = attribute(model, f"{site}[:, *]", acts, metric, corrupted, method="integrated", points=20)
    whole = exact(model, [site], {site: acts[site]}, corrupted)[0]
    assert torch.allclose(effects.examples.sum(0), whole, atol=0.02 * whole.abs().max().item())
    gradient = attribute(model, f"{site}[:, *]", acts, metric, corrupted)
    assert not torch.allclose(gradient.examples.sum(0), whole, atol=0.02 * whole.abs().max().item())


@pytest.mark.parametrize("what", ["q", "k"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_attention_is_computed_anew_for_queries_and_keys(family: str, what: str) -> None:
    """Where all that comes after the pattern is linear, the estimates of AtP* are the effects; a slope is not."""
    model, (clean, corrupted) = ReadsHeads(body(family)), prompts()
    part = getattr(anatomy(model), what)[-1]
    acts = seen(model, clean, part) * 4.0
    run = (model, f"{part}[:, *, *]", acts, lambda output: output, corrupted)
    effects, gradient = attribute(*run, method="atp*"), attribute(*run)
    everything = effects.verify(effects.values.numel(), samples=0)
    assert everything.exact.all() and everything.values.abs().max() > 0.05
    assert torch.allclose(effects.examples, everything.examples, atol=1e-4)
    assert not torch.allclose(gradient.examples, everything.examples, atol=1e-2)


def test_a_part_that_queries_and_keys_are_asked_for_as_a_whole() -> None:
    """All keys together: their columns of the scores change at once."""
    model, (clean, corrupted) = ReadsHeads(body("llama")), prompts()
    part = anatomy(model).k[-1]
    run = (
        model,
        [part, f"{part}[:, 1:3]", f"{part}[:, :, :, :4]"],
        seen(model, clean, part) * 4.0,
        lambda out: out,
        corrupted,
    )
    effects = attribute(*run, method="atp*")
    assert torch.allclose(effects.examples, effects.verify(3, samples=0).examples, atol=1e-4)


def test_a_layer_left_out_has_no_gradient_through_what_it_adds() -> None:
    """The estimate is the mean size over the layers left out, here done by hand."""
    model, (clean, corrupted) = body("gpt2"), prompts()
    parts = anatomy(model)
    part = parts.mlp_out[0]
    acts = seen(model, clean, part)
    sizes: list[Tensor] = []
    for layer in (1, 2):
        kept = seen(model, corrupted, parts.attn_out[layer], parts.mlp_out[layer])
        with patch(model, dict(kept)):  # constants: no gradient goes through them
            sizes.append(attribute(model, part, acts, metric, corrupted).examples[0].abs())
    with patch(model, dict(seen(model, corrupted, parts.attn_out[0]))):
        own = attribute(model, part, acts, metric, corrupted).examples[0].abs()
    star = attribute(model, part, acts, metric, corrupted, method="atp*")
    plain = attribute(model, part, acts, metric, corrupted)
    assert torch.allclose(star.examples[0], plain.examples[0].sign() * torch.stack([own, *sizes]).mean(0), atol=1e-4)


# --- beside exact patching --------------------------------------------------------------------------------------------


def test_a_grid_beside_the_loop() -> None:
    model, (clean, corrupted) = body("llama"), prompts()
    sites = [f"{part}[:, *]" for part in anatomy(model).resid_post]
    acts = seen(model, clean, *anatomy(model).resid_post)
    effects = attribute(model, sites, acts, metric, corrupted)
    assert [axis.name for axis in effects.axes] == ["layer", "position"] and effects.values.shape == (3, 6)
    loop = exact(model, list(effects.sites), {site: acts[site] for site in effects.sites}, corrupted)
    assert torch.equal(effects.values[:, :2], torch.zeros(3, 2))  # before the position that differs
    assert correlation(effects.values, loop.mean(-1)) > 0.7
    everything = effects.verify(18)
    assert torch.allclose(everything.examples.flatten(0, 1), loop, atol=1e-5)
    assert everything.spent == 1.0 and everything.missed is None


def test_verify_replaces_the_largest_and_bounds_the_others() -> None:
    model, (clean, corrupted) = body("llama"), prompts()
    sites = [f"{part}[:, *]" for part in anatomy(model).resid_post]
    acts = seen(model, clean, *anatomy(model).resid_post)
    effects = attribute(model, sites, acts, metric, corrupted)
    some = effects.verify(3, samples=12)
    largest = {effect.site for effect in effects.top(3)}
    assert {site for site, is_exact in zip(some.sites, some.exact.flatten(), strict=True) if is_exact} == largest
    loop = exact(model, list(effects.sites), {site: acts[site] for site in effects.sites}, corrupted).mean(-1)
    assert torch.allclose(some.values[some.exact], loop.reshape(3, 6)[some.exact], atol=1e-5)
    assert torch.equal(some.values[~some.exact], effects.values[~some.exact])
    assert some.spent == 15 / 18
    assert some.missed.effects[some.exact].isnan().all() and not some.missed.effects[~some.exact].isnan().any()
    assert some.missed.bound >= some.missed.effects[~some.exact].abs().max()
    assert "3 of 18 effects are exact" in some.notes[1] and "12 random halves" in some.notes[2]


def test_the_bound_finds_what_a_gradient_misses() -> None:
    """A saturated unit has no slope, though switching it off matters; the random halves see it."""
    model = nn.Sequential(nn.Identity(), nn.Tanh(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[2].weight[:] = torch.tensor([[1.0, 0.1, 0.1, 0.1]])
    x = torch.tensor([[20.0, 0.1, 0.1, 0.1]])
    effects = attribute(model, "0[:, *]", 0.0, lambda output: output[:, 0], x)
    assert effects.values[0].abs() < 1e-6 and effects.top(1)[0].site != "0[:, 0]"
    some = effects.verify(1, samples=40)
    assert some.missed.bound > 0.9 and some.missed.effects[0] == pytest.approx(-1.0, abs=0.1)


# --- what may be given ------------------------------------------------------------------------------------------------


def test_numbers_scalars_and_calls_of_a_shared_module() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Flatten(), nn.Linear(3, 1))
    x = torch.randn(2, 3)
    effects = attribute(model, "0#*", 0.0, lambda output: output.sum(), x)
    assert [axis.name for axis in effects.axes] == ["call"] and effects.examples is None
    second = shared(model[1](shared(x)))
    assert torch.allclose(effects.values[1], -(second @ model[4].weight.T).sum(), atol=1e-6)


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_what_may_be_put_there_is_what_sweep_takes(method: str) -> None:
    """Where the rest is linear every estimate is the effect, of alternatives, functions, means and other examples."""
    model, clean, corrupted = linear_behind()
    basis = torch.linalg.qr(torch.randn(3, 2)).Q
    mean = {"1": seen(model, clean, "1")["1"].mean(0, keepdim=True)}

    def first(output: Tensor) -> Tensor:
        return output[:, 0]

    def alike(where: Any, values: Any, **options: Any) -> Effects:
        estimated: Any = attribute(model, where, values, first, corrupted, method=method, **options)
        exact: Any = sweep(model, where, values, first, corrupted, **options)
        assert estimated.axes == exact.axes and estimated.sites == exact.sites
        assert torch.allclose(estimated.examples, exact.examples, atol=1e-6) and exact.examples.abs().max() > 0
        return estimated

    for values in (0.5, mean, lambda value: 2 * value, lambda value: None if value.mean() > 9 else -value, "resample"):
        alike("1[:, *]", values)
    strengths = alike("1[:, *]", torch.tensor([-1.0, 0.0, 2.0])[:, None])
    assert [axis.name for axis in strengths.axes] == ["alternative", "neuron"]
    alike("1[:, *]", [0.0, mean, "resample"])
    alike("1", mean, subspace=basis)
    checked = strengths.verify(2, samples=30)
    assert int(checked.exact.sum()) == 2 and torch.allclose(checked.values, strengths.values, atol=1e-6)
    known = checked.missed.effects[~checked.exact]
    assert torch.allclose(known, strengths.values[~checked.exact], atol=4 * checked.missed.errors[~checked.exact].max())


@pytest.mark.parametrize("run", [attribute, sweep])
@pytest.mark.parametrize("values", [[], torch.ones(0, 1)])
def test_no_alternatives_are_refused(run: Any, values: Any) -> None:
    model, _, corrupted = linear_behind()
    with pytest.raises(TreeMismatch, match="values has no alternative in it"):
        run(model, "1[:, *]", values, lambda output: output[:, 0], corrupted)


def test_alternatives_are_told_as_one_run() -> None:
    model, _, corrupted = linear_behind()
    told = list[tuple[int, int]]()
    options: Any = {"method": "integrated", "points": 2, "progress": lambda done, count: told.append((done, count))}
    attribute(model, "1", [0.0, 1.0], lambda output: output[:, 0], corrupted, **options)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_trees_are_summed() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 2)
    x = torch.randn(4, 1, 3)
    effects = attribute(nn.Sequential(lstm), "0", 0.0, lambda output: output[0].sum() + output[1][0].sum(), x)
    output, (hidden, _) = lstm(x)
    assert torch.allclose(effects.values[0], -(output.sum() + hidden.sum()), atol=1e-6)


def test_effects_are_effects() -> None:
    model, _, corrupted = linear_behind()
    effects = attribute(model, "1[:, *]", 0.0, lambda output: output[:, 0], corrupted)
    assert isinstance(effects, Effects) and effects.normalized(1.0, 0.0).values.shape == (3,)
    assert "estimated from one gradient" in effects.notes[0]


def test_what_is_refused() -> None:
    model, clean, corrupted = linear_behind()
    with pytest.raises(UnsupportedModule, match=r"the methods are 'gradient', 'integrated', 'atp\*'"):
        attribute(model, "1", 0.0, torch.sum, corrupted, method="magic")
    with pytest.raises(TreeMismatch, match="is one number for each example, or one for all"):
        attribute(model, "1", 0.0, lambda output: output.unsqueeze(0), corrupted)
    with pytest.raises(NotCaptured, match=r"attribute\(model, where, values, …\) has no value for '1\[:, 0\]'"):
        attribute(model, "1[:, *]", seen(model, clean, "0"), torch.sum, corrupted)
    with pytest.raises(TreeMismatch, match=r"attribute\(model, where, values, …\): .* is neither a value for"):
        attribute(model, "1[:, *]", torch.ones(2, 2, 7), torch.sum, corrupted)
    with pytest.raises(UnsupportedModule, match="no anatomy"):
        attribute(model, "1", 0.0, torch.sum, corrupted, method="atp*")


@pytest.mark.parametrize("method", ["gradient", "integrated", "atp*"])
def test_masked_scores_do_not_move(method: str) -> None:
    """They are -inf in both runs, and -inf - -inf is no number. Of a small step, the slope is the effect."""
    model, (clean, corrupted) = copy.deepcopy(body("gpt2")).double(), prompts()
    scores = anatomy(model).scores
    others, base = [seen(model, ids, *scores) for ids in (clean, corrupted)]
    assert base[scores[0]].isinf().any()
    step = base.map(lambda value: value)
    for part in scores:
        moved = base[part] + 1e-4 * (others[part] - base[part])
        step[str(part)] = torch.where(base[part].isinf(), base[part], moved)
    effects = attribute(model, [f"{part}[:, *]" for part in scores], step, metric, corrupted, method=method)
    loop = exact(model, list(effects.sites), {site: step[site] for site in effects.sites}, corrupted).reshape(3, 4, 3)
    assert effects.examples.isfinite().all() and loop.abs().min() > 0
    if method != "atp*":  # which takes means over layers left out
        assert torch.allclose(effects.examples, loop, rtol=1e-2, atol=1e-3 * loop.abs().max().item())


# --- how far it is ----------------------------------------------------------------------------------------------------


def test_gradients_along_the_line_and_left_out_layers_are_told() -> None:
    model, (clean, corrupted) = body("gpt2"), prompts()
    parts = anatomy(model)
    values = seen(model, clean, parts.resid_post)
    for method, count in (("integrated", 3 * parts.n_layers), ("atp*", parts.n_layers)):
        told: list[tuple[int, int]] = []
        options: dict[str, Any] = {"method": method, "points": 3, "progress": lambda *at: told.append(at)}  # noqa: B023
        attribute(model, parts.resid_post, values, metric, corrupted, **options)
        assert told == [(done, count) for done in range(1, count + 1)]
