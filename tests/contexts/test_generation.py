"""Generation with a key and value cache: contexts around `generate` do what hand-written hooks and loops do."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from by_hooks import one_thread, outputs_by_hooks, put, same, state_of
from gallery.architectures import ARCHITECTURES, gpt2, llama, tokens
from gallery.trained import smollm2
from torch import Tensor, nn

from nicehooks import NotCalledWarning, SiteNotReached, ablate, capture, edit, patch, steer, suspend

NEW = 6
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(11))
threads = pytest.fixture(autouse=True, scope="module")(one_thread)

# --- ways to generate -------------------------------------------------------------------------------------------------


def left_padded() -> dict[str, Tensor]:
    """Prompts of 7, 4 and 2 tokens."""
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 5 + [1] * 2])
    return {"input_ids": tokens(3) * mask, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 0},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}
PROMPTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one": lambda: {"input_ids": tokens(1, batch=1), "attention_mask": torch.ones(1, 7, dtype=torch.long)},
    "left-padded": left_padded,
}


@pytest.fixture(params=["gpt2", "llama"])
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Any:
    torch.manual_seed(0)
    return {"gpt2": gpt2, "llama": llama}[name]().eval()


@pytest.fixture
def blocks(name: str) -> tuple[str, ...]:
    return ARCHITECTURES[name].blocks


@pytest.fixture(params=WAYS)
def way(request: Any) -> dict[str, Any]:
    return WAYS[request.param]


@pytest.fixture(params=PROMPTS)
def prompt(request: Any) -> dict[str, Tensor]:
    return PROMPTS[request.param]()


def generate(model: Any, prompt: dict[str, Tensor], **how: Any) -> Tensor:
    """The prompt and `NEW` tokens after it, with the random numbers of one seed."""
    torch.manual_seed(7)
    return model.generate(**prompt, **{"max_new_tokens": NEW, "min_new_tokens": NEW, **how})


@contextmanager
def stepwise_hook(model: nn.Module, name: str, fn: Callable[[Any, int], Any]) -> Generator[None]:
    """By hand: `fn(value, step)` changes what the module `name` returns; steps are counted at the root."""
    step = -1

    def count(module: nn.Module, args: Any) -> None:
        nonlocal step
        step += 1

    handles = [
        model.register_forward_pre_hook(count),
        model.get_submodule(name).register_forward_hook(lambda module, args, output: fn(output, step)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- capture ----------------------------------------------------------------------------------------------------------


def test_capture_all_is_what_hooks_see(model, way, prompt):
    expected, outputs = outputs_by_hooks(model, lambda: generate(model, prompt, **way))
    with capture(model, "**", keep="all") as acts:
        output = generate(model, prompt, **way)
    assert torch.equal(output, expected)
    assert list(acts) == list(outputs)
    assert all(len(acts[name]) == NEW == len(values) for name, values in outputs.items())
    for name, values in outputs.items():
        assert same(list(acts[name]), values), name


def test_what_comes_by_in_each_step(model, blocks, way, prompt):
    with capture(model, blocks[1], keep="all") as acts:
        generate(model, prompt, **way)
    rows = len(prompt["input_ids"]) * way.get("num_beams", 1)
    lengths = [7 + step for step in range(NEW)] if way.get("use_cache") is False else [7] + [1] * (NEW - 1)
    assert [tuple(value.shape) for value in acts[blocks[1]]] == [(rows, length, 32) for length in lengths]


def test_the_last_and_the_first_step(model, blocks, way):
    prompt = left_padded()
    with capture(model, blocks[1], keep="all") as every:
        generate(model, prompt, **way)
    for keep, index in (("first", 0), ("last", -1)):
        with capture(model, blocks[1], keep=keep) as acts:
            generate(model, prompt, **way)
        assert same(acts[blocks[1]], every[blocks[1]][index])


def test_captured_steps_are_one_pass_over_the_whole_text(model, blocks):
    """With a cache each token is computed once; all of them together are what one pass over the text computes."""
    prompt = PROMPTS["one"]()
    with capture(model, *blocks, keep="all") as acts:
        text = generate(model, prompt, do_sample=False)
    with torch.no_grad(), capture(model, *blocks) as whole:
        model(text[:, :-1])  # nothing was computed on the last token
    for block in blocks:
        torch.testing.assert_close(torch.cat(acts[block], dim=1), whole[block], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(acts.calls(f"{block}[:, -1]")[-1], whole[f"{block}[:, -1]"], rtol=1e-4, atol=1e-4)


def test_captured_values_are_the_hidden_states_of_generate(model, blocks):
    """`generate` can return hidden states and attentions itself; they are the very tensors."""
    shown = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    attentions = [f"{block}.{'attn' if 'transformer' in block else 'self_attn'}" for block in blocks]
    with capture(model, *blocks, *attentions, keep="all") as acts:
        output = generate(model, left_padded(), do_sample=False, **shown)
    assert len(output.hidden_states) == len(output.attentions) == NEW
    for step in range(NEW):
        for layer, block in enumerate(blocks[:-1]):  # the last one is shown after the last norm
            assert acts[block][step] is output.hidden_states[step][layer + 1]
        for layer, attention in enumerate(attentions):
            assert acts[attention][step][1] is output.attentions[step][layer]


def test_a_map_reduces_every_step(model, blocks):
    with capture(model, blocks[0], keep="all", map=lambda value: value[:, -1].norm(dim=-1)) as norms:
        generate(model, left_padded(), do_sample=False)
    with capture(model, f"{blocks[0]}[:, -1]", keep="all") as last:
        generate(model, left_padded(), do_sample=False)
    assert same(list(norms[blocks[0]]), [value.norm(dim=-1) for value in last[f"{blocks[0]}[:, -1]"]])
    assert len(norms[blocks[0]]) == NEW


def test_captured_arguments_of_every_step(model, name, blocks):
    """Keys and values are read as the arguments that they are; the mask grows by one token per step."""
    with capture(model, "@input['input_ids']", "@input['attention_mask']", keep="all") as acts:
        text = generate(model, left_padded(), do_sample=False)
    assert same(acts["@input['input_ids']"][0], left_padded()["input_ids"])
    for step in range(1, NEW):
        assert torch.equal(acts["@input['input_ids']"][step][:, 0], text[:, 6 + step])
        assert acts["@input['attention_mask']"][step].shape == (3, 7 + step)


def test_a_context_around_generate_leaves_no_trace(model, blocks, way):
    expected = generate(model, left_padded(), **way)
    before = state_of(model)
    for context in (
        capture(model, "**", keep="all"),
        edit(model, "**", lambda value: None),
        steer(model, blocks[0], torch.ones(32), steps=slice(1, None)),
        ablate(model, "**@weight"),
    ):
        with context:
            generate(model, left_padded(), **way)
        assert state_of(model) == before, context
    assert torch.equal(generate(model, left_padded(), **way), expected)


@pytest.mark.parametrize("where", ["**", "**@input", "**#*"])
def test_edits_that_change_nothing(model, way, prompt, where):
    expected = generate(model, prompt, **way)
    with edit(model, where, lambda value: value):
        assert torch.equal(generate(model, prompt, **way), expected)


def test_generation_that_is_interrupted_leaves_no_trace(model, blocks, way):
    expected = generate(model, left_padded(), **way)
    before = state_of(model)

    def interrupt(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if ids.shape[1] == 7 + 3:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    later = steer(
        model, blocks[0], VECTOR, steps=50
    )  # never reached, but no error of ours takes the place of the other
    with pytest.raises(KeyboardInterrupt), later, ablate(model, "**@weight", steps=slice(1, None)):
        generate(model, left_padded(), **way, stopping_criteria=[interrupt])
    assert state_of(model) == before
    assert torch.equal(generate(model, left_padded(), **way), expected)


def test_generation_in_inference_mode(model, blocks, way):
    expected = generate(model, left_padded(), **way)
    with capture(model, *blocks, keep="all") as plain:
        generate(model, left_padded(), **way)
    with torch.inference_mode(), capture(model, *blocks, keep="all") as acts:
        assert torch.equal(generate(model, left_padded(), **way), expected)
    assert all(same(list(acts[block]), list(plain[block])) for block in blocks)
    with patch(model, f"{blocks[1]}[:, -1]", acts[blocks[1]][0][:, -1], steps=0):  # what it was already
        assert torch.equal(generate(model, left_padded(), **way), expected)


# --- changing values --------------------------------------------------------------------------------------------------


def test_steering_is_what_a_hook_does(model, blocks, way, prompt):
    with stepwise_hook(model, blocks[1], lambda value, step: value + 2.0 * VECTOR):
        expected = generate(model, prompt, **way)
    with steer(model, blocks[1], VECTOR, scale=2.0):
        output = generate(model, prompt, **way)
    assert torch.equal(output, expected)
    assert not torch.equal(output, generate(model, prompt, **way))


STEPS: dict[str, Any] = {
    "the prompt": (0, {0}),
    "one step": (3, {3}),
    "what is new": (slice(1, None), {1, 2, 3, 4, 5}),
    "every other": (slice(None, None, 2), {0, 2, 4}),
    "a list": ([1, 4], {1, 4}),
    "a range": (range(2, 4), {2, 3}),
    "a predicate": (lambda step: step % 3 == 2, {2, 5}),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("verb", ["steer", "patch", "edit", "ablate"])
@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["sampled"], WAYS["beams"]], ids=["greedy", "sampled", "beams"])
def test_steps_are_decode_steps(model, blocks, way, steps, verb):
    wanted, expected_steps = STEPS[steps]
    block, prompt = blocks[0], left_padded()
    last = (slice(None), -1)
    by_hand: dict[str, Callable[[Tensor], Tensor]] = {
        "steer": lambda value: value + VECTOR,
        "patch": lambda value: put(value, last, VECTOR),
        "edit": lambda value: put(value, last, -value[last]),
        "ablate": lambda value: put(value, last, 0.0),
    }
    contexts: dict[str, Callable[[], Any]] = {
        "steer": lambda: steer(model, block, VECTOR, steps=wanted),
        "patch": lambda: patch(model, f"{block}[:, -1]", VECTOR, steps=wanted),
        "edit": lambda: edit(model, f"{block}[:, -1]", torch.neg, steps=wanted),
        "ablate": lambda: ablate(model, f"{block}[:, -1]", steps=wanted),
    }
    changed: set[int] = set()

    def on_steps(value: Tensor, step: int) -> Tensor:
        if step not in expected_steps:
            return value
        changed.add(step)
        return by_hand[verb](value)

    with stepwise_hook(model, block, on_steps):
        expected, outputs = outputs_by_hooks(model, lambda: generate(model, prompt, **way))
    assert changed == expected_steps
    with contexts[verb](), capture(model, block, "['logits']", keep="all") as acts:
        output = generate(model, prompt, **way)
    assert torch.equal(output, expected)
    assert same(list(acts[block]), outputs[block])
    assert same(list(acts["['logits']"]), [value["logits"] for value in outputs[""]])


def test_another_value_at_each_step(model, blocks):
    values = torch.randn(NEW, 32, generator=torch.Generator().manual_seed(12))
    with stepwise_hook(model, blocks[2], lambda value, step: put(value, (slice(None), -1), values[step])):
        expected = generate(model, left_padded(), do_sample=False)
    with ExitStack() as stack:
        for step, value in enumerate(values):
            stack.enter_context(patch(model, f"{blocks[2]}[:, -1]", value, steps=step))
        output = generate(model, left_padded(), do_sample=False)
    assert torch.equal(output, expected)
    assert torch.equal(output[0, 7:], output[2, 7:])  # all prompts go on alike: the answer depends on this value alone


def test_one_text_is_written_on_top_of_another(model, blocks, way):
    """The last block of one generation in the place of another's: the second says what the first said."""
    here, there = {"input_ids": tokens(1)}, {"input_ids": tokens(2)}
    with capture(model, blocks[-1], keep="all") as acts:
        expected = generate(model, there, **way)
    with ExitStack() as stack:
        for step, value in enumerate(acts[blocks[-1]]):
            stack.enter_context(patch(model, blocks[-1], value, steps=step))
        output = generate(model, here, **way)
    assert torch.equal(output[:, 7:], expected[:, 7:])
    assert not torch.equal(generate(model, here, **way)[:, 7:], expected[:, 7:])


