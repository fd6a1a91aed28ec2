"""Requests served together are what each is alone in a `with` block."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nicehooks import (
    ContextMisuse,
    SiteNotFound,
    SiteNotReached,
    TreeMismatch,
    UnsupportedModule,
    ablate,
    capture,
    edit,
    patch,
    serving,
    steer,
    suspend,
)
from nicehooks.servers import batches

SMALL: dict[str, Any] = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 48}


def a_llama(attention: str = "sdpa") -> LlamaForCausalLM:
    """In double precision: how the rows of a product are blocked then decides no token."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=60, initializer_range=0.3, attn_implementation=attention, **sizes, **heads)
    model = LlamaForCausalLM(config).eval().double()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return a_llama()


def alone(model: Any, ids: list[int], under: list[Any], new: int) -> tuple[list[int], list[Any]]:
    """Tokens and caches of one request in `with` blocks."""
    with contextlib.ExitStack() as stack:
        entered = [stack.enter_context(context) for context in under]
        prompt = torch.tensor([ids])
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **options)
    return output[0, len(ids) :].tolist(), [cache for cache in entered if isinstance(cache, dict)]


def assert_as_alone(model: Any, served: Any, ids: list[int], under: list[Any], new: int) -> None:
    tokens, caches = alone(model, ids, under, new)
    assert served.tokens == tokens
    assert len(served.caches) == len(caches)
    for got, expected in zip(served.caches, caches, strict=True):
        assert list(got) == list(expected)
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-5)


def some_contexts(model: Any, seed: int) -> list[Any]:
    """Contexts of many kinds, each time with other values."""
    noise = torch.Generator().manual_seed(seed)
    vector = torch.randn(32, generator=noise)
    kinds: list[list[Any]] = [
        [],
        [steer(model, "model.layers.1", vector)],
        [capture(model, "model.layers.2[:, -1]", "model.layers.0", keep="all")],
        [steer(model, "model.layers.0[:, -1]", vector, steps=slice(1, None)), capture(model, "lm_head", "model.norm")],
        [capture(model, "model.layers.1"), steer(model, "model.layers.1", vector), capture(model, "model.layers.1")],
        [edit(model, "model.layers.1.mlp", lambda value: value - value.mean(1, keepdim=True))],
        [steer(model, "model.layers.1@input[0]", vector), capture(model, "model.layers.1.mlp@input[0]", keep="all")],
        [patch(model, {"model.layers.1[:, 0]": vector, "model.layers.1[:, 1]": -vector}, steps=0)],
        [
            ablate(model, "model.layers.1.self_attn[0]/4[:, :, 2]", steps=[0, 2]),
            capture(model, "['logits']", keep="first"),
        ],
    ]
    return kinds[seed % len(kinds)]


def test_it_serves_what_each_request_is_alone(model):
    prompts = [[(seed * 7 + at) % 60 for at in range(3 + seed * 2)] for seed in range(9)]
    with serving(model, **SMALL) as server:
        handles = [
            server.submit(ids, under=some_contexts(model, seed), max_new_tokens=5) for seed, ids in enumerate(prompts)
        ]
        served = [handle.result(60) for handle in handles]
    for seed, ids in enumerate(prompts):
        assert_as_alone(model, served[seed], ids, some_contexts(model, seed), 5)
    assert all(["forward" not in vars(module) for module in model.modules()])


@pytest.mark.slow
@pytest.mark.parametrize("room", [12, 20, 64])  # in little memory, requests are put off and run again
def test_random_arrivals_lengths_and_cancellations(model, room):
    chance = random.Random(room)
    asked: list[Any] = []
    with serving(model, page_size=8, num_blocks=room, max_batch_tokens=40) as server:
        for number in range(24):
            ids = [chance.randrange(60) for _ in range(chance.randrange(2, 36))]
            kind, new = chance.randrange(900), chance.randrange(3, 14)
            handle = server.submit(torch.tensor([ids]), under=some_contexts(model, kind), max_new_tokens=new)
            asked.append((handle, ids, kind, new))
            if chance.random() < 0.25:
                asked[chance.randrange(number + 1)][0].cancel()
            time.sleep(chance.choice([0, 0, 0.01, 0.05]))
    finished = [each for each in asked if not each[0]._request.future.cancelled()]
    assert len(finished) > 8
    for handle, ids, kind, new in finished:
        assert_as_alone(model, handle.result(0), ids, some_contexts(model, kind), new)


