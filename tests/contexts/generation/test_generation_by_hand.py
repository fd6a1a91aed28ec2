"""Generation beside loops written by hand: in threads, with an encoder, and in a trained model."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from by_hooks import outputs_by_hooks, same, state_of
from gallery.architectures import ARCHITECTURES
from gallery.trained import smollm2
from generating import NEW, PROMPTS, VECTOR, WAYS, generate, left_padded, stepwise_hook
from torch import Tensor

from nicehooks import NotCalledWarning, capture, patch, steer

# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_generate_under_contexts_of_their_own(model, blocks):
    scales = [0.0, 1.0, -1.0, 3.0]
    prompt = left_padded()
    expected: list[Tensor] = []
    for scale in scales:
        with stepwise_hook(model, blocks[1], lambda value, step, scale=scale: value + scale * VECTOR):
            expected.append(generate(model, prompt, do_sample=False))
    start = threading.Barrier(len(scales))

    def run(scale: float) -> tuple[Tensor, int]:
        start.wait()
        with steer(model, blocks[1], VECTOR, scale=scale), capture(model, blocks[1], keep="all") as acts:
            return generate(model, prompt, do_sample=False), len(acts[blocks[1]])

    before = state_of(model)
    with ThreadPoolExecutor(len(scales)) as pool:
        results = list(pool.map(run, scales))
    assert [torch.equal(text, by_hand) for (text, _), by_hand in zip(results, expected, strict=True)] == [True] * 4
    assert [steps for _, steps in results] == [NEW] * 4
    assert state_of(model) == before
    assert len({tuple(text.flatten().tolist()) for text in expected}) == 4  # four different texts


def test_threads_count_their_own_steps_under_one_handle(model, blocks):
    prompts = [left_padded(), PROMPTS["one"](), left_padded(), PROMPTS["one"]()]
    expected: list[Tensor] = []
    for prompt in prompts:
        with stepwise_hook(model, blocks[1], lambda value, step: value + VECTOR * (step in (2, 3))):
            expected.append(generate(model, prompt, do_sample=False))
    start = threading.Barrier(len(prompts))

    def run(prompt: dict[str, Tensor]) -> Tensor:
        start.wait()
        return generate(model, prompt, do_sample=False)

    handle = steer(model, blocks[1], VECTOR, steps=slice(2, 4)).attach()
    with ThreadPoolExecutor(len(prompts)) as pool:
        results = list(pool.map(run, prompts))
    handle.remove()
    assert same(results, expected)


def test_a_task_carries_its_context_into_the_thread_that_generates(model, blocks):
    prompt = PROMPTS["one"]()
    with stepwise_hook(model, blocks[1], lambda value, step: value + VECTOR * (step > 0)):
        expected = generate(model, prompt, do_sample=False)
    clean = generate(model, prompt, do_sample=False)

    async def steered() -> Tensor:
        with steer(model, blocks[1], VECTOR, steps=slice(1, None)):
            return await asyncio.to_thread(generate, model, prompt, do_sample=False)

    async def plain() -> Tensor:
        return await asyncio.to_thread(generate, model, prompt, do_sample=False)

    async def both() -> tuple[Tensor, ...]:
        return tuple(await asyncio.gather(steered(), plain(), steered()))

    assert same(asyncio.run(both()), (expected, clean, expected))


def test_a_bare_thread_that_generates_is_not_reached_and_it_is_said(model, blocks):
    """As one streams text: `Thread(target=model.generate)`, while the context is in the thread that reads."""
    prompt = PROMPTS["one"]()
    expected, texts = generate(model, prompt, do_sample=False), []

    def stream() -> None:
        thread = threading.Thread(target=lambda: texts.append(generate(model, prompt, do_sample=False)))
        thread.start()
        thread.join()

    with pytest.warns(NotCalledWarning, match="another thread or task"), steer(model, blocks[1], VECTOR):
        stream()
    assert torch.equal(texts[0], expected)


# --- loops written by hand --------------------------------------------------------------------------------------------


def cache_of(model: Any) -> str:
    """What this release of transformers calls the cache, as an argument and in the output."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def decode_by_hand(
    model: Any, prompt: dict[str, Tensor], choose: Callable[[Tensor], Tensor], cached: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Decoding as one writes it in a loop of one's own: the text, and the logits of each step."""
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    cache, logits = None, []
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": cached}
        if cache is not None:
            given |= {"input_ids": ids[:, -1:], "position_ids": positions[:, -1:], cache_of(model): cache}
        output = model(**given)
        cache = output[cache_of(model)] if cached else None
        logits.append(output.logits[:, -1])
        ids = torch.cat([ids, choose(logits[-1])[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids, logits


def greedily(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def by_lot(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), num_samples=1)[:, 0]


@pytest.mark.parametrize(
    ("choose", "way"),
    [(greedily, {"do_sample": False}), (by_lot, {"do_sample": True, "top_k": 0})],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_generate_in_a_context_is_a_loop_by_hand(model, blocks, prompt, choose, way, cached):
    """Neither side needs the other's machinery: a hook and a loop here, a context and `generate` there."""

    def by_hand(value: Tensor, step: int) -> Tensor:
        return value + VECTOR if step in (0, 2, 3) else value

    torch.manual_seed(7)
    with stepwise_hook(model, blocks[1], by_hand):
        expected, logits = decode_by_hand(model, prompt, choose, cached)
    with steer(model, blocks[1], VECTOR, steps=[0, 2, 3]), capture(model, "['logits'][:, -1]", keep="all") as acts:
        output = generate(model, prompt, use_cache=cached, **way)
    assert torch.equal(output, expected)
    torch.testing.assert_close(list(acts["['logits'][:, -1]"]), logits)


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_a_loop_by_hand_in_a_context(model, blocks, prompt, cached):
    """One context around the loop is one context per turn of it, each with a hook's work."""
    with steer(model, blocks[1], VECTOR, steps=slice(1, 3)), capture(model, *blocks, keep="all") as acts:
        text, logits = decode_by_hand(model, prompt, greedily, cached)
    with stepwise_hook(model, blocks[1], lambda value, step: value + VECTOR if step in (1, 2) else value):
        (expected, expected_logits), outputs = outputs_by_hooks(
            model, partial(decode_by_hand, model, prompt, greedily, cached)
        )
    assert torch.equal(text, expected)
    assert same(logits, expected_logits)
    assert all(same(list(acts[block]), outputs[block]) for block in blocks)


@torch.no_grad()
def test_a_cache_that_was_made_under_a_patch_is_used_after_it(model, blocks):
    """Patch while the prompt is read, then go on without: what the keys and values hold is still there."""
    prompt = left_padded()
    with stepwise_hook(model, blocks[0], lambda value, step: value + VECTOR if step == 0 else value):
        expected, _ = decode_by_hand(model, prompt, greedily)
    positions = (prompt["attention_mask"].cumsum(-1) - 1).masked_fill(prompt["attention_mask"] == 0, 0)
    with steer(model, blocks[0], VECTOR):
        first = model(**prompt, position_ids=positions, use_cache=True)
    ids = torch.cat([prompt["input_ids"], first.logits[:, -1:].argmax(-1)], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{cache_of(model): first[cache_of(model)]},
        max_new_tokens=NEW - 1,
        min_new_tokens=NEW - 1,
        do_sample=False,
    )
    assert torch.equal(output, expected)


# --- an encoder and a decoder -----------------------------------------------------------------------------------------


@pytest.fixture
def translator() -> Any:
    return ARCHITECTURES["t5"].build(seed=3)


ENCODER, DECODER = "encoder.block.0[0]", "decoder.block.1[0]"


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["sampled"], WAYS["beams"]], ids=["greedy", "sampled", "beams"])
def test_an_encoder_runs_once_and_its_decoder_in_every_step(translator, way):
    prompt = left_padded()
    expected, outputs = outputs_by_hooks(translator, lambda: generate(translator, prompt, **way))
    with capture(translator, ENCODER, DECODER, "**", keep="all") as acts:
        output = generate(translator, prompt, **way)
    assert torch.equal(output, expected)
    assert len(acts[ENCODER]) == 1
    assert len(acts[DECODER]) == NEW
    different = [name for name, values in outputs.items() if not same(list(acts[name]), values)]
    # beam search then repeats the rows in the very object that a hook has kept; the cache has what the encoder returned
    assert different == (["encoder"] if "num_beams" in way else [])
    assert acts["encoder"][0]["last_hidden_state"].shape[0] == len(prompt["input_ids"])


@pytest.mark.parametrize("steps", [None, 0, slice(None, 1)])
def test_an_encoder_that_generate_calls_by_itself_is_in_step_0(translator, steps):
    """`generate` calls the encoder outside of the model's own forward, before the first step."""
    prompt, vector = left_padded(), 20 * VECTOR
    handle = translator.encoder.block[0].register_forward_hook(lambda m, args, value: (value[0] + vector, *value[1:]))
    expected = generate(translator, prompt, do_sample=False)
    handle.remove()
    with steer(translator, ENCODER, vector, steps=steps):
        output = generate(translator, prompt, do_sample=False)
    assert torch.equal(output, expected)
    assert not torch.equal(output, generate(translator, prompt, do_sample=False))


@pytest.mark.parametrize(
    "path",
    [
        "encoder.block.0.layer.0.SelfAttention.q@weight",
        "decoder.block.1.layer.2.DenseReluDense.wi@weight",
        "shared@weight",
    ],
)
def test_a_parameter_of_both_halves_is_patched(translator, path):
    owner = translator.get_submodule(path.removesuffix("@weight"))
    kept, value = owner.weight.detach().clone(), owner.weight.detach().roll(3, dims=0) * 4
    clean = generate(translator, left_padded(), do_sample=False)
    owner.weight.data.copy_(value)
    expected = generate(translator, left_padded(), do_sample=False)
    owner.weight.data.copy_(kept)
    with patch(translator, path, value):
        assert torch.equal(generate(translator, left_padded(), do_sample=False), expected)
    assert torch.equal(generate(translator, left_padded(), do_sample=False), clean)
    assert not torch.equal(expected, clean)


def test_a_decoder_is_steered_from_a_step_on(translator):
    prompt, vector = left_padded(), 20 * VECTOR

    def by_hand(value: Any, step: int) -> Any:
        return (value[0] + vector * (step >= 2), *value[1:])

    with stepwise_hook(translator, "decoder.block.1", by_hand):
        expected = generate(translator, prompt, do_sample=False)
    with steer(translator, DECODER, vector, steps=slice(2, None)):
        output = generate(translator, prompt, do_sample=False)
    assert torch.equal(output, expected)
    clean = generate(translator, prompt, do_sample=False)
    assert torch.equal(output[:, :3], clean[:, :3])
    assert not torch.equal(output, clean)


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------

# "When Mary and John went to the store, John gave a drink to" and "The weather in Paris today is", left-padded with 2
PROMPT = torch.tensor(
    [
        [2427, 5099, 284, 2322, 3514, 288, 260, 4249, 28, 2322, 4502, 253, 5968, 288],
        [2, 2, 2, 2, 2, 2, 2, 2, 504, 3947, 281, 7042, 1834, 314],
    ]
)
SMOL_PROMPTS = {
    "one": {"input_ids": PROMPT[:1], "attention_mask": torch.ones(1, 14, dtype=torch.long)},
    "left-padded": {"input_ids": PROMPT, "attention_mask": (PROMPT != 2).long()},
}
SMOL_WAYS = {way: WAYS[way] for way in ("greedy", "sampled", "beams")}


@pytest.fixture
def smol() -> Any:
    model = smollm2()
    before = state_of(model)
    yield model
    assert state_of(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("way", SMOL_WAYS)
@pytest.mark.parametrize("prompt", SMOL_PROMPTS)
def test_smollm2_captured_and_steered(smol, way, prompt):
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    given, how = SMOL_PROMPTS[prompt], {**SMOL_WAYS[way], "pad_token_id": 2}
    layer = "model.layers.15"
    with stepwise_hook(smol, layer, lambda value, step: value + vector if step > 0 else value):
        expected, outputs = outputs_by_hooks(smol, lambda: generate(smol, given, **how))
    with (
        steer(smol, layer, vector, steps=slice(1, None)),
        capture(smol, "model.layers.*", "['logits']", keep="all") as acts,
    ):
        output = generate(smol, given, **how)
    assert torch.equal(output, expected)
    for i in range(30):
        assert same(list(acts[f"model.layers.{i}"]), outputs[f"model.layers.{i}"])
    assert same(list(acts["['logits']"]), [value["logits"] for value in outputs[""]])
    assert len(acts[layer]) == NEW


@pytest.mark.slow
def test_smollm2_writes_what_is_patched_into_it(smol):
    """The greedy answer is " Mary"; with the last position of another run it is that run's " John"."""
    with torch.no_grad(), capture(smol, "model.layers.28[:, -1]") as acts:
        smol(torch.tensor([[2427, 2322, 284, 5099, 3514, 288, 260, 4249, 28, 5099, 4502, 253, 5968, 288]]))
    given = SMOL_PROMPTS["one"]
    with patch(smol, acts, steps=0):
        patched = generate(smol, given, do_sample=False, pad_token_id=2)
    clean = generate(smol, given, do_sample=False, pad_token_id=2)
    assert clean[0, 14] == 5099
    assert patched[0, 14] == 2322
