"""What `anatomy` hands out holds in every architecture: tried by interventions, not by the library's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import architectures, tiny
from torch import Tensor

from nicehooks import (
    UnsupportedModule,
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
from nicehooks.anatomies.tables import Lacks

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

NOT_BUILT = frozenset(
    (
        "BltForCausalLM",
        "CohereCompassForCausalLM",
        "DbrxForCausalLM",
        "DinatForImageClassification",
        "DonutSwinForImageClassification",
        "Dots1ForCausalLM",
        "EfficientNetForImageClassification",
        "FunAsrNanoForConditionalGeneration",
        "Gemma3nForConditionalGeneration",
        "Gemma4AssistantForCausalLM",
        "KyutaiSpeechToTextForConditionalGeneration",
        "MoonshineStreamingForConditionalGeneration",
        "MusicFlamingoForConditionalGeneration",
        "Nemotron3_5TranscribeForConditionalGeneration",
        "NeoMMEForMaskedLM",
        "PerceiverForImageClassificationConvProcessing",
        "PerceiverForImageClassificationFourier",
        "Swinv2ForImageClassification",
        "TimmWrapperForImageClassification",
        "VibeVoiceAsrForConditionalGeneration",
        "VibeVoiceForConditionalGeneration",
        "Zamba2ForCausalLM",
        "ZambaForCausalLM",
    )
)
"""No tiny one can be made of its default config here, or a package is missing."""

NO_LAYERS = frozenset(
    (
        "BitForImageClassification",
        "HGNetV2ForImageClassification",
        "MobileNetV1ForImageClassification",
        "PPLCNetForImageClassification",
        "ResNetForImageClassification",
        "TextNetForImageClassification",
    )
)
"""Networks of convolutions: none of their layers maps a stream to one of its shape."""

NOT_RUN = frozenset(
    (
        "BailingHybridForCausalLM",
        "CanaryForConditionalGeneration",
        "CohereAsrForConditionalGeneration",
        "DeepseekV2ForCausalLM",
        "DiaForConditionalGeneration",
        "Gemma4UnifiedAssistantForCausalLM",
        "KimiLinearForCausalLM",
        "MoonshineForConditionalGeneration",
        "PvtForImageClassification",
        "SeamlessM4TForSpeechToText",
        "SeamlessM4Tv2ForSpeechToText",
        "ShieldGemma2ForImageClassification",
        "Siglip2ForImageClassification",
        "Speech2TextForConditionalGeneration",
        "SpeechEncoderDecoderModel",
        "SpeechT5ForSpeechToText",
        "SwinForImageClassification",
        "VoxtralRealtimeForConditionalGeneration",
    )
)
"""The tiny one does not run on an input of ours; `anatomy(model, inputs=…)` would be given one."""

NO_STREAM = frozenset(
    (
        "DeepseekV4ForCausalLM",
        "FlaubertWithLMHeadModel",
        "Gemma3nForCausalLM",
        "HieraForImageClassification",
        "Inkling2ForCausalLM",
        "Inkling2LoopForCausalLM",
        "LevitForImageClassification",
        "LevitForImageClassificationWithTeacher",
        "MobileNetV2ForImageClassification",
        "ReformerForMaskedLM",
        "ReformerModelWithLMHead",
        "RegNetForImageClassification",
        "SqueezeBertForMaskedLM",
        "XLMWithLMHeadModel",
        "ZayaForCausalLM",
    )
)
"""What their layers give is no sum: several streams, layers that are no modules, or stages of other shapes."""

REFUSED = {
    "EsmForMaskedLM": "no linear layer",
    "EsmcForMaskedLM": "no linear layer",
    "MegatronBertForCausalLM": "no linear layer",
    "MegatronBertForMaskedLM": "no linear layer",
    "RobertaPreLayerNormForCausalLM": "no linear layer",
    "RobertaPreLayerNormForMaskedLM": "no linear layer",
    "UltrabertForMaskedLM": "no linear layer",
    "XLMRobertaXLForCausalLM": "no linear layer",
    "XLMRobertaXLForMaskedLM": "no linear layer",
    "ZayaForCausalLM": "not plainly a sum",
}
"""What `direct_logit_attribution` says where no logit can be taken apart."""


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
        summed = places.form and all(step.kind == "add" for step in places.form)
        if not summed or "resid_post" not in places.passed:
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
    same = {body.pattern[layer]: clean[body.pattern[layer]]}  # values may be what a mask is made of (Doge)
    with patch(model, same), ablate(model, v.head(which)):
        _, acts = seen(model, inputs, z)
    changed = (acts[z] - clean[z]).abs().amax((0, 1, 3)) > 1e-4 * clean[z].abs().max()
    assert changed.tolist() == [which * groups <= head < (which + 1) * groups for head in range(z.heads)]
    if "norm" in body.layout.layers[layer].compared.get("q", ""):  # it may be over all heads
        return
    if clean[body.pattern[layer]].shape[-1] == 1:  # of a single key, whatever asks for it
        return
    last = z.heads - 1
    with ablate(model, q.head(last)):
        _, acts = seen(model, inputs, body.pattern[layer])
    pattern = body.pattern[layer]
    moved = (acts[pattern] - clean[pattern]).abs().amax((0, 2, 3)) > 1e-6
    assert moved.tolist() == [head == last for head in range(z.heads)]


def a_head_ablated_is_its_slice_zeroed_by_hand(model: Any, body: Anatomy, inputs: dict[str, Any]) -> Tensor | None:
    """What `attn_out` is without head 1; None where no projection reads the heads side by side."""
    layer = body.z.layers[0]
    if not body.has("attn_proj", layer):
        return None
    z, out = body.z[layer], body.attn_out[layer]
    assert z.heads is not None
    which = min(1, z.heads - 1)

    def zeroed(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].unflatten(-1, (z.heads, -1)).clone()
        heads[..., which, :] = 0
        return heads.flatten(-2), *args[1:]

    handle = body.module("attn_proj", layer).register_forward_pre_hook(zeroed)
    try:
        _, by_hand = seen(model, inputs, out)
    finally:
        handle.remove()
    with ablate(model, z.head(which)):
        _, without = seen(model, inputs, out)
    assert torch.equal(without[out], by_hand[out])
    return without[out]


def results_are_what_ablating_takes_away(model: Any, body: Anatomy, inputs: dict[str, Any], without: Tensor) -> None:
    layer = body.z.layers[0]
    if body.has("attn_post_norm", layer):
        return
    _, clean = seen(model, inputs, body.z, body.attn_out)
    which = min(1, (body.z[layer].heads or 1) - 1)
    taken = clean[body.attn_out[layer]] - without
    assert close(head_results(model, clean, layer)[:, :, which], taken)


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


def hold(model: Any, found: Anatomy, inputs: dict[str, Any]) -> None:
    """The parts of one stack do what their names say."""
    with torch.no_grad():
        steps = [step for places in found.layout.layers for step in places.form]
        terms = dict.fromkeys(step.what for step in steps if step.kind == "add")
        if terms:  # what gives no sum may give no stream either
            _, acts = seen(model, inputs, found.resid_pre, found.resid_post, *(found[what] for what in terms))
            assert sums_hold(found, acts)
        if all(has(found, part) for part in ("q", "v", "z", "pattern")):
            heads_are_apart(model, found, inputs)
        if has(found, "z") and has(found, "attn_out"):
            without = a_head_ablated_is_its_slice_zeroed_by_hand(model, found, inputs)
            # head_results reads the decoder, where there is an encoder, too
            if without is not None and found.base == bodies_of(anatomy(model))[-1].base:
                results_are_what_ablating_takes_away(model, found, inputs, without)


def built(name: str) -> Any:
    """A tiny model, or None of one that is known for not being built."""
    try:
        return tiny(name)
    except Exception:
        if name in NOT_BUILT:
            return None
        raise


def found_in_three_forwards(model: Any) -> Any:
    """The anatomy, for which the model has run three times at most."""
    done: list[int] = []
    handle = model.register_forward_hook(lambda *_: done.append(1))
    try:
        return anatomy(model)
    finally:
        handle.remove()
        assert len(done) <= 3


def bodies_of(found: Anatomy | EncoderDecoder) -> list[Anatomy]:
    return [found.encoder, found.decoder] if isinstance(found, EncoderDecoder) else [found]


def is_covered(found: Anatomy) -> bool:
    """Whether the stream and all that is added to it are there, and checked."""
    layers = found.layout.layers
    return all(places.form and {"resid_pre", "resid_post", *_added(places)} <= set(places.passed) for places in layers)


def _added(places: Any) -> set[str]:
    return {step.what for step in places.form if step.kind == "add"}


def says_why(found: Anatomy) -> bool:
    """Whether each part of a layer that is not there has a reason."""
    places = [place for layer in found.layout.layers for place in layer.parts.values()]
    return all(place.reason for place in places if isinstance(place, Lacks))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_parts_hold(name: str) -> None:
    model = tiny(name)
    hold(model, anatomy(model), inputs_of(model))
    attribution_sums_up(model, anatomy(model), inputs_of(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", architectures("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"))
def test_every_architecture_has_its_stream_or_says_why_not_and_what_it_has_holds(name: str) -> None:
    model = built(name)
    if model is None:
        return
    if name in NOT_RUN:
        with pytest.raises(UnsupportedModule, match="did not run on any input of ours"):
            anatomy(model)
        return
    found = found_in_three_forwards(model)
    for body in bodies_of(found):
        assert is_covered(body) or name in NO_STREAM
        assert says_why(body)
        hold(model, body, inputs_of(model))
    if name in REFUSED:
        with pytest.raises(UnsupportedModule, match=REFUSED[name]):
            attribution_sums_up(model, bodies_of(found)[-1], inputs_of(model))
    else:
        attribution_sums_up(model, bodies_of(found)[-1], inputs_of(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", architectures("IMAGE_CLASSIFICATION"))
def test_of_vision_what_is_found_holds_and_what_is_not_says_why(name: str) -> None:
    model = built(name)
    if model is None:
        return
    if name in NO_LAYERS | NOT_RUN:
        with pytest.raises(UnsupportedModule, match="did not run" if name in NOT_RUN else "showed no layers in it"):
            anatomy(model)
        return
    found = found_in_three_forwards(model)
    assert is_covered(found) or name in NO_STREAM
    assert says_why(found)
    hold(model, found, inputs_of(model))