def test_a_head_is_ablated_in_every_step(model, name, way):
    path = ARCHITECTURES[name].heads
    owner = model.get_submodule(path.partition("@")[0])
    handle = owner.register_forward_pre_hook(lambda module, args: (put(args[0], (..., slice(8, 16)), 0.0), *args[1:]))
    expected = generate(model, left_padded(), **way)
    handle.remove()
    with ablate(model, f"{path}[:, :, 1]"):
        output = generate(model, left_padded(), **way)
    assert torch.equal(output, expected)
    assert not torch.equal(output, generate(model, left_padded(), **way))


def test_the_answer_itself_is_changed(model, way):
    """A token that is never said, through a field of the root's `ModelOutput`."""
    banned = int(generate(model, left_padded(), **way)[0, 7])
    with patch(model, f"['logits'][..., {banned}]", -torch.inf):
        output = generate(model, left_padded(), **way)
    assert not (output[:, 7:] == banned).any()
    bad = generate(model, left_padded(), bad_words_ids=[[banned]], **way)
    assert torch.equal(output, bad)


def test_a_parameter_is_patched_during_generation(model, name, way):
    embedding = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}[name]
    weight = model.get_submodule(embedding).weight
    value = weight.detach() * torch.linspace(-1, 1, 32)
    kept = weight.detach().clone()
    weight.data.copy_(value)
    expected = generate(model, left_padded(), **way)
    weight.data.copy_(kept)
    with patch(model, f"{embedding}@weight", value):
        output = generate(model, left_padded(), **way)
    assert torch.equal(output, expected)
    assert not torch.equal(output, generate(model, left_padded(), **way))


