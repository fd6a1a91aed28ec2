"""Generation with a key and value cache: contexts around `generate` do what hand-written hooks and loops do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from by_hooks import outputs_by_hooks, put, same, state_of
from gallery.architectures import ARCHITECTURES, tokens
from generating import NEW, PROMPTS, VECTOR, WAYS, generate, left_padded, stepwise_hook
from torch import Tensor

from nicehooks import SiteNotReached, ablate, capture, edit, patch, steer, suspend

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