def test_rows_that_come_again_are_captured_once(model):
    """In memory for so few tokens the engine drops requests, and runs them again behind their prompt."""
    reruns: list[int] = []

    def under(number: int) -> list[Any]:
        vector = torch.full((32,), float(number))
        at_head = steer(model, "lm_head", torch.arange(60) * 0.1)  # which has no row for what comes again
        steered = steer(model, "model.layers.1", vector, steps=[0, 3])
        return [steered, at_head, capture(model, "model.layers.2", keep="all")]

    with serving(model, page_size=8, num_blocks=8, max_batch_tokens=40) as server:
        process = server._engine.processor.scheduler  # type: ignore[union-attr]
        add = process.add_waiting_request

        def counted(state: Any) -> None:
            reruns.append(state._true_initial_tokens)
            add(state)

        process.add_waiting_request = counted
        handles = [server.submit([number] * 6, under=under(number), max_new_tokens=24) for number in range(4)]
        served = [handle.result(60) for handle in handles]
    assert any(reruns), "the engine was to drop some request"
    for number in range(4):
        assert_as_alone(model, served[number], [number] * 6, under(number), 24)


def test_a_prefix_is_shared_by_nobody_under_a_context(model):
    prompt, vector = [5] * 33, torch.ones(32) * 4
    with serving(model, **SMALL) as server:
        cache = server._engine.cache  # type: ignore[union-attr]
        steered = server.submit(prompt, under=[steer(model, "model.layers.0", vector)], max_new_tokens=4).result(60)
        bare = server.submit(prompt, max_new_tokens=4).result(60)
        assert cache.search_prefix_match("shared-x", prompt) >= 8  # that of the bare one is kept for its like
        cache.free_blocks("shared-x")
        seen = server.submit(prompt, under=[capture(model, "model.layers.0", keep="first")], max_new_tokens=1)
        assert seen.result(60).activations["model.layers.0"].shape == (1, 33, 32)
    assert_as_alone(model, steered, prompt, [steer(model, "model.layers.0", vector)], 4)
    assert_as_alone(model, bare, prompt, [], 4)


def test_an_error_fails_its_own_request_alone(model):
    def fails_late(value: torch.Tensor) -> None:
        if value.shape[1] == 1:
            raise ZeroDivisionError("of mine")

    with serving(model, **SMALL) as server:
        bad = server.submit([1, 2, 3], under=[edit(model, "model.layers.1", fails_late)], max_new_tokens=5)
        good = server.submit([1, 2, 3], under=some_contexts(model, 1), max_new_tokens=5)
        with pytest.raises(ZeroDivisionError, match="of mine"):
            bad.result(60)
        leaves = edit(model, "model.layers.1", lambda value: sys.exit("of it"))
        ends = server.submit([1], under=[leaves], max_new_tokens=1)
        with pytest.raises(SystemExit, match="of it"):
            ends.result(60)
        out_of_range = server.submit([1, 2], under=[capture(model, "model.layers.1[:, 1]")], max_new_tokens=3)
        with pytest.raises(TreeMismatch, match=r"\[:, 1\] is out of range"):
            out_of_range.result(60)
        late = server.submit([1, 2], under=[ablate(model, "model.layers.1", steps=7)], max_new_tokens=2)
        with pytest.raises(SiteNotReached):
            late.result(60)
        shared = server.submit(
            [1, 2, 3], under=[capture(model, "model.layers.0@input['attention_mask']")], max_new_tokens=1
        )
        with pytest.raises(UnsupportedModule, match="no rows of their own there"):
            shared.result(60)
        assert_as_alone(model, good.result(60), [1, 2, 3], some_contexts(model, 1), 5)


REFUSED = [
    (lambda model: capture(model, "model.layers.0@grad"), "computes no gradients"),
    (lambda model: capture(model, "model.layers.0@input.grad[0]"), "computes no gradients"),
    (lambda model: patch(model, "lm_head@weight", 0.0), "it belongs to all requests in a batch"),
    (lambda model: capture(model, "model.layers.0", stop=True), "stop=True, which would end the forward of all"),
    (suspend, "it is about the model as a whole"),
]