def test_every_call_of_a_step_is_a_site(model, blocks, way):
    """Calls are counted anew in each step: in this model there is but one per step."""
    with capture(model, f"{blocks[1]}#*", keep="all") as acts, capture(model, blocks[1], keep="all") as whole:
        generate(model, left_padded(), **way)
    assert list(acts) == [f"{blocks[1]}#0"]
    assert same(list(acts[f"{blocks[1]}#0"]), list(whole[blocks[1]]))
    with steer(model, blocks[1], VECTOR, calls=0, steps=[1, 2]):
        output = generate(model, left_padded(), **way)
    with steer(model, f"{blocks[1]}#0", VECTOR, steps=[1, 2]):
        assert torch.equal(generate(model, left_padded(), **way), output)
    assert not torch.equal(generate(model, left_padded(), **way), output)


def test_steps_go_on_in_the_next_generation(model, blocks):
    """Steps count the calls of the model since the context was entered; a new context starts at 0."""
    prompt = PROMPTS["one"]()
    seen: list[int] = []
    context = edit(model, blocks[0], lambda value: seen.append(value.shape[1]), steps=slice(NEW, NEW + 2))
    with context:
        generate(model, prompt, do_sample=False)
        assert not seen
        generate(model, prompt, do_sample=False)
    assert seen == [7, 1]
    with context:
        generate(model, prompt, do_sample=False)
        generate(model, prompt, do_sample=False, max_new_tokens=1, min_new_tokens=1)
    assert seen == [7, 1, 7]


