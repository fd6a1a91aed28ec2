"""`edges`: every edge of a two-layer model beside a forward by hand, and gradients beside small steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from bodies import body
from by_hooks import one_thread
from gallery.architectures import VOCABULARY, gpt2
from gallery.every_architecture import tiny
from torch import Tensor

from nicehooks import ActivationCache, NotCaptured, SiteNotFound, UnsupportedModule, anatomy, capture, edges, patch
from nicehooks.experiments.edge_effects import TwoRuns
from nicehooks.experiments.wiring import Wiring

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

LAYERS, HEADS, SIZE = 2, 2, 8


def metric(output: Any) -> Tensor:
    """One number per example."""
    return output.logits[:, -1, 5] - output.logits[:, -1, 6]


def prompts(length: int = 5) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    clean = torch.randint(3, VOCABULARY, (2, length), generator=random)
    corrupted = clean.clone()
    corrupted[:, 2] = torch.randint(3, VOCABULARY, (2,), generator=random)
    return clean, corrupted


@functools.cache
def small() -> Any:
    """A GPT-2 of two layers with two heads each, in double precision, with biases."""
    torch.manual_seed(0)
    model = gpt2(n_layer=LAYERS, n_head=HEADS, n_embd=HEADS * SIZE).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 if parameter.ndim == 1 else 0.0)
    return model


def seen(model: Any, ids: Tensor) -> ActivationCache:
    """What parts write in a run."""
    parts = anatomy(model)
    with torch.no_grad(), capture(model, parts.resid_pre[0], parts.z, parts.mlp_out) as acts:
        model(ids)
    return acts


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, ids: Tensor, other: dict[str, Tensor], patched: set[tuple[str, str]]) -> tuple[Any, Any]:
    """The logits of a GPT-2 where the edges in `patched` carry `other`, and what each part wrote."""
    gpt, written = model.transformer, dict[str, Tensor]()
    written["embed"] = gpt.wte(ids) + gpt.wpe(torch.arange(ids.shape[1]))
    stream = written["embed"]

    def as_read(stream: Tensor, receiver: str) -> Tensor:
        """The stream, with another term for each patched edge."""
        return stream + sum(other[s] - written[s] for s, r in patched if r == receiver and s in written)

    for layer, block in enumerate(gpt.h):
        weights = block.attn.c_attn.weight.split(HEADS * SIZE, 1)
        biases = block.attn.c_attn.bias.split(HEADS * SIZE)
        results: list[Tensor] = []
        for head in range(HEADS):
            columns = slice(head * SIZE, (head + 1) * SIZE)
            q, k, v = [
                block.ln_1(as_read(stream, f"{kind}[{layer}].head({head})")) @ weight[:, columns] + bias[columns]
                for kind, weight, bias in zip("qkv", weights, biases, strict=True)
            ]
            scores = (q @ k.mT / SIZE**0.5).masked_fill(
                torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -torch.inf
            )
            results.append(scores.softmax(-1) @ v @ block.attn.c_proj.weight[columns])
        for head, result in enumerate(results):
            written[f"z[{layer}].head({head})"] = result
        stream = stream + sum(results) + block.attn.c_proj.bias
        written[f"mlp_out[{layer}]"] = block.mlp(block.ln_2(as_read(stream, f"mlp_in[{layer}]")))
        stream = stream + written[f"mlp_out[{layer}]"]
    return model.lm_head(gpt.ln_f(as_read(stream, "logits"))), written


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


def test_every_edge_of_a_two_layer_model_by_hand() -> None:
    model, (clean, corrupted) = small(), prompts()
    with torch.no_grad():
        logits, _ = by_hand(model, clean, {}, set())
        assert torch.allclose(logits, model(clean).logits)
        _, other = by_hand(model, corrupted, {}, set())
    exact = edges(model, seen(model, corrupted), metric, clean, method="exact")
    senders, receivers = exact.axes[0].labels, exact.axes[1].labels
    assert (len(senders), len(receivers)) == (7, 15)
    tried = 0
    for row, sender in enumerate(senders):
        for column, receiver in enumerate(receivers):
            effect = exact.examples[row, column]
            if effect.isnan().all():
                assert not Wiring(model).there[row, column]
                continue
            with torch.no_grad():
                changed, _ = by_hand(model, clean, other, {(sender, receiver)})
            assert torch.allclose(effect, difference(changed) - difference(logits), atol=1e-10), (sender, receiver)
            tried += 1
    assert tried == 7 * 1 + 1 * 7 + 2 + 4 * 7 + 2  # logits; layer 0 and its MLP, layer 1 and its MLP
    assert exact.examples.nan_to_num(0.0).abs().max() > 0.01


def test_any_set_of_edges_in_one_forward_by_hand() -> None:
    model, (clean, corrupted) = small(), prompts()
    wiring = Wiring(model)
    runs = TwoRuns.of(wiring, seen(model, corrupted), metric, (clean,), {})
    with torch.no_grad():
        _, other = by_hand(model, corrupted, {}, set())
        for seed in range(4):
            mask = (torch.rand(wiring.there.shape, generator=torch.Generator().manual_seed(seed)) < 0.5) & wiring.there
            chosen = {(wiring.senders[s].name, wiring.receivers[r].name) for s, r in mask.nonzero().tolist()}
            logits, _ = by_hand(model, clean, other, chosen)
            assert torch.allclose(runs.patched(mask), difference(logits), atol=1e-10)


def test_gradients_are_the_limit_of_small_steps() -> None:
    model, (clean, corrupted) = small(), prompts()
    base, other = seen(model, clean), seen(model, corrupted)
    step = 1e-5
    near = base + (other - base) * step
    exact = torch.as_tensor(edges(model, near, metric, clean, method="exact").examples) / step
    slopes = edges(model, other, metric, clean, method="eap").examples
    assert torch.equal(exact.isnan(), slopes.isnan())
    assert torch.allclose(exact, slopes, atol=1e-4, equal_nan=True)
    assert slopes.nan_to_num(0.0).abs().max() > 0.01


def test_integrated_gradients_are_gradients_between_the_embeddings() -> None:
    """With one point they are those of a run whose embeddings are half way, times the whole change."""
    model, (clean, corrupted) = small(), prompts()
    values, first = seen(model, corrupted), anatomy(model).resid_pre[0]
    positions = model.transformer.wpe(torch.arange(clean.shape[1]))
    half_way = (seen(model, clean)[first] + values[first]) / 2 - positions
    one = edges(model, values, metric, clean, points=1)
    there = edges(model, values, metric, inputs_embeds=half_way, method="eap")
    assert one.axes[0].labels[0] == "embed"
    assert torch.allclose(one.examples[0], 2 * there.examples[0], atol=1e-10, equal_nan=True)


def test_integrated_gradients_are_nearer_to_the_effects() -> None:
    model, (clean, corrupted) = body("qwen3"), prompts()
    values = seen(model, corrupted)
    receivers = ["logits", "mlp_in[2]", "v[1].head(1)"]
    exact = edges(model, values, metric, clean, method="exact", receivers=receivers).values
    errors = [
        (edges(model, values, metric, clean, method=method, receivers=receivers).values - exact).nan_to_num(0.0).norm()
        for method in ("eap", "eap-ig")
    ]
    assert errors[1] < errors[0]


# --- other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_parallel", "llama", "qwen3", "gemma2", "opt"])
def test_with_every_edge_patched_it_is_the_other_run(family: str) -> None:
    model, (clean, corrupted) = body(family, "eager"), prompts()
    wiring = Wiring(model)
    runs = TwoRuns.of(wiring, seen(model, corrupted), metric, (clean,), {})
    other = metric(model(corrupted))
    assert torch.equal(runs.patched(torch.zeros_like(wiring.there)), metric(model(clean)))
    assert torch.allclose(runs.patched(wiring.there), other, atol=1e-4)
    assert not torch.allclose(runs.baseline, other, atol=0.1)


def test_one_edge_is_less_than_patching_its_sender() -> None:
    """All edges of a sender together are its effect."""
    model, (clean, corrupted) = body("llama"), prompts()
    values, parts = seen(model, corrupted), anatomy(model)
    runs = TwoRuns.of(Wiring(model), values, metric, (clean,), {})
    mask = torch.zeros_like(runs.wiring.there)
    mask[runs.wiring.place_of_sender["mlp_out[0]"]] = True
    with torch.no_grad(), patch(model, parts.mlp_out[0], values[parts.mlp_out[0]]):
        expected = metric(model(clean))
    assert torch.allclose(runs.patched(mask), expected, atol=1e-4)


def test_layers_stand_for_their_heads() -> None:
    model, (clean, corrupted) = body("llama"), prompts()
    values, parts = seen(model, corrupted), anatomy(model)
    every = edges(model, values, metric, clean, method="eap")
    some = edges(model, values, metric, clean, method="eap", senders=[parts.attn_out[0], "embed"], receivers=parts.k[2])
    rows = [every.axes[0].labels.index(f"z[0].head({head})") for head in range(4)]
    columns = [every.axes[1].labels.index(f"k[2].head({head})") for head in range(2)]
    assert some.axes[0].labels == ("attn_out[0]", "embed") and some.axes[1].labels == ("k[2]",)
    assert torch.allclose(some.values[0, 0], every.values[rows][:, columns].sum(), atol=1e-5)
    exact = edges(model, values, metric, clean, method="exact", senders=parts.attn_out[0], receivers=parts.k[2])
    mask = torch.zeros_like(every.wiring.there)
    mask[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    runs = TwoRuns.of(every.wiring, values, metric, (clean,), {})
    assert torch.allclose(exact.values[0, 0], (runs.patched(mask) - runs.baseline).mean(), atol=1e-5)


def test_numbers_for_ablation_and_one_number_for_the_batch() -> None:
    model, (clean, _) = small(), prompts()
    exact = edges(model, 0.0, lambda output: metric(output).sum(), clean, method="exact", receivers="logits")
    with torch.no_grad():
        logits, written = by_hand(model, clean, {}, set())
        zeroed, _ = by_hand(
            model, clean, {"mlp_out[0]": torch.zeros_like(written["mlp_out[0]"])}, {("mlp_out[0]", "logits")}
        )
    row = exact.axes[0].labels.index("mlp_out[0]")
    assert exact.examples is None
    assert torch.allclose(exact.values[row, 0], (difference(zeroed) - difference(logits)).sum(), atol=1e-10)


def test_how_far_it_is_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model, (clean, corrupted) = body("gpt2"), prompts()
    values = seen(model, corrupted)
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"senders": "embed", "receivers": ["mlp_in[0]", "logits"]}
    edges(model, values, metric, clean, method="exact", progress=lambda *at: told.append(at), **options)
    assert told == [(1, 2), (2, 2)]
    edges(model, values, metric, clean, method="eap-ig", points=3, progress=True, **options)
    assert "edges: 3 of 3" in capsys.readouterr().err


def test_edges_say_what_they_are() -> None:
    model, (clean, corrupted) = small(), prompts()
    found = edges(model, seen(model, corrupted), metric, clean, method="eap")
    assert repr(found).startswith("Edges(46 edges, from ")
    assert found.top(1)[0].site == " → ".join(found.top(1)[0].labels)
    assert len(found.top(1000)) == 7 * 15 and not torch.tensor([effect.value for effect in found.top(46)]).isnan().any()


def test_what_is_refused() -> None:
    model, (clean, corrupted) = small(), prompts()
    values = seen(model, corrupted)
    with pytest.raises(
        NotCaptured, match=r"lack mlp_out\[0\].*\n.*\n    with capture\(model, parts.resid_pre\[0\], parts.z, parts"
    ):
        edges(model, {part: values[part] for part in (anatomy(model).resid_pre[0], *anatomy(model).z)}, metric, clean)
    with pytest.raises(SiteNotFound, match="'mlp_out\\[7\\]' is no sender of GPT2LMHeadModel"):
        edges(model, values, metric, clean, senders="mlp_out[7]")
    with pytest.raises(UnsupportedModule, match="the methods are 'eap', 'eap-ig', 'exact'"):
        edges(model, values, metric, clean, method="magic")
    with pytest.raises(UnsupportedModule, match="has its norms on the residual stream"):
        edges(body("bert"), 0.0, metric, clean)
    with pytest.raises(UnsupportedModule) as raised:
        edges(tiny("DeepseekV3ForCausalLM"), 0.0, metric, clean)
    assert str(raised.value) == (
        "DeepseekV3ForCausalLM makes k, q, v of something else than the residual stream or a norm of it, as latent "
        "attention does: what a part writes is no term of what they read. attribute(model, …) and sweep(model, …) work."
    )
