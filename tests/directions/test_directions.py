"""Steering vectors and probes: against what is computed by hand, and on models where the answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery.architectures import gpt2, tokens
from gallery.prefix import PrefixModel
from harvest_streams import alone, stream, texts

from nicehooks import TreeMismatch, capture, harvest, probe, steer, steering_vector

# --- steering vectors -------------------------------------------------------------------------------------------------

MORE, LESS = texts(6, seed=1), texts(6, seed=2)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_the_difference_of_means_leaves_out_padding(side: str, position: str) -> None:
    model = PrefixModel()
    found = steering_vector(model, "layers.2", stream(MORE, side=side), stream(LESS, side=side), position=position)

    def mean(samples: list[list[int]]) -> torch.Tensor:
        each = alone(model, samples, "layers.2")
        return torch.stack([one[-1] if position == "last" else one.mean(0) for one in each]).mean(0)

    torch.testing.assert_close(found, mean(MORE) - mean(LESS))


def test_several_places_give_a_cache_and_it_steers() -> None:
    model = gpt2().eval()
    found = steering_vector(model, "transformer.h.*", {"input_ids": tokens(1)}, {"input_ids": tokens(2)})
    assert list(found) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    with capture(model, "transformer.h.1") as clean:
        model(tokens(3))
    with steer(model, "transformer.h.1", found["transformer.h.1"]), capture(model, "transformer.h.1") as acts:
        model(tokens(3))
    torch.testing.assert_close(
        acts["transformer.h.1"] - clean["transformer.h.1"], found["transformer.h.1"].expand(3, 7, 32)
    )


def test_pca_finds_the_direction_along_which_pairs_differ() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    less = torch.randn(50, 16)
    more = less + 3 * direction + 0.1 * torch.randn(50, 16)
    found = steering_vector(model, "0", more, less, method="pca")
    torch.testing.assert_close(found, 3 * direction, atol=0.1, rtol=0)
    with pytest.raises(TreeMismatch, match="takes pairs, and there are 50 positives for 49 negatives"):
        steering_vector(model, "0", more, less[1:], method="pca")


def test_what_a_steering_vector_refuses() -> None:
    model = PrefixModel()
    with pytest.raises(TreeMismatch, match="'pair' has tuple: steering_vector takes values"):
        steering_vector(model, "pair", stream(MORE), stream(LESS))
    with pytest.raises(ValueError, match="method='median'"):
        steering_vector(model, "layers.1", stream(MORE), stream(LESS), method="median")
    with pytest.raises(TreeMismatch, match="at least one positive and one negative"):
        steering_vector(model, "layers.1", stream(MORE), [])


# --- probes -----------------------------------------------------------------------------------------------------------


def test_a_probe_reads_what_is_there_and_not_what_is_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(1200, 10) * torch.linspace(0.1, 10, 10) + 3
    there, by_chance = x[:, 4] > 3, torch.rand(1200) > 0.5
    found = probe({"a": x}, there)["a"]
    assert found.score > 0.95 and abs(found.control - 0.5) < 0.15 and found.held_out == 300
    assert int((found.direction * x.std(0)).abs().argmax()) == 4
    assert ((found(x) > 0) == there).float().mean() > 0.95
    assert abs(probe({"a": x}, by_chance)["a"].score - 0.5) < 0.15


def test_classes_and_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(900, 6)
    three = probe({"a": x}, x[:, :3].argmax(1))["a"]
    assert three.classes == [0, 1, 2] and three.direction.shape == (3, 6) and three.score > 0.9
    assert (three(x).argmax(1) == x[:, :3].argmax(1)).float().mean() > 0.9
    words = probe({"a": x}, ["yes" if value > 0 else "no" for value in x[:, 1].tolist()])["a"]
    assert words.classes == ["no", "yes"] and words.score > 0.9
    number = probe({"a": x}, 2 * x[:, 0] - x[:, 5] + 1)["a"]
    assert number.classes is None and number.score > 0.99 and number.control < 0.2
    torch.testing.assert_close(number.direction, torch.tensor([2.0, 0, 0, 0, 0, -1]), atol=0.02, rtol=0)


def test_a_store_is_probed_with_whole_samples_held_out(tmp_path: Path) -> None:
    """Rows of one example have much in common: a label that is the example's own cannot be read off others."""
    samples = texts(60, longest=12)
    store = harvest(PrefixModel(), ["layers.0", "layers.3"], stream(samples), tmp_path)
    odd = probe(store, {sample: int(sample % 2) for sample in range(60)})
    assert list(odd) == ["layers.0", "layers.3"] and odd["layers.0"].score < 0.75
    first = probe(store, lambda rows: rows.position == 0)
    labels = store.position[:] == 0
    assert probe(store, labels)["layers.3"].score == first["layers.3"].score
    assert probe(store, labels.tolist(), rows=50)["layers.3"].held_out < 50


def test_what_a_probe_refuses() -> None:
    with pytest.raises(TreeMismatch, match="there are 3 labels for 4 rows"):
        probe({"a": torch.randn(4, 2)}, [0, 1, 0])
    with pytest.raises(TreeMismatch, match=r"'a' has the shape \[4, 2, 2\]: probe takes \[4, d\]"):
        probe({"a": torch.randn(4, 2, 2)}, [0, 1, 0, 1])
