"""Steering vectors and probes: against what is computed by hand, and on models where the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gallery.architectures import gpt2, tokens
from gallery.prefix import PrefixModel
from harvest_streams import alone, stream, texts

from nicehooks import TreeMismatch, capture, harvest, probe, steer, steering_vector
from nicehooks.caches.arguments import BadArgument
from nicehooks.harvesting.inputs import BatchFault

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


# --- what is refused, and what is exact -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [256, 257, 700, 2100])
def test_the_last_token_of_a_long_text(dtype: torch.dtype, length: int) -> None:
    """Positions are no values: bfloat16 does not tell 257 from 256, float16 not 2049 from 2048."""
    model = torch.nn.Sequential(torch.nn.Embedding(3000, 4), torch.nn.Identity()).to(dtype)
    mask = torch.cat([torch.ones(1, length), torch.zeros(1, 9)], 1).long()
    ids = torch.arange(length + 9)[None]
    model.register_forward_pre_hook(lambda module, args, kwargs: ((kwargs["input_ids"],), {}), with_kwargs=True)
    found = steering_vector(
        model, "0", {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids + 50, "attention_mask": mask}
    )
    weight = model[0].weight.detach().double()
    torch.testing.assert_close(found, (weight[length - 1] - weight[length + 49]).to(dtype))


def test_means_that_are_large_and_near_each_other() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    more, less = (torch.tensor([[300.0], [300.0], [302.0]]), torch.tensor([[300.0], [300.0], [300.0]]))
    found = steering_vector(model, "0", more.bfloat16(), less.bfloat16())
    torch.testing.assert_close(found, torch.tensor([2 / 3]).bfloat16())


IDS = torch.ones(2, 4, dtype=torch.int64)
NO_TEXTS: list[Any] = [
    {"input_ids": IDS, "attention_mask": IDS * 0},
    {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])},
    *[IDS[:0], IDS[:, :0], [torch.tensor([1, 2, 3])], None, 3, "text", ["text"], [[1, 2]]],
]


@pytest.mark.parametrize("inputs", NO_TEXTS, ids=[str(i) for i in range(len(NO_TEXTS))])
def test_texts_without_a_last_token(inputs: Any) -> None:
    for pair in ((inputs, IDS), (IDS, inputs)):
        with pytest.raises(BatchFault):
            steering_vector(PrefixModel(), "layers.1", *pair)


def test_what_has_no_value_for_each_token() -> None:
    model = gpt2().eval()
    with pytest.raises(TreeMismatch, match=r"has \[3, 4, 8\]: the tokens are \[3, 7\]"):
        steering_vector(model, "transformer.h.1.attn.c_proj@input[0]/4[:, -1]", tokens(1), tokens(2))
    with pytest.raises(TreeMismatch, match="is a parameter"):
        steering_vector(model, "transformer.wpe@weight", tokens(1), tokens(2))
    with pytest.raises(TreeMismatch, match="there are NaN or infinite ones"):
        steering_vector(torch.nn.ReLU(), "", torch.full((2, 3), torch.nan), torch.ones(2, 3), method="pca")


X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
TRUE = X[:, 0] > 0


@pytest.mark.parametrize("kind", ["list", "tuple", "array", "tensor", "iterator"])
def test_labels_of_every_kind_are_the_same(kind: str) -> None:
    makes: dict[str, Any] = {
        "list": list,
        "tuple": tuple,
        "array": numpy.array,
        "tensor": torch.tensor,
        "iterator": iter,
    }
    for values in (TRUE.tolist(), TRUE.int().tolist(), ["ab"[i] for i in TRUE.int()], X[:, 1].tolist()):
        if kind == "tensor" and isinstance(values[0], str):
            continue
        found, wanted = (probe({"x": X}, labels)["x"] for labels in (makes[kind](values), list(values)))
        assert found.score == wanted.score and found.classes == wanted.classes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_every_dtype_are_predicted(dtype: torch.dtype) -> None:
    assert probe({"x": X}, X[:, 1].to(dtype))["x"].score > 0.99


NO_LABELS: list[Any] = [
    [],
    None,
    3,
    "a" * 60,
    set(range(60)),
    {0: 1},
    lambda rows: TRUE,
    TRUE[:50],
    TRUE[:, None],
    X[:, :2],
    torch.full((60,), torch.nan),
    [None] * 60,
    ["a", 1] * 30,
    X[:, 0].to(torch.complex64),
    TRUE | True,
    [7] * 60,
    ["a"] * 60,
    torch.ones(60),
]


@pytest.mark.parametrize("labels", NO_LABELS, ids=[str(i) for i in range(len(NO_LABELS))])
def test_labels_that_are_none(labels: Any, tmp_path: Path) -> None:
    with pytest.raises(TreeMismatch, match="probe"):
        probe({"x": X}, labels)
    store = harvest(torch.nn.Identity(), "", [X.reshape(6, 10, 5)], tmp_path)
    if not callable(labels):
        with pytest.raises(TreeMismatch, match="probe"):
            probe(store, labels)
    with pytest.raises(TreeMismatch, match="probe"):
        probe(store, lambda rows: labels)


NO_VALUES: list[Any] = [
    {},
    {"x": (X, X)},
    X,
    [X],
    None,
    {"x": X.numpy()},
    {"x": X * torch.nan},
    {"x": X / 0},
    {"x": X[:, :0]},
    {"x": X.to(torch.complex64)},
]


@pytest.mark.parametrize("values", NO_VALUES, ids=[str(i) for i in range(len(NO_VALUES))])
def test_values_that_no_probe_fits(values: Any) -> None:
    with pytest.raises(TreeMismatch):
        probe(values, TRUE)


@pytest.mark.parametrize("name", ["held_out", "rows", "seed", "strength"])
@pytest.mark.parametrize("value", [-1, 2.5])
def test_numbers_that_make_no_sense(name: str, value: float) -> None:
    if (name, value) != ("strength", 2.5):
        with pytest.raises(BadArgument):
            probe({"x": X}, TRUE, **{name: value})


def test_one_sample_cannot_be_held_out(tmp_path: Path) -> None:
    store = harvest(torch.nn.Identity(), "", [X.reshape(1, 60, 5)], tmp_path)
    with pytest.raises(TreeMismatch, match="with 1 of them none would be left"):
        probe(store, TRUE)
