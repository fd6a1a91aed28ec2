"""The law of `sweep`: it equals the plain loop over contexts, whatever the model, the sites, the values and the way."""

from __future__ import annotations

import re

import pytest
import torch
from gallery.architectures import ARCHITECTURES, answer
from gallery.swept import Convolutions, Looped, MeanOfBatch, ResidualBlock, SequenceFirst, Tagger
from sweep_by_hand import far_from_loop, made, recorded
from torch import nn

from nicehooks import attribute, capture, steer, sweep
from nicehooks.errors import (
    NiceHooksError,
    NotCaptured,
    SiteNotFound,
    SiteNotReached,
    SweepMismatch,
    TreeMismatch,
)

FAR = 1e-4
WAYS = ["auto", "growing", "batch", "vmap", "loop"]
OTHERS = [family for family in ARCHITECTURES if family != "gpt2"]


def first(inputs, batch):
    return {name: value[:batch] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def metric(output):
    return answer(output).flatten(1)[:, -1]


@pytest.mark.parametrize(
    ("family", "batch", "engine"),
    [
        *[("gpt2", batch, engine) for batch in (1, 3) for engine in WAYS],
        *[(family, batch, "positions") for family in ("gpt2", "llama") for batch in (1, 3)],
        *[(family, 1, "vmap") for family in OTHERS],
        *[(family, 3, "auto") for family in OTHERS],
    ],
)
def test_residual_streams_of_transformers(family, batch, engine):
    architecture = ARCHITECTURES[family]
    model, where = architecture.build(), [f"{block}[:, *]" for block in architecture.blocks]
    clean = recorded(model, where, **first(architecture.inputs(0), batch))
    inputs = first(architecture.inputs(1), batch)
    effects = sweep(model, where, clean, metric, engine=engine, **inputs)
    assert [axis.name for axis in effects.axes] == ["layer", "position"]
    assert effects.examples.shape == (*effects.values.shape, batch)
    assert far_from_loop(model, effects, clean.__getitem__, metric, **inputs) < FAR


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_heads_of_every_layer_of_transformers(family):
    architecture = ARCHITECTURES[family]
    where = re.sub(r"\.\d+\.", ".*.", architecture.heads, count=1) + "[:, :, *]"
    model, inputs = architecture.build(), architecture.inputs(1)
    clean = recorded(model, where, **architecture.inputs(0))
    effects = sweep(model, where, clean, metric, **inputs)
    assert [axis.name for axis in effects.axes][-2:] == ["layer", "head"]
    assert far_from_loop(model, effects, clean.__getitem__, metric, **inputs) < FAR
    assert not effects.notes  # it went the fast way


KINDS = {
    "channels": (Convolutions, "{first,norm,second}[:, *]", (3, 2, 5, 5)),
    "places": (Convolutions, "{first,second}[:, :, *, *]", (2, 2, 3, 3)),
    "batches": (Convolutions, "first[*]", (3, 2, 5, 5)),
    "a parameter": (Convolutions, "{first,second}@weight[*]", (2, 2, 5, 5)),
    "an argument": (Convolutions, "second@input[0][:, *]", (2, 2, 5, 5)),
    "calls": (Looped, "block#*[:, *]", (3, 4)),
    "all calls": (Looped, "block[:, *]", (3, 4)),
    "inside a shared module": (Looped, "block.0#*", (3, 4)),
    "the arguments of calls": (Looped, "block#*@input[0][:, *]", (3, 4)),
    "sequence first": (SequenceFirst, "layer.linear1[*]", (4, 2, 8)),
    "an own call": (SequenceFirst, "layer@_sa_block()[*]", (4, 2, 8)),
    "examples that see each other": (MeanOfBatch, "a[:, *]", (3, 4)),
    "the model itself": (MeanOfBatch, "[:, *]", (3, 4)),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_no_transformers(kind, engine):
    make, where, shape = KINDS[kind]
    model, x = made(make), torch.randn(shape)
    with torch.no_grad(), capture(model, where, clone=True) as clean:
        model(torch.randn(shape))
    values = 1.0 if "@weight" in where else clean
    effects = sweep(model, where, values, total, x, engine=engine)
    value_at = (lambda path: 1.0) if "@weight" in where else clean.__getitem__
    assert far_from_loop(model, effects, value_at, total, x) < FAR


def total(output):
    """One number for each example, in which each number of the output counts differently."""
    return (output * torch.arange(1.0, output.shape[-1] + 1)).sum(-1)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_elements_of_a_tuple(engine):
    model, ids = made(Tagger), torch.arange(10).reshape(2, 5)
    for where in ("lstm[0][:, *]", "lstm[1][*][1]", "{embed,head}[:, *]"):
        clean = recorded(model, where, ids.flip(1))
        effects = sweep(model, where, clean, total, ids, engine=engine)
        assert far_from_loop(model, effects, clean.__getitem__, total, ids) < FAR


VALUES = {
    "zero": (0, lambda stem, region, at: 0.0),
    "a number": (1.5, lambda stem, region, at: 1.5),
    "a tensor": (torch.arange(32.0), lambda stem, region, at: torch.arange(32.0)),
    "a function": (lambda v: 2 * v, lambda stem, region, at: lambda v: 2 * v),
    "resample": ("resample", lambda stem, region, at: at(torch.roll(stem, -1, 0))),
}


@pytest.mark.parametrize("engine", WAYS)
@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_kind(kind, engine):
    architecture = ARCHITECTURES["gpt2"]
    model, inputs, where = architecture.build(), architecture.inputs(0), "transformer.h.*[:, *]"
    base = recorded(model, where, **inputs)
    values, by_hand = VALUES[kind]

    def value_at(path):
        stem, _, rest = path.partition("[")
        position = int(rest[3:-1])
        return by_hand(base[stem], base[path], lambda whole: whole[:, position])

    effects = sweep(model, where, values, metric, engine=engine, **inputs)
    assert far_from_loop(model, effects, value_at, metric, **inputs) < FAR


@pytest.mark.parametrize("engine", WAYS)
def test_alternatives_are_the_first_axis(engine):
    architecture = ARCHITECTURES["gpt2"]
    model, inputs, where = architecture.build(), architecture.inputs(0), "transformer.h.*[:, -1]"
    direction, strengths = torch.randn(32), torch.tensor([-1.0, 0.5, 4.0])
    by_tensor = sweep(model, where, strengths[:, None, None] * direction, metric, engine=engine, **inputs)
    by_list = sweep(model, where, [s * direction for s in strengths], metric, engine=engine, **inputs)
    for effects in (by_tensor, by_list):
        assert [(axis.name, len(axis.labels)) for axis in effects.axes] == [("alternative", 3), ("layer", 3)]
        for at, strength in enumerate(strengths):
            one = sweep(model, where, strength * direction, metric, engine="loop", **inputs)
            assert torch.allclose(effects.values[at], one.values, atol=1e-5)
    numbers = sweep(model, where, [0, 0.5], metric, **inputs)
    assert numbers.axes[0].labels == ("0", "0.5")
    assert numbers.sites == numbers.sites[:3] * 2


def test_one_number_for_all_examples():
    architecture = ARCHITECTURES["bert"]
    model, inputs = architecture.build(), architecture.inputs(0)
    total = lambda output: answer(output).sum()  # noqa: E731
    effects = sweep(model, "encoder.layer.*[:, *]", 0.0, total, **inputs)
    assert effects.examples is None and effects.baseline.ndim == 0
    assert far_from_loop(model, effects, lambda path: 0.0, total, **inputs) < FAR


def test_a_metric_that_looks_at_numbers():
    architecture = ARCHITECTURES["gpt2"]
    model, inputs = architecture.build(), first(architecture.inputs(0), 1)
    rank = lambda output: torch.tensor([float((answer(output)[0, -1] > answer(output)[0, -1, 3].item()).sum())])  # noqa: E731
    effects = sweep(model, "transformer.h.*[:, *]", 0.0, rank, **inputs)
    assert far_from_loop(model, effects, lambda path: 0.0, rank, **inputs) == 0


def test_the_first_examples_of_a_grid_in_chunks_are_the_same():
    architecture = ARCHITECTURES["llama"]
    model, inputs, where = architecture.build(), architecture.inputs(0), "model.layers.*[:, *]"
    whole = sweep(model, where, 0.0, metric, **inputs)
    for size in (1, 4, 20):
        for engine in ("growing", "vmap"):
            chunked = sweep(model, where, 0.0, metric, engine=engine, chunk_size=size, **inputs)
            assert torch.allclose(whole.values, chunked.values, atol=1e-5)


def test_positions_before_the_patched_one_may_be_read_by_the_metric():
    architecture = ARCHITECTURES["gpt2"]
    model, where = architecture.build(), "transformer.h.*[:, *]"
    inputs = {**architecture.inputs(1), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    every = lambda output: output.logits[..., 3].sum(1)  # noqa: E731
    effects = sweep(model, where, "resample", every, engine="positions", **inputs)
    assert torch.allclose(
        effects.values, sweep(model, where, "resample", every, engine="loop", **inputs).values, atol=1e-4
    )


def test_positions_are_for_causal_models_that_have_a_cache():
    bert, gpt2 = ARCHITECTURES["bert"], ARCHITECTURES["gpt2"]
    with pytest.raises(NiceHooksError, match="is for a causal model that returns its cache"):
        sweep(bert.build(), "encoder.layer.*[:, *]", 0.0, metric, engine="positions", **bert.inputs(0))
    with pytest.raises(NiceHooksError, match="for positions of what its layers return"):
        sweep(gpt2.build(), "transformer.h.*", 0.0, metric, engine="positions", **gpt2.inputs(0))


# --- what is never silent ---


def test_what_is_not_there_is_said():
    model, x = made(MeanOfBatch), torch.randn(3, 4)
    with pytest.raises(SiteNotFound, match="no module matches"):
        sweep(model, "c", 0.0, total, x)
    with pytest.raises(NotCaptured, match="has no value for 'a'"):
        sweep(model, "a", {"b": torch.ones(3, 2)}, total, x)
    with pytest.raises(TreeMismatch, match="neither a value"):
        sweep(model, "a", torch.ones(7), total, x)
    with pytest.raises(TreeMismatch, match="one number for each example"):
        sweep(model, "a", 0.0, lambda output: output, x)
    with pytest.raises(ValueError, match="engine='fast'"):
        sweep(model, "a", 0.0, total, x, engine="fast")
    with pytest.raises(Exception, match="what replaces a gradient"):
        sweep(model, "a@grad", 0.0, total, x)


def test_dropout_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    with pytest.raises(SweepMismatch, match="draws random numbers"):
        sweep(model, "*[:, *]", 0.0, lambda output: output[:, 0], torch.randn(3, 4))


def test_a_model_that_changes_from_run_to_run_is_refused():
    class Counting(nn.Linear):
        def forward(self, input):
            self.bias.data += 1
            return super().forward(input)

    model = nn.Sequential(nn.Linear(4, 4), Counting(4, 2)).eval()
    with pytest.raises(SweepMismatch, match="runs of the model that should be equal are not"):
        sweep(model, "0[:, *]", 0.0, lambda output: output[:, 0], torch.randn(3, 4))


@pytest.mark.parametrize("engine", [*WAYS, "positions"])
@pytest.mark.parametrize("given", ["a cache", "a function", "a number"])
def test_within_a_subspace_only_the_component_in_it_is_replaced(engine, given):
    architecture = ARCHITECTURES["gpt2"]
    model, where = architecture.build(), [f"{block}[:, *]" for block in architecture.blocks]
    clean, inputs = recorded(model, where, **architecture.inputs(0)), architecture.inputs(1)
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 3)).Q
    values = {"a cache": clean, "a function": lambda region: region * 3, "a number": 0.5}[given]
    new = {"a cache": lambda path, _: clean[path], "a function": lambda _, region: region * 3}.get(
        given, lambda *_: 0.5
    )

    def by_hand(path):
        return lambda region: region + (new(path, region) - region) @ basis @ basis.T

    effects = sweep(model, where, values, metric, subspace=basis, engine=engine, **inputs)
    assert far_from_loop(model, effects, by_hand, metric, **inputs) < FAR


def test_a_subspace_that_is_none_is_refused():
    architecture = ARCHITECTURES["gpt2"]
    model, inputs = architecture.build(), architecture.inputs(0)
    with pytest.raises(TreeMismatch, match="not orthonormal"):
        sweep(model, "transformer.h.*", 0.0, metric, subspace=torch.ones(32, 2), **inputs)
    with pytest.raises(TreeMismatch, match="a subspace of 5 dimensions is none of"):
        sweep(model, "transformer.h.*", 0.0, metric, subspace=torch.eye(5)[:, :2], **inputs)


@pytest.mark.parametrize("engine", WAYS)
def test_a_function_that_returns_nothing_changes_nothing(engine):
    architecture = ARCHITECTURES["gpt2"]
    effects = sweep(
        architecture.build(), "transformer.h.*", lambda region: None, metric, engine=engine, **architecture.inputs(0)
    )
    assert not effects.values.any()


@pytest.mark.parametrize("engine", WAYS)
@pytest.mark.parametrize("where", [["0", "0.a"], ["0.a", "0"], ["", "1"], ["1", "1.a", "0"], "**"])
def test_a_module_and_what_is_in_it(where, engine):
    torch.manual_seed(0)
    model, x = nn.Sequential(ResidualBlock(), ResidualBlock()), torch.randn(3, 4)
    effects = sweep(model, where, 0.25, lambda out: out[:, 0], x, engine=engine)
    assert far_from_loop(model, effects, lambda path: 0.25, lambda out: out[:, 0], x) < FAR


@pytest.mark.parametrize("where", ["0@tanh#*()", "*@tanh#*()", "0.a@weight.uses#*()"])
def test_each_call_in_a_forward_is_a_cell(where):
    torch.manual_seed(0)
    model, x = nn.Sequential(ResidualBlock(), ResidualBlock()), torch.randn(3, 4)
    effects = sweep(model, where, 0.25, lambda out: out[:, 0], x)
    assert len(effects.sites) == 1 + where.startswith("*") and "#0" in effects.sites[0]
    assert far_from_loop(model, effects, lambda path: 0.25, lambda out: out[:, 0], x) < FAR


def test_what_is_not_there_is_refused_with_the_place():
    model, x = nn.Sequential(ResidualBlock(), ResidualBlock()), torch.randn(3, 4)
    metric = lambda out: out[:, 0]  # noqa: E731
    with pytest.raises(SiteNotReached, match=r"^0#1 was never reached: its module was called, but only 1 times"):
        sweep(model, ["0#0", "0#1"], 0.0, metric, x)
    with pytest.raises(TreeMismatch, match=r"^'0\[\*, 9\]': \[0, 9\] is out of range for Tensor\[3, 4\]"):
        sweep(model, "0[*, 9]", 0.0, metric, x)
    with pytest.raises(NiceHooksError, match=r"engine='growing'.*they are parameters"):
        sweep(model, "0.a@bias[*]", 0.0, metric, x, engine="growing")
    with pytest.raises(NiceHooksError, match="there are no examples"):
        sweep(model, "*", 0.0, metric, x[:0])


@pytest.mark.parametrize("steps", [0, slice(1, None), lambda step: step % 2 == 0])
def test_under_an_intervention_at_some_steps_no_two_runs_are_equal(steps):
    model, x = nn.Sequential(ResidualBlock(), ResidualBlock()), torch.randn(3, 4)
    for experiment in (sweep, attribute):
        with pytest.raises(SweepMismatch, match=r"steer\(model, '1', …\) acts at some steps alone"):
            with steer(model, "1", torch.ones(4), steps=steps):
                experiment(model, "*", 0.0, lambda out: out[:, 0], x)
