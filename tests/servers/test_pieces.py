"""A prompt that is longer than a forward: run in pieces, each context acts as on the whole."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from nicehooks import ContextMisuse, TreeMismatch, ablate, capture, edit, patch, serving, steer
from tests.servers.test_serving import a_llama, alone, assert_as_alone

LITTLE: dict[str, Any] = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 16}


@pytest.fixture(scope="module")
def model() -> Any:
    return a_llama()


def a_vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LONG = [(7 * at + 3) % 60 for at in range(50)]
H = "model.layers.1"

CUT: dict[str, Any] = {
    "steer": lambda m: [steer(m, H, a_vector(1, 32), 2)],
    "steer at one position": lambda m: [steer(m, f"{H}[:, 3]", a_vector(1, 32), steps=0)],
    "steer at the last": lambda m: [steer(m, f"{H}[:, -1]", a_vector(1, 32))],
    "steer at some": lambda m: [steer(m, f"{H}[:, 10:40:3]", a_vector(1, 32))],
    "steer with a vector for each position": lambda m: [steer(m, H, a_vector(2, 50, 32), steps=0)],
    "ablate at the end": lambda m: [ablate(m, f"{H}[:, -20:]", steps=0)],
    "patch a position": lambda m: [patch(m, {f"{H}[:, 17]": a_vector(3, 32), f"{H}[:, -2]": 0.5}, steps=0)],
    "patch some": lambda m: [patch(m, f"{H}[:, 4:44]", a_vector(4, 1, 40, 32), steps=0)],
    "patch in a subspace": lambda m: [patch(m, H, a_vector(3, 32), subspace=torch.eye(32)[:, :4])],
    "an argument": lambda m: [steer(m, f"{H}.mlp@input[0][:, 20]", a_vector(1, 32), steps=0)],
    "one of the heads": lambda m: [ablate(m, f"{H}.self_attn[0]/4[:, :, 2]")],
    "the head": lambda m: [steer(m, "lm_head", a_vector(1, 60)), capture(m, "lm_head", keep="all")],
    "a function at one position": lambda m: [edit(m, f"{H}[:, 30]", lambda value: value * 3, steps=0)],
    "a function of an argument": lambda m: [edit(m, f"{H}.mlp@input[0][:, -1]", lambda value: -value, calls=0)],
    "captures": lambda m: [capture(m, H, "model.norm", f"{H}.mlp@input[0]", "['logits']", keep="all")],
    "a capture of positions": lambda m: [capture(m, f"{H}[:, 20]", f"{H}[:, 3:30]", "lm_head[:, -1]", steps=0)],
    "a capture of the last": lambda m: [capture(m, f"{H}[:, -1]", "model.layers.*.mlp@input[0][:, -1]", keep="all")],
    "a capture that reduces": lambda m: [capture(m, H, map=lambda value: value.mean(1), keep="all")],
    "a capture of later steps": lambda m: [capture(m, H, keep="all", steps=slice(1, None))],
    "a capture between": lambda m: [
        capture(m, H, keep="first"), steer(m, H, a_vector(1, 32)), capture(m, H, keep="first"),
        steer(m, f"{H}[:, 5]", a_vector(2, 32), steps=0), capture(m, f"{H}[:, 5]", H, keep="first", steps=0),
    ],
}  # fmt: skip


def test_a_long_prompt_is_what_it_is_alone(model):
    with serving(model, **LITTLE) as server:
        handles = {name: server.submit(LONG, under=make(model), max_new_tokens=3) for name, make in CUT.items()}
        served = {name: handle.result(60) for name, handle in handles.items()}
    for name, make in CUT.items():
        assert_as_alone(model, served[name], LONG, make(model), 3)


def test_rows_that_a_module_flattens():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 60}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(initializer_range=0.3, experts_implementation="eager", **sizes, **heads)
    mixtral = MixtralForCausalLM(config).eval().double()
    mixtral.generation_config.eos_token_id = None
    path = "model.layers.0.mlp.gate@input[0]"
    under = [
        steer(mixtral, f"{path}/rows[:, 30]", a_vector(1, 32), steps=0),
        edit(mixtral, f"{path}/rows[:, 20]", lambda value: -value, steps=0),
        capture(mixtral, f"{path}/rows", f"{path}/rows[:, -1]", path, keep="all"),
    ]
    with serving(mixtral, **LITTLE) as server:
        served = server.submit(LONG, under=under, max_new_tokens=3).result(60)
    assert_as_alone(mixtral, served, LONG, under, 3)


def test_a_function_at_one_position_is_called_once_with_what_stands_there(model):
    seen: list[Any] = []
    with serving(model, **LITTLE) as server:
        under = [edit(model, f"{H}[:, 20]", lambda value: seen.append(value.clone()), steps=0)]
        server.submit(LONG, under=under, max_new_tokens=1).result(60)
    assert len(seen) == 1
    _, (cache,) = alone(model, LONG, [capture(model, f"{H}[:, 20]", keep="first")], 1)
    torch.testing.assert_close(seen[0], cache[f"{H}[:, 20]"])


def test_what_is_kept_of_one_position_holds_no_other(model):
    with serving(model, **LITTLE) as server:
        handle = server.submit(LONG, under=[capture(model, f"{H}[:, 20]", H)], max_new_tokens=1)
        cache = handle.result(60).activations
    assert cache[f"{H}[:, 20]"].untyped_storage().nbytes() == 32 * 8
    assert not handle._request.pieces._kept


def test_a_prompt_that_is_dropped_half_way_begins_anew(model):
    dropped: list[int] = []
    with serving(model, **{**LITTLE, "num_blocks": 9}, scheduler_type="prefill_first") as server:
        scheduler = server._engine.processor.scheduler  # type: ignore[union-attr]
        add = scheduler.add_waiting_request

        def counted(state: Any) -> None:
            if state._true_initial_tokens:
                dropped.append(server._requests[state.request_id].next_step)
            add(state)

        scheduler.add_waiting_request = counted
        handles = [server.submit(LONG, under=[capture(model, H)], max_new_tokens=2) for _ in range(6)]
        served = [handle.result(60) for handle in handles]
    assert 0 in dropped, "the engine was to drop some request before its prompt was through"
    for each in served:
        assert_as_alone(model, each, LONG, [capture(model, H)], 2)


WHOLE: list[Any] = [
    lambda m: edit(m, H, lambda value: value - value.mean(1, keepdim=True)),
    lambda m: edit(m, f"{H}[:, 3:9]", lambda value: value.flip(1)),
    lambda m: patch(m, f"{H}[0, :, 3]", a_vector(1, 50), subspace=torch.eye(50)[:, :2]),
]


@pytest.mark.parametrize("make", WHOLE)
def test_a_function_over_several_positions_is_refused_at_once(model, make):
    with serving(model, **LITTLE) as server:
        with pytest.raises(ContextMisuse, match=r"several positions has to see all .* 50 tokens; 16 .*\n.*=50\)"):
            server.submit(LONG, under=[make(model)], max_new_tokens=1)
        short = server.submit(LONG[:16], under=[edit(model, H, lambda value: value.flip(1), steps=0)], max_new_tokens=2)
        assert_as_alone(model, short.result(60), LONG[:16], [edit(model, H, lambda value: value.flip(1), steps=0)], 2)


def test_an_index_that_turns_out_to_be_another_fails_its_request(model):
    with serving(model, **LITTLE) as server:
        feature = [edit(model, f"{H}[0][:, 3]", lambda value: value * 2)]
        several = server.submit(LONG, under=feature, max_new_tokens=1)
        beyond = server.submit(LONG, under=[capture(model, f"{H}[:, 50]")], max_new_tokens=1)
        with pytest.raises(ContextMisuse, match="longer than a forward"):
            several.result(60)
        with pytest.raises(TreeMismatch, match=r"\[:, 50\] is out of range"):
            beyond.result(60)
        short = server.submit(LONG[:16], under=feature, max_new_tokens=2).result(60)
    assert_as_alone(model, short, LONG[:16], feature, 2)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [12, 40])
def test_long_and_short_mixed_in_little_memory(model, blocks):
    chance, kinds = random.Random(blocks), list(CUT.values())
    asked: list[Any] = []
    with serving(model, **{**LITTLE, "num_blocks": blocks}) as server:
        for _ in range(30):
            ids, make, new = [chance.randrange(60) for _ in range(50)], chance.choice(kinds), chance.randrange(2, 12)
            if chance.random() < 0.4:
                ids, make = ids[: chance.randrange(1, 16)], CUT["captures"]
            asked.append((server.submit(ids, under=make(model), max_new_tokens=new), ids, make, new))
            if chance.random() < 0.2:
                chance.choice(asked)[0].cancel()
    finished = [each for each in asked if not each[0]._request.future.cancelled()]
    for handle, ids, make, new in finished:
        assert_as_alone(model, handle.result(0), ids, make(model), new)