def test_what_is_not_of_one_request_is_refused_by_name(model):
    with serving(model, **SMALL) as server:
        for make, message in REFUSED:
            with pytest.raises(UnsupportedModule, match=message):
                server.submit([1, 2], under=[make(model)], max_new_tokens=1)
        with pytest.raises(SiteNotFound):
            server.submit([1, 2], under=[capture(model, "nowhere")], max_new_tokens=1)
        with pytest.raises(ContextMisuse, match="another model"):
            server.submit([1, 2], under=[capture(a_llama(), "model.layers.0")], max_new_tokens=1)
        with pytest.raises(TypeError, match="takes contexts"):
            server.submit([1, 2], under=[lambda value: value], max_new_tokens=1)
        with pytest.raises(ContextMisuse, match="max_batch_tokens=49"):
            server.submit([1] * 49, under=[edit(model, "model.layers.0", lambda value: value)], max_new_tokens=1)
        with pytest.raises(ContextMisuse, match="do not fit into the engine's memory"):
            server.submit([1, 2], max_new_tokens=1000)
        for tokens in ([1, 60], [-1]):
            with pytest.raises(ValueError, match="tokens from 0 to 59"):
                server.submit(tokens, max_new_tokens=1)
        with pytest.raises(TypeError, match="how many tokens"):
            server.submit([1, 2])
    with pytest.raises(ContextMisuse, match="inside of its `with` block"):
        server.submit([1, 2], max_new_tokens=1)
    with pytest.raises(UnsupportedModule, match="Linear is no generating model"):
        serving(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="takes no use_cuda_graph"):
        serving(model, use_cuda_graph=True)


def test_options_that_nothing_has_are_refused_before_anything_runs(model):
    for settings, message in [
        ({"max_new_tokens": 5}, r"serving\(model, generation=\{'max_new_tokens': …\}\)"),
        ({"max_batch_token": 5}, "neither ContinuousBatchingConfig nor GenerationConfig has a max_batch_token"),
        ({"generation": {"max_new_token": 5}}, "a GenerationConfig has no max_new_token"),
    ]:
        with pytest.raises(TypeError, match=message):
            serving(model, **settings)
    for option in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(UnsupportedModule, match="one result for each request"), serving(model, generation=option):
            pytest.fail("entered")
    sampled = {"do_sample": True, "temperature": 0.7}
    with serving(model, generation=sampled, **SMALL) as server:
        for options, message in [
            ({"max_new_token": 5}, "submit.ids. takes no max_new_token=; it takes: max_new_tokens, eos_token_id"),
            ({"temperature": 2.0}, "one for all requests(.|\n)*per_request_processors=True"),
        ]:
            with pytest.raises(TypeError, match=message):
                server.submit([1, 2], **{"max_new_tokens": 1, **options})
    with serving(model, generation=sampled, per_request_processors=True, **SMALL) as server:
        with pytest.raises(TypeError, match=r"submit\(temperature='hot'\): it is a float"):
            server.submit([1, 2], max_new_tokens=1, temperature="hot")
        assert len(server.submit([1, 2], max_new_tokens=3, temperature=2.0).result(timeout=60).tokens) == 3


def test_handles_can_be_awaited_and_cancelled(model):
    async def both(server: Any) -> Any:
        contexts = some_contexts(model, 2)
        tasks = [asyncio.ensure_future(_await(server.submit([4, n], under=contexts, max_new_tokens=3))) for n in (1, 2)]
        dropped = asyncio.ensure_future(_await(server.submit([4], under=contexts, max_new_tokens=100)))
        await asyncio.sleep(0)
        dropped.cancel()
        served = await asyncio.gather(*tasks)
        with pytest.raises(asyncio.CancelledError):
            await dropped
        return served

    with serving(model, **SMALL) as server:
        served = asyncio.run(both(server))
        assert not server._requests
    for number, each in zip((1, 2), served, strict=True):
        assert_as_alone(model, each, [4, number], some_contexts(model, 2), 3)


async def _await(handle: Any) -> Any:
    return await handle