def test_a_step_that_never_comes(model, blocks):
    with pytest.raises(SiteNotReached, match=r"the model ran, but not once with steps=50"):
        with patch(model, blocks[0], 0.0, steps=50):
            generate(model, PROMPTS["one"](), do_sample=False)


def test_steps_of_a_part_of_the_model(model, name, blocks):
    """The model that the context was given counts, though another one called it."""
    inner = model.get_submodule(name_of_inner := blocks[0].partition(".")[0])
    block = blocks[1].removeprefix(f"{name_of_inner}.")
    with stepwise_hook(model, blocks[1], lambda value, step: value + VECTOR * (step > 1)):
        expected = generate(model, left_padded(), do_sample=False)
    with steer(inner, block, VECTOR, steps=slice(2, None)):
        assert torch.equal(generate(model, left_padded(), do_sample=False), expected)


def test_an_attached_handle_acts_in_every_generation(model, blocks, way):
    clean = generate(model, left_padded(), **way)
    with stepwise_hook(model, blocks[1], lambda value, step: value + VECTOR):
        expected = generate(model, left_padded(), **way)
    handle = steer(model, blocks[1], VECTOR).attach()
    assert torch.equal(generate(model, left_padded(), **way), expected)
    with suspend(model):
        assert torch.equal(generate(model, left_padded(), **way), clean)
    assert torch.equal(generate(model, left_padded(), **way), expected)
    handle.remove()
    assert torch.equal(generate(model, left_padded(), **way), clean)


def test_padding_does_not_reach_a_steered_prompt(model, blocks):
    """A prompt alone and the same one left-padded in a batch go on alike, steered or not."""
    batch = left_padded()
    for scale in (0.0, 2.0):
        with steer(model, blocks[1], VECTOR, scale=scale):
            together = generate(model, batch, do_sample=False)
            for row in range(3):
                length = int(batch["attention_mask"][row].sum())
                ids = batch["input_ids"][row : row + 1, -length:]
                alone = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, do_sample=False)
                assert torch.equal(alone[0, length:], together[row, 7:])


def test_candidates_that_are_looked_up_in_the_prompt(model, blocks):
    """Several tokens are tried in one step; what comes out is what greedy generation says, under a context too."""
    prompt = {"input_ids": tokens(1, batch=1, length=4).repeat(1, 4), "attention_mask": torch.ones(1, 16, dtype=int)}
    with stepwise_hook(model, blocks[1], lambda value, step: value + 0.1 * VECTOR):
        expected, outputs = outputs_by_hooks(model, lambda: generate(model, prompt, prompt_lookup_num_tokens=3))
    with steer(model, blocks[1], VECTOR, scale=0.1), capture(model, *blocks, keep="all") as acts:
        output = generate(model, prompt, prompt_lookup_num_tokens=3)
    with steer(model, blocks[1], VECTOR, scale=0.1):
        assert torch.equal(generate(model, prompt, do_sample=False), expected)
    assert torch.equal(output, expected)
    assert all(same(list(acts[block]), outputs[block]) for block in blocks)


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
