"""Models that read pictures and tokens: the anatomy of the language model, and of the vision tower beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from torch import Tensor

from nicehooks import UnsupportedModule, ablate, anatomy, capture, head_results, logit_lens, patch
from nicehooks.anatomies.anatomy import Anatomy

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

IMAGE = 99
SETTINGS: dict[str, dict[str, Any]] = {
    "LlavaForConditionalGeneration": {},
    "PaliGemmaForConditionalGeneration": {},
    "Idefics3ForConditionalGeneration": {"scale_factor": 2},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4},
}
TOKENS = {
    "LlavaForConditionalGeneration": 16,
    "PaliGemmaForConditionalGeneration": 16,
    "Idefics3ForConditionalGeneration": 4,
    "Gemma3ForConditionalGeneration": 4,
}
"""As how many tokens each model reads a picture of four times four patches."""

each_model = pytest.mark.parametrize("name", SETTINGS)


def model_of(name: str) -> Any:
    return tiny(name, image_token_id=IMAGE, **SETTINGS[name])


def seen_by(name: str) -> dict[str, Tensor]:
    """Two pictures, each with a few words behind it."""
    words = torch.tensor([[3, 1, 4], [9, 2, 6]])
    ids = torch.cat([torch.full((2, TOKENS[name]), IMAGE), words], 1)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    types = {"token_type_ids": (ids == IMAGE).long()} if name.startswith(("Gemma3", "PaliGemma")) else {}
    return {"input_ids": ids, "pixel_values": pixels[:, None] if name.startswith("Idefics3") else pixels, **types}


def run(model: Any, name: str) -> Any:
    with torch.no_grad():
        return model(**seen_by(name))


def adds_up(body: Anatomy, acts: Any) -> bool:
    terms = [acts.stack(body[part]) for part in ("resid_pre", "attn_out", "mlp_out")]
    return torch.allclose(sum(terms), acts.stack(body.resid_post), atol=1e-4)


@each_model
def test_both_streams_are_there_while_the_model_reads_a_picture(name: str) -> None:
    model = model_of(name)
    language, vision = anatomy(model).language, anatomy(model).vision
    assert language.base != vision.base
    every = [body[part] for body in (language, vision) for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    with capture(model, *every, language.pattern, vision.pattern) as acts:
        run(model, name)
    assert adds_up(language, acts) and adds_up(vision, acts)
    assert acts[vision.pattern[0]].shape[0] == 2
    positions = TOKENS[name] + 3
    assert acts[language.resid_post[0]].shape == (2, positions, 32)
    assert acts[language.pattern[0]].shape == (2, 4, positions, positions)


@each_model
def test_the_anatomy_of_the_model_is_that_of_its_language_model(name: str) -> None:
    model = model_of(name)
    parts = anatomy(model)
    assert parts.language is parts
    with capture(model, parts.resid_post, parts.z, parts.attn_out) as acts:
        output = run(model, name)
    assert torch.allclose(logit_lens(model, acts)[-1], output.logits, atol=1e-4)
    assert torch.allclose(head_results(model, acts, 1).sum(2), acts[parts.attn_out[1]], atol=1e-4)


@each_model
def test_a_head_of_the_tower_ablated_reaches_the_logits_and_is_its_slice_zeroed_by_hand(name: str) -> None:
    model = model_of(name)
    vision = anatomy(model).vision
    project = vision.module("attn_proj", 0)

    def zeroed(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].unflatten(-1, (4, -1)).clone()
        heads[..., 2, :] = 0
        return (heads.flatten(-2),)

    handle = project.register_forward_pre_hook(zeroed)
    by_hand = run(model, name).logits
    handle.remove()
    with ablate(model, vision.z[0].head(2)):
        without = run(model, name).logits
    assert torch.equal(without, by_hand)
    assert not torch.allclose(without, run(model, name).logits, atol=1e-5)


@each_model
def test_a_stream_of_the_tower_patched_from_another_picture_is_as_if_that_picture_was_read(name: str) -> None:
    model = model_of(name)
    first = anatomy(model).vision.resid_pre[0]
    with capture(model, first) as acts:
        run(model, name)
    with patch(model, {first: acts[first].flip(0)}):
        patched = run(model, name).logits
    given = seen_by(name)
    with torch.no_grad():
        expected = model(**{**given, "pixel_values": given["pixel_values"].flip(0)}).logits
    assert torch.allclose(patched, expected, atol=1e-5)


def test_the_tower_knows_that_it_is_one() -> None:
    vision = anatomy(model_of("LlavaForConditionalGeneration")).vision
    assert vision.vision is vision
    with pytest.raises(UnsupportedModule) as raised:
        _ = vision.language
    assert str(raised.value) == (
        "LlavaForConditionalGeneration has no language model there: what reads pictures (model.vision_tower) reads no "
        "tokens."
    )


def test_a_model_of_pictures_alone_is_its_own_tower() -> None:
    parts = anatomy(tiny("ViTForImageClassification"))
    assert parts.vision is parts
    with pytest.raises(UnsupportedModule, match=r"what reads pictures \(vit\) reads no tokens\."):
        _ = parts.language


def test_a_model_of_tokens_alone_has_no_tower() -> None:
    parts = anatomy(tiny("LlamaForCausalLM"))
    assert parts.language is parts
    with pytest.raises(UnsupportedModule) as raised:
        _ = parts.vision
    assert str(raised.value) == (
        "LlamaForCausalLM has no vision tower: no module in it reads pictures (pixel_values) and no tokens."
    )


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_of_two_towers_side_by_side_one_is_asked_for(name: str) -> None:
    model = tiny(name)
    said = r'Or take one of the models in it:\n    anatomy\(model, at="text_model"\)'
    with pytest.raises(UnsupportedModule, match=said):
        anatomy(model)
    text = anatomy(model, at="text_model")
    assert text.language is text
    assert text.vision.base == anatomy(model, at="vision_model").base == "vision_model.encoder"