def test_calls_of_others_in_the_midst_of_a_forward_are_left_alone(model):
    clean = model.model.embed_tokens(torch.tensor([[1, 2, 3]]))
    begun, go_on = threading.Event(), threading.Event()

    def waits(value: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert go_on.wait(60)
        return value + 1

    with serving(model, **SMALL) as server:
        under = [edit(model, "model.embed_tokens", lambda value: value + 1), edit(model, "model.layers.1", waits)]
        handle = server.submit([1, 2, 3], under=under, max_new_tokens=1)
        assert begun.wait(60)
        with capture(model, "model.embed_tokens") as acts:
            model.model.embed_tokens(torch.tensor([[1, 2, 3]]))  # a call of the model itself would wait
        go_on.set()
        handle.result(60)
    assert torch.equal(acts["model.embed_tokens"], clean)


def test_forwards_at_the_same_time_do_not_disturb_each_other(model):
    """Two servers of one model, and calls of it in two more threads."""
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    expected, wrong = model(prompt).logits, []
    done = threading.Event()

    def calls(module: Any, output: torch.Tensor) -> None:
        while not done.is_set():
            wrong.extend([True] * (not torch.allclose(module(prompt)[0], output)))

    threads = [
        threading.Thread(target=calls, args=(model, expected)),
        threading.Thread(target=calls, args=(model.model, model.model(prompt)[0])),
    ]
    with serving(model, **SMALL) as one, serving(model, **SMALL) as other:
        for thread in threads:
            thread.start()
        handles = [
            [server.submit([seed] * 9, under=some_contexts(model, seed), max_new_tokens=9) for seed in range(9)]
            for server in (one, other)
        ]
        served = [[handle.result(60) for handle in of_one] for of_one in handles]
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not hasattr(model.config, "is_causal")
    for of_one in served:
        for seed, each in enumerate(of_one):
            assert_as_alone(model, each, [seed] * 9, some_contexts(model, seed), 9)


def test_many_are_steered_in_one_sum(model, monkeypatch):
    """Those at one place together; what does not fit is said to the one whose it is."""
    together: list[int] = []
    summed = batches.all_shifted

    def counted(value: Any, shifts: list[Any], sizes: Any) -> Any:
        found = summed(value, shifts, sizes)
        together.append(0 if found is None else len(shifts))
        return found

    monkeypatch.setattr(batches, "all_shifted", counted)
    noise = torch.Generator().manual_seed(0)
    under = [[steer(model, "model.layers.1", torch.randn(32, generator=noise), seed)] for seed in range(8)]
    under[5] = []
    with serving(model, **SMALL) as server:
        handles = [server.submit([seed, 2, 3], under=each, max_new_tokens=4) for seed, each in enumerate(under)]
        served = [handle.result(60) for handle in handles]
        assert max(together) > 1
        assert min(together) > 0
        too_wide = server.submit([1], under=[steer(model, "model.layers.1", torch.ones(31))], max_new_tokens=2)
        wide = steer(model, "model.layers.1", torch.ones(32, dtype=torch.float64), 2)
        fits = server.submit([1, 2], under=[wide], max_new_tokens=4)
        with pytest.raises(TreeMismatch, match="cannot be added"):
            too_wide.result(60)
        fitting = fits.result(60)
    assert_as_alone(model, fitting, [1, 2], [wide], 4)
    for seed, each in enumerate(under):
        assert_as_alone(model, served[seed], [seed, 2, 3], each, 4)


def test_two_captures_of_one_site_are_told_apart(model):
    under = [capture(model, "model.norm"), ablate(model, "model.norm"), capture(model, "model.norm")]
    with serving(model, **SMALL) as server:
        served = server.submit([1, 2], under=under, max_new_tokens=1).result(60)
    before, after = served.caches
    assert before["model.norm"].abs().sum() > 0 == after["model.norm"].abs().sum()
    with pytest.raises(ContextMisuse, match=r"result.caches has one for each"):
        served.activations  # noqa: B018


def test_leaving_waits_for_requests_and_their_contexts_act_until_then(model):
    prompts = [[1, 2, seed + 1] for seed in range(9)]
    with serving(model, **SMALL) as server:
        handles = [
            server.submit(ids, under=some_contexts(model, seed), max_new_tokens=5) for seed, ids in enumerate(prompts)
        ]
    for seed, ids in enumerate(prompts):
        assert_as_alone(model, handles[seed].result(0), ids, some_contexts(model, seed), 5)


def test_an_error_in_the_block_ends_the_requests(model):
    handles: list[Any] = []
    with pytest.raises(KeyError), serving(model, **SMALL) as server:
        handles.append(server.submit([1], max_new_tokens=400))
        raise KeyError("in the block")
    with pytest.raises(Exception, match="the engine"):
        handles[0].result(60)
    assert all(["forward" not in vars(module) for module in model.modules()])


def test_eager_attention_is_served_too_and_put_back():
    model = a_llama("eager").train()
    with serving(model, **SMALL) as server:
        assert model.config._attn_implementation == "paged|eager"
        served = server.submit([1, 2, 3], under=some_contexts(model, 8), max_new_tokens=3).result(60)
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert_as_alone(model.eval(), served, [1, 2, 3], some_contexts(model, 8), 3)
