"""`mean_activations`: the mean over a data set, batch by batch, and what is ablated with it."""

from __future__ import annotations

import pytest
import torch
from gallery.architectures import ARCHITECTURES, tokens
from gallery.swept import Tagger
from sweep_by_hand import far_from_loop, made
from torch import nn

from nicehooks import ActivationCache, ablate, capture, mean_activations, patch, select, sweep
from nicehooks.errors import NiceHooksError, NotCaptured, TreeMismatch


def test_batches_of_different_sizes_count_by_their_examples():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(7, 4)
    means = mean_activations(model, "*", x.split([1, 4, 2]))
    with torch.no_grad():
        assert torch.allclose(means["0"], model[0](x).mean(0, keepdim=True), atol=1e-6)
        assert torch.allclose(means["1"], model(x).mean(0, keepdim=True), atol=1e-6)


def test_inputs_by_name_and_several_positional_ones():
    model = ARCHITECTURES["gpt2"].build()
    by_name = mean_activations(model, "transformer.h.*", [{"input_ids": tokens(0)}])
    by_place = mean_activations(model, "transformer.h.*", iter([(tokens(0),)]))
    assert by_name["transformer.h.1"].shape == (1, 7, 32)
    assert torch.equal(by_name["transformer.h.1"], by_place["transformer.h.1"])


def test_positions_may_be_as_many_as_they_like_if_the_mean_is_over_them():
    model = ARCHITECTURES["gpt2"].build()
    batches = [tokens(0, 2, 5), tokens(1, 3, 4)]
    means = mean_activations(model, "transformer.h.*", batches, dim=(0, 1))
    with torch.no_grad():
        rows = []
        for batch in batches:
            with capture(model, "transformer.h.2") as seen:
                model(batch)
            rows.append(seen["transformer.h.2"].flatten(0, 1))
    assert torch.allclose(means["transformer.h.2"][0, 0], torch.cat(rows).mean(0), atol=1e-6)
    with pytest.raises(TreeMismatch, match="Take it over the positions too"):
        mean_activations(model, "transformer.h.*", batches)


def test_a_sweep_ablates_with_means():
    architecture = ARCHITECTURES["gpt2"]
    model, where, ids = architecture.build(), "transformer.h.*[:, *]", tokens(5)
    metric = lambda output: output.logits[:, -1, 3]  # noqa: E731
    for dim in (0, (0, 1)):
        means = mean_activations(model, "transformer.h.*", [tokens(0), tokens(1)], dim=dim)
        effects = sweep(model, where, means, metric, ids)
        by_hand = lambda path: means[path.split("[")[0]][:, int(path[:-1].rsplit(" ")[-1]) if dim == 0 else 0]  # noqa: B023, E731
        assert far_from_loop(model, effects, by_hand, metric, ids) < 1e-4


def test_trees_have_means_and_what_is_no_number_has_none():
    model, ids = made(Tagger), torch.arange(10).reshape(2, 5)
    means = mean_activations(model, "lstm", [ids], dim=1)
    assert [leaf.shape for leaf in (means["lstm"][0], means["lstm"][1][0])] == [(2, 1, 5), (2, 1, 5)]
    with pytest.raises(TreeMismatch, match="has no mean"):
        mean_activations(model, "embed@input[0]", [ids])
    with pytest.raises(NiceHooksError, match="there are no batches"):
        mean_activations(model, "lstm", [])


def test_ablation_takes_the_means_of_each_site_and_of_a_part_of_it():
    model = ARCHITECTURES["gpt2"].build()
    means = mean_activations(model, "transformer.h.*", [tokens(0), tokens(1)])
    for where in ("transformer.h.{1,2}", "transformer.h.1[:, -1]"):
        with ablate(model, where, value=means), torch.no_grad():
            ablated = model(tokens(5)).logits
        with patch(model, {site: means[site] for site in select(model, where)}), torch.no_grad():
            assert torch.equal(ablated, model(tokens(5)).logits)


@pytest.mark.parametrize(
    ("where", "captured"), [("h.*[:, *]", "h.*"), ("h.*[:, *]", "h.*[:, *]"), ("h.0#*", "h.0#*"), ("h.*[*]", "h.*")]
)
def test_a_star_in_a_place_of_ablation_is_all_that_it_stands_for(where, captured):
    where, captured = f"transformer.{where}", f"transformer.{captured}"
    model, ids = ARCHITECTURES["gpt2"].build(), tokens(5)
    with torch.no_grad():
        with capture(model, captured) as acts:
            clean = model(ids).logits
        with ablate(model, where, value=acts):
            assert torch.equal(model(ids).logits, clean)
        with ablate(model, where, value=acts * 0), capture(model, "transformer.h.0") as seen:
            model(ids)
    assert not seen["transformer.h.0"].any()


def test_what_is_no_mean_of_a_site_is_refused_before_anything_runs():
    model, means = ARCHITECTURES["gpt2"].build(), ActivationCache({"transformer.h.1": torch.zeros(1)})
    with pytest.raises(NotCaptured, match=r"'transformer\.h\.0' is not in this cache"):
        ablate(model, "transformer.h.*", value=means)
    for value in ("mean", torch.mean):
        with pytest.raises(TypeError, match=r"value=mean_activations\(model, where, batches\)"):
            ablate(model, "transformer.h.*", value=value)
