"""What `anatomy` hands out holds in every architecture: tried by interventions, not by the library's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from torch import Tensor

from nicehooks import (
    NiceHooksError,
    ablate,
    anatomy,
    capture,
    direct_logit_attribution,
    head_results,
    logit_lens,
    patch,
)
from nicehooks.anatomies.anatomy import Anatomy, EncoderDecoder
from nicehooks.anatomies.short_inputs import short_inputs

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

SAMPLE = (
    "BertForMaskedLM",
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "GPTJForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "JambaForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3ForCausalLM",
)


def inputs_of(model: Any) -> dict[str, Any]:
    """The first input of the library's own that the model runs on."""
    for given in short_inputs(model):
        try:
            model(**given)
        except Exception:  # the next one
            continue
        return given
    raise AssertionError("no input")


def seen(model: Any, inputs: dict[str, Any], *where: Any) -> tuple[Any, Any]:
    with torch.no_grad(), capture(model, *where, clone=True) as acts:
        output = model(**inputs)
    return output, acts


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=atol * max(1.0, float(b.abs().max())), rtol=1e-3))


def has(body: Anatomy, part: str) -> bool:
    return (
        not body.lacks(part)
        if part in ("embed", "final_norm", "logits")
        else part in dir(body) and not body.lacks(part)
    )


def sums_hold(body: Anatomy, acts: Any) -> bool:
    """Whether, where no norm and no factor stands on the stream, what comes in and the branches make what goes out."""
    for layer, places in enumerate(body.layout.layers):
        if any(step.kind != "add" for step in places.form) or "resid_post" not in places.passed:
            continue
        terms = [acts[body[step.what, layer]] for step in places.form]
        if not close(acts[body.resid_pre[layer]] + sum(terms), acts[body.resid_post[layer]]):
            return False
    return True


def heads_are_apart(model: Any, body: Anatomy, inputs: dict[str, Any]) -> None:
    """A head of `v` set to zero changes `z` in the heads that read it, and in no other; so `q` and the pattern."""
    layer = body.z.layers[0]
    z, v, q = body.z[layer], body.v[layer], body.q[layer]
    assert z.heads is not None and v.heads is not None
    _, clean = seen(model, inputs, z, body.pattern[layer])
    which, groups = min(1, v.heads - 1), z.heads // v.heads
    with ablate(model, v.head(which)):
        _, acts = seen(model, inputs, z)
    changed = (acts[z] - clean[z]).abs().amax((0, 1, 3)) > 1e-4 * clean[z].abs().max()
    assert changed.tolist() == [which * groups <= head < (which + 1) * groups for head in range(z.heads)]
    if "norm" in body.layout.layers[layer].compared.get("q", ""):  # it may be over all heads
        return
    with ablate(model, q.head(2)):
        _, acts = seen(model, inputs, body.pattern[layer])
    pattern = body.pattern[layer]
    moved = (acts[pattern] - clean[pattern]).abs().amax((0, 2, 3)) > 1e-6
    assert moved.tolist() == [head == 2 for head in range(z.heads)]


def results_are_what_ablating_takes_away(model: Any, body: Anatomy, inputs: dict[str, Any]) -> None:
    layer = body.z.layers[0]
    _, clean = seen(model, inputs, body.z, body.attn_out)
    if body.has("attn_post_norm", layer) or not body.has("attn_proj", layer):
        return
    results = head_results(model, clean, layer)
    by_hand = clean[body.z[layer]].clone()
    by_hand[:, :, 1] = 0
    with patch(model, {body.z[layer]: by_hand}):
        _, other = seen(model, inputs, body.attn_out[layer])
    with ablate(model, body.z[layer].head(1)):
        _, without = seen(model, inputs, body.attn_out[layer])
    assert torch.equal(without[body.attn_out[layer]], other[body.attn_out[layer]])
    assert close(results[:, :, 1], clean[body.attn_out[layer]] - without[body.attn_out[layer]])


def attribution_sums_up(model: Any, body: Anatomy, inputs: dict[str, Any]) -> None:
    plain = all(step.kind == "add" for places in body.layout.layers for step in places.form)
    if not (plain and body.has("unembed") and "logits" in body.layout.passed and body.head.softcap is None):
        return
    branches = [body[part] for part in dict.fromkeys(s.what for p in body.layout.layers for s in p.form)]
    ends = [] if body.lacks("final_norm") else [body.final_norm]
    output, cache = seen(model, inputs, body.resid_pre[0], *branches, body.resid_post, *ends)
    assert close(logit_lens(model, cache)[-1], output.logits)
    terms = direct_logit_attribution(model, cache, 7, against=5)
    assert close(sum(terms.values()), output.logits[:, -1, 7] - output.logits[:, -1, 5])
    assert float(terms["rest"].abs().max()) < 1e-3 * float(output.logits.abs().max())


def hold(name: str) -> None:
    try:
        model = tiny(name)
        found = anatomy(model)
    except (NiceHooksError, ValueError, AttributeError, AssertionError, RuntimeError, ImportError, KeyError, TypeError):
        return  # the script counts these
    if isinstance(found, EncoderDecoder):
        return
    inputs = inputs_of(model)
    with torch.no_grad():
        steps = [step for places in found.layout.layers for step in places.form]
        terms = dict.fromkeys(step.what for step in steps if step.kind == "add")
        _, acts = seen(model, inputs, found.resid_pre, found.resid_post, *(found[what] for what in terms))
        assert sums_hold(found, acts)
        if all(has(found, part) for part in ("q", "v", "z", "pattern")):
            heads_are_apart(model, found, inputs)
        if has(found, "z") and has(found, "attn_out"):
            results_are_what_ablating_takes_away(model, found, inputs)
        attribution_sums_up(model, found, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_parts_hold(name: str) -> None:
    hold(name)
