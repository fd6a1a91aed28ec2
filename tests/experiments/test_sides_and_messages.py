"""Encoders with decoders, and values and runs of which experiments say what is wrong with them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
import torch
from gallery.swept import Mixing
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from nicehooks import anatomy, attribute, edges, edit, sweep
from nicehooks.errors import NiceHooksError, SweepMismatch, TreeMismatch, UnsupportedModule
from nicehooks.experiments.corrections import as_constant
from nicehooks.experiments.items import Unfit

IDS, OTHER = torch.randint(1, 30, (2, 2, 5), generator=torch.Generator().manual_seed(0))


@cache
def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 16, "vocab_size": 30}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@cache
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=30)).eval()


def metric(output: Any) -> Tensor:
    return output.logits[:, -1, 8]


INPUTS = {"input_ids": IDS, "decoder_input_ids": OTHER}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_atp_leaves_out_the_layers_of_the_side_and_those_behind_it(side: str) -> None:
    """The mean size of the gradient estimates, over the layers that leave a gradient."""
    parts = anatomy(t5())
    where = [f"{part}[:, *]" for part in getattr(parts, side).mlp_out]
    found = attribute(t5(), where, 0.0, metric, method="atp*", **INPUTS)
    bodies = [parts.decoder] if side == "decoder" else [parts.encoder, parts.decoder]
    sizes, counts = torch.zeros(2, 5, 2), torch.zeros(2, 5, 1)  # [layer, position, example]
    for body in bodies:
        for layer in range(2):
            names = ["attn_out", "mlp_out", *(["cross_attn_out"] if body is parts.decoder else [])]
            outputs = [getattr(body, name)[layer] for name in names]
            with edit(t5(), outputs, as_constant):
                each = attribute(t5(), where, 0.0, metric, **INPUTS).examples
            sizes += each.abs()
            counts += (each != 0).any(-1, keepdim=True)
    whole = attribute(t5(), where, 0.0, metric, **INPUTS).examples
    torch.testing.assert_close(found.examples, whole.sign() * sizes / counts.clamp(min=1))


def test_queries_of_either_side_have_a_corrected_estimate() -> None:
    for side in ("encoder", "decoder"):
        where = [f"{part}[:, *]" for part in getattr(anatomy(t5()), side).q]
        assert not attribute(t5(), where, 0.0, metric, method="atp*", **INPUTS).values.isnan().any()


def test_places_of_both_sides_are_told_to_choose_one() -> None:
    parts = anatomy(t5())
    with pytest.raises(UnsupportedModule, match=r"not all of these places are in the layers of one of them") as raised:
        attribute(t5(), [parts.encoder.z, parts.decoder.z], 0.0, metric, method="atp*", **INPUTS)
    assert "anatomy(model).decoder.z" in str(raised.value)


def test_edges_are_of_one_stream() -> None:
    with pytest.raises(UnsupportedModule, match="has an encoder and a decoder, each with a residual stream of its own"):
        edges(t5(), 0.0, metric, **INPUTS)


def test_values_that_are_texts() -> None:
    for run in (sweep, attribute):
        with pytest.raises(
            TypeError, match=r"takes a number, a tensor, a cache, a function or 'resample', not 'zero'\."
        ):
            run(gpt2(), "transformer.h.*", "zero", metric, IDS)
    with pytest.raises(TypeError, match=r"^edges\(model, values, …\) takes a cache .* not 'resample'\. 'resample' and"):
        edges(gpt2(), "resample", metric, IDS)


def test_numbers_of_numpy_are_numbers() -> None:
    for run in (sweep, attribute):
        found = [run(gpt2(), "transformer.h.*", one, metric, IDS).values for one in (numpy.float32(0.5), 0.5)]
        torch.testing.assert_close(*found)
    both = [edges(gpt2(), one, metric, IDS, method="eap").values for one in (numpy.float32(0.5), 0.5)]
    torch.testing.assert_close(*both, equal_nan=True)


def test_whole_numbers_have_no_gradient() -> None:
    with pytest.raises(TreeMismatch, match=r"^attribute at 'transformer.wte@input\[0\]': .* whole numbers") as raised:
        attribute(gpt2(), "transformer.wte@input[0][:, *]", 5, metric, IDS)
    assert "sweep(model, where, …)" in str(raised.value)


@pytest.mark.parametrize(
    ("ends", "kind", "message"),
    [
        ((float("nan"), 0.0), NiceHooksError, r"^normalized\(…, clean=nan\): the metric of this run is NaN"),
        (
            (1.0, torch.tensor([float("nan")])),
            NiceHooksError,
            r"^normalized\(…, corrupted=tensor\(\[nan\]\)\): the metric",
        ),
        (("a", 0.0), TypeError, r"^normalized\(…, clean='a'\): it is a number, not str$"),
    ],
)
def test_ends_that_are_no_numbers(ends: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sweep(gpt2(), "transformer.h.*", 0.0, metric, IDS).normalized(*ends)


def test_a_random_function_is_suspected_too() -> None:
    with pytest.raises(SweepMismatch, match="The model, or a function that was given, may draw random numbers"):
        sweep(gpt2(), "transformer.h.*[:, *]", torch.randn_like, metric, IDS)


def test_masked_scores_get_a_note() -> None:
    found = attribute(gpt2(), anatomy(gpt2()).scores, 0.0, metric, IDS)
    assert found.values.isnan().all()
    assert found.notes[-1].startswith("2 effects are NaN: what stands there, or what replaces it, is infinite")


@pytest.mark.parametrize("engine", ["growing", "batch"])
def test_an_engine_that_fails_inside_the_model_does_not_fit(engine: Any) -> None:
    model = Mixing().eval()
    with pytest.raises(Unfit, match=rf"^sweep\(…, engine='{engine}'\) does not fit this model: mat1 and mat2"):
        sweep(model, "{a,b}[:, *]", 0.0, lambda out: out[:, 0], torch.randn(4, 4), torch.randn(4, 4), engine=engine)
    assert sweep(model, "{a,b}", 0.0, lambda out: out[:, 0], torch.randn(4, 4), torch.randn(4, 4)).values.shape == (2,)
