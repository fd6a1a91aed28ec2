"""What experiments refuse at once: models, metrics, counts and numbers that are none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nicehooks import acdc, anatomy, attribute, capture, circuit, edges, faithfulness, sweep
from nicehooks.errors import NiceHooksError, SiteNotFound, TreeMismatch

CLEAN, CORRUPTED = torch.randint(30, (2, 3, 5), generator=torch.Generator().manual_seed(0))
WHERE = "transformer.h.*[:, *]"


@cache
def gpt2(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=2, n_embd=8, vocab_size=30)).eval()


@cache
def values() -> Any:
    parts = anatomy(gpt2())
    with torch.no_grad(), capture(gpt2(), parts.resid_pre[0], parts.z, parts.mlp_out, "transformer.h.*") as found:
        gpt2()(CORRUPTED)
    return found


def metric(output: Any) -> Any:
    return output.logits[:, -1, 8] - output.logits[:, -1, 9]


@cache
def found() -> Any:
    return edges(gpt2(), values(), metric, CLEAN, method="eap")


@cache
def estimated() -> Any:
    return attribute(gpt2(), WHERE, values(), metric, CLEAN)


def run(verb: str, measure: Any = metric, model: Any = None, inputs: Any = CLEAN, **options: Any) -> Any:
    model = gpt2() if model is None else model
    calls = {
        "sweep": lambda: sweep(model, WHERE, values(), measure, inputs, **options),
        "attribute": lambda: attribute(model, WHERE, values(), measure, inputs, **options),
        "edges": lambda: edges(model, values(), measure, inputs, **options),
        "faithfulness": lambda: faithfulness(model, circuit(found(), top=3), values(), measure, inputs, **options),
        "acdc": lambda: acdc(model, values(), measure, inputs, **{"threshold": 1.0, **options}),
    }
    return calls[verb]()


VERBS = ["sweep", "attribute", "edges", "faithfulness", "acdc"]


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_model_or_no_metric(verb: str) -> None:
    with pytest.raises(TypeError, match=rf"^{verb}\(model, …\) takes a torch.nn.Module as model, not str$"):
        run(verb, model="gpt2")
    with pytest.raises(TypeError, match=rf"^{verb}\(…, metric, \*args\) takes a function of .* not Tensor:\n"):
        run(verb, CLEAN)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("measure", "shown"),
    [
        (lambda output: None, "None"),
        (lambda output: "a", "str"),
        (lambda output: metric(output) * 1j, r"Tensor\[3\] complex64"),
        (lambda output: output.logits[:, -1], r"Tensor\[3, 30\] float32"),
        (lambda output: output.logits[0, -1, :7], r"Tensor\[7\] float32 for a batch of 3"),
        (lambda output: output.logits[0, -1, :2], r"Tensor\[2\] float32 for a batch of 3"),
    ],
)
def test_a_metric_that_is_no_number(verb: str, measure: Any, shown: str) -> None:
    with pytest.raises(TreeMismatch, match=f"^metric.output. is one number for each example, .* returned {shown}"):
        run(verb, measure)


@pytest.mark.parametrize("measure", [lambda output: metric(output).mean().item(), lambda output: 3])
def test_a_number_without_a_gradient(measure: Any) -> None:
    assert run("sweep", measure).examples is None
    for verb in ("attribute", "edges"):
        with pytest.raises(TreeMismatch, match="It is a number, but what is missing is a floating tensor with a grad"):
            run(verb, measure)


def test_one_number_for_all_in_a_dimension_of_its_own() -> None:
    one = run("sweep", lambda output: metric(output).mean(0, keepdim=True))
    torch.testing.assert_close(one.values, run("sweep").values)
    assert one.examples is None


def test_numbers_of_examples_that_stand_in_the_second_dimension() -> None:
    model, x = nn.RNN(4, 3).eval(), torch.randn(5, 2, 4)
    effects = sweep(model, "@output[0][*]", 0.0, lambda output: output[0][-1, :, 0], x)
    assert effects.examples is not None and effects.examples.shape == (5, 2)


@pytest.mark.parametrize("verb", VERBS)
def test_an_empty_batch(verb: str) -> None:
    with pytest.raises(NiceHooksError, match=rf"^{verb}\(model, …\): there are no examples in the batch\.$"):
        run(verb, inputs=CLEAN[:0])


@pytest.mark.parametrize("verb", ["edges", "faithfulness", "acdc"])
def test_a_metric_that_is_nan(verb: str) -> None:
    with pytest.raises(TreeMismatch, match=f"^{verb}: the metric is NaN in the run without an intervention"):
        run(verb, lambda output: metric(output) * float("nan"))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: run("edges", points=0), ValueError, "edges(…, points=0): it is 1 or more"),
        (lambda: run("attribute", points=-1), ValueError, "attribute(…, points=-1): it is 1 or more"),
        (lambda: run("sweep", chunk_size=0), ValueError, "sweep(…, chunk_size=0): it is 1 or more"),
        (lambda: run("sweep", chunk_size="x"), TypeError, "sweep(…, chunk_size='x'): it is a whole number, not str"),
        (lambda: circuit(found(), top=-1), ValueError, "circuit(edges, top=-1): it is 0 or more"),
        (lambda: circuit(found(), top=1.5), TypeError, "circuit(edges, top=1.5): it is a whole number, not float"),
        (lambda: circuit(found(), threshold=float("nan")), ValueError, "circuit(edges, threshold=nan): nothing is"),
        (lambda: circuit(estimated(), top=1), TypeError, "circuit(edges, …) takes what edges(model, …) returns, not A"),
        (lambda: run("acdc", threshold="1"), TypeError, "acdc(…, threshold='1'): it is a number, not str"),
        (lambda: run("faithfulness", sizes=[]), ValueError, "faithfulness(…, sizes=[]): no size is asked for"),
        (lambda: run("faithfulness", sizes=[-1]), ValueError, "faithfulness(…, sizes=…, one=-1): it is 0 or more"),
        (lambda: run("faithfulness", random=-1), ValueError, "faithfulness(…, random=-1): it is 0 or more"),
        (
            lambda: run("faithfulness", model=gpt2(3)),
            TreeMismatch,
            "faithfulness(model, …): the circuit is",
        ),
        (
            lambda: run("acdc", model=gpt2(3), start=circuit(found(), top=1)),
            TreeMismatch,
            "acdc(model, …): the circuit",
        ),
        (lambda: run("edges", senders=[]), SiteNotFound, "edges(…, senders=[]) names no senders; leave senders= out"),
        (
            lambda: run("edges", senders="mlp_out[1]", receivers="mlp_in[0]"),
            SiteNotFound,
            "edges(…, senders=…, receivers=…): no edge leads from any of these to any of those: mlp_out[1] writes "
            "after mlp_in[0] has read. Are they the wrong way round?",
        ),
        (lambda: estimated().verify(-1), ValueError, "verify(k=-1): it is 0 or more"),
        (lambda: estimated().verify(2, samples=-1), ValueError, "verify(…, samples=-1): it is 0 or more"),
        (lambda: estimated().top(-1), ValueError, "top(k=-1): it is 0 or more"),
        (lambda: estimated().top(True), TypeError, "top(k=True): it is a whole number, not bool"),
        (lambda: sweep(gpt2(), [], 0.0, metric, CLEAN), SiteNotFound, "sweep(model, where, …): where selects nothing"),
        (lambda: attribute(gpt2(), False, 0.0, metric, CLEAN), SiteNotFound, "attribute(model, where, …): where sel"),
    ],
)
def test_numbers_and_places_that_make_no_sense(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_an_edge_whose_effect_is_nan() -> None:
    scores = found().normalized(1.0, 0.0)
    scores.values[0, 0] = float("nan")
    with pytest.raises(TreeMismatch, match=r"^circuit: the effect of the edge embed → q\[0\].head\(0\) is NaN"):
        circuit(scores, top=3)
