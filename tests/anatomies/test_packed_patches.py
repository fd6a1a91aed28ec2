"""Vision towers that read the patches of all pictures in one row: their parts have a batch of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from gallery.plain import Mlp
from torch import Tensor

from nicehooks import UnsupportedModule, ablate, anatomy, capture, edit, grad_at, patch, sweep
from nicehooks.anatomies.anatomy import Anatomy

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

IMAGE = 99
PACKED = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
HEADED = ("q", "k", "v", "z")
OTHERS = ("Kimi_K25", "VideoLlama3", "Lfm3Vl")

each_packed = pytest.mark.parametrize("name", PACKED)
each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def model_of(name: str, attention: str = "sdpa") -> Any:
    model = tiny(f"{name}ForConditionalGeneration", image_token_id=IMAGE)
    model.set_attn_implementation(attention)
    return model


def vision_of(model: Any) -> Anatomy:
    return anatomy(model).vision


def seen_by(*seeds: int) -> dict[str, Tensor]:
    """Two pictures, of 16 and of 24 patches, each with a few words behind it; four patches are a token."""
    ids = torch.tensor([[IMAGE] * 4 + [7] + [IMAGE] * 6 + [3, 1, 4]])
    generators = (torch.Generator().manual_seed(seed) for seed in (seeds or (0, 1)))
    patches = [torch.randn(count, 96, generator=one) for count, one in zip((16, 24), generators, strict=True)]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]]),
    }


def run(model: Any, *seeds: int) -> Tensor:
    with torch.no_grad():
        return model(**seen_by(*seeds)).logits


def without_head_by_hand(model: Any, layer: int, head: int) -> Tensor:
    def zeroed(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].unflatten(-1, (4, -1)).clone()
        heads[:, head] = 0
        return (heads.flatten(-2),)

    handle = model.model.visual.blocks[layer].attn.proj.register_forward_pre_hook(zeroed)
    found = run(model)
    handle.remove()
    return found


@each_attention
@each_packed
def test_the_parts_of_several_pictures_are_what_their_names_say(name: str, attention: str) -> None:
    model = model_of(name, attention)
    vision = vision_of(model)
    stream = [vision[part] for part in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    with capture(model, *stream, *(vision[part] for part in HEADED)) as acts:
        run(model)
    before, attn, mid, mlp, after = map(acts.stack, stream)
    assert before.shape == (3, 1, 40, 32)
    assert torch.allclose(before + attn, mid, atol=1e-5) and torch.allclose(mid + mlp, after, atol=1e-5)
    assert {acts[vision[part][2]].shape for part in HEADED} == {(1, 40, 4, 8)}
    assert torch.allclose(head_results_of(model, vision, acts), acts[vision.attn_out[1]], atol=1e-5)


def head_results_of(model: Any, vision: Anatomy, acts: Any) -> Tensor:
    projected: Callable[[Tensor], Tensor] = vision.module("attn_proj", 1)
    return projected(acts[vision.z[1]].flatten(2))


@each_attention
@each_packed
def test_attention_is_computed_for_one_picture_after_the_other(name: str, attention: str) -> None:
    model = model_of(name, attention)
    vision = vision_of(model)
    with capture(model, vision.pattern[1], keep="all") as each, capture(model, vision.v[1], vision.z[1]) as acts:
        run(model)
    patterns = each.calls(vision.pattern[1])
    assert [one.shape for one in patterns] == [(1, 4, 16, 16), (1, 4, 24, 24)]
    values = acts[vision.v[1]].split([16, 24], 1)
    made = [torch.einsum("bhqk,bkhd->bqhd", *pair) for pair in zip(patterns, values, strict=True)]
    assert torch.allclose(torch.cat(made, 1), acts[vision.z[1]], atol=1e-5)


@each_attention
@each_packed
def test_a_head_ablated_is_its_slice_zeroed_by_hand(name: str, attention: str) -> None:
    model = model_of(name, attention)
    with ablate(model, vision_of(model).z[1].head(2)):
        without = run(model)
    assert torch.equal(without, without_head_by_hand(model, 1, 2))
    assert not torch.allclose(without, run(model), atol=1e-5)


@each_packed
def test_each_head_in_a_sweep_is_the_loop(name: str) -> None:
    model = model_of(name)
    vision = vision_of(model)
    effects = sweep(model, vision.z.each_head, 0.0, lambda output: output.logits[:, -1, 5], **seen_by())
    loop = [without_head_by_hand(model, layer, head)[0, -1, 5] for layer in range(3) for head in range(4)]
    expected = torch.stack(loop).reshape(3, 4) - run(model)[0, -1, 5]
    assert torch.allclose(effects.values.reshape(3, 4), expected, atol=1e-5)


@each_packed
def test_a_stream_patched_from_other_pictures_is_as_if_these_were_read(name: str) -> None:
    model = model_of(name)
    first = vision_of(model).resid_pre[0]
    with capture(model, first) as acts:
        expected = run(model, 5, 6)
    with patch(model, {first: acts[first]}):
        patched = run(model)
    assert torch.allclose(patched, expected, atol=1e-5)
    with patch(model, {first[:, :16]: acts[first][:, :16]}):  # one picture alone
        patched = run(model)
    assert torch.allclose(patched, run(model, 5, 1), atol=1e-5)


@each_packed
def test_gradients_and_edits_have_the_row(name: str) -> None:
    model = model_of(name)
    vision = vision_of(model)
    paths = [vision.resid_post[1], vision.attn_out[2], vision.q[1]]
    _, gradients = grad_at(model, paths, lambda output: output.logits[0, -1, 5])(**seen_by())
    assert [one.shape for one in gradients.values()] == [(1, 40, 4, 8), (1, 40, 32), (1, 40, 32)]
    step = 1e-2 * torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(3))
    with edit(model, vision.resid_post[1], lambda value: value + step):
        up = run(model)[0, -1, 5]
    with edit(model, vision.resid_post[1], lambda value: value - step):
        down = run(model)[0, -1, 5]
    along = (gradients[vision.resid_post[1]] * step).sum()
    assert torch.allclose((up - down) / 2, along, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("name", [*PACKED, *OTHERS])
def test_every_part_of_such_a_tower_was_checked(name: str) -> None:
    for places in vision_of(model_of(name)).layout.layers:
        branch = "attn_out" if places.has("attn_out") else "mixer_out"
        heads = (*HEADED, "scores", "pattern") if branch == "attn_out" else ()
        for part in ("resid_pre", branch, "resid_mid", "mlp_out", "resid_post", "mlp_post", *heads):
            assert part in places.passed, part
            path = places.path(part, "sdpa")
            assert isinstance(path, str) and ("[None]" in path or part in ("scores", "pattern"))


def test_values_without_a_batch_inside_of_a_stream_with_one_are_refused() -> None:
    vision = vision_of(model_of("MiniMaxM3Sparse"))
    for part in HEADED:
        with pytest.raises(UnsupportedModule, match=rf"has no {part}: .* expected \[batch, pos, 4, d_head\]; came"):
            _ = vision[part]
    with pytest.raises(UnsupportedModule, match=r"has no attn_out: .* it is no \(1, 24, 32\), which the stream is"):
        _ = vision.attn_out


def test_examples_without_positions_are_no_patches() -> None:
    with pytest.raises(UnsupportedModule, match="showed no layers in it"):
        anatomy(Mlp(), inputs=torch.randn(5, 4))
