"""Scores and patterns while a model generates: with padding and groups, they are the same under each implementation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from torch import Tensor, nn

from nicehooks import ablate, anatomy, capture, edit, fused_attention_as_steps, patch

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.:DeprecationWarning"
    ),  # inductor itself uses what torch has deprecated
    pytest.mark.usefixtures("as_written"),
]

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)


@pytest.fixture
def as_written() -> Iterator[None]:
    """What transformers compiles for flexible attention runs as it is written: to compile it takes long."""
    with torch.compiler.set_stance("force_eager"):
        yield


IDS = torch.tensor([[0, 0, 3, 1, 4], [9, 2, 6, 5, 3]])
SEEN = (IDS != 0).long()
STEPS, LAYER, HEAD = 3, 1, 2

GROUPED = ("LlamaForCausalLM", "Qwen3ForCausalLM")
PAIRS = [(name, "sdpa") for name in (*GROUPED, "GPT2LMHeadModel")] + [(name, "flex_attention") for name in GROUPED]

each_model = pytest.mark.parametrize(("name", "kernel"), PAIRS)
each_step = pytest.mark.parametrize("part", ["scores", "pattern"])


def model_of(name: str, attention: str) -> Any:
    grouped = {} if name == "GPT2LMHeadModel" else {"num_key_value_heads": 2}
    model = tiny(name, **grouped)
    model.set_attn_implementation(attention)
    return model


def generated(model: Any, ids: Tensor = IDS, seen: Tensor = SEEN) -> Any:
    """The logits of each step of greedy generation, `[step, batch, vocab]`."""
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    out = model.generate(
        ids, attention_mask=seen, **options, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    return torch.stack(out.logits)


def each_call(model: Any, part: str, **given: Tensor) -> list[Tensor]:
    where = anatomy(model)[part, LAYER]
    with capture(model, where, keep="all") as acts:
        generated(model, **given)
    return list(acts.calls(where))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same where a key may be looked at, in the rows of queries that are no padding."""
    if a.shape != b.shape:
        return False
    looked = (a > -1e9) & (b > -1e9)
    rows = torch.ones(2, 5, dtype=torch.bool) if a.shape[2] == 1 else SEEN.bool()
    looked &= rows[:, None, : a.shape[2], None]
    return bool(looked.any()) and torch.allclose(a[looked], b[looked], atol=1e-5)


@each_step
@each_model
def test_a_step_of_attention_has_its_shape_in_each_step_of_generation(name: str, kernel: str, part: str) -> None:
    eager, fused = (each_call(model_of(name, attention), part) for attention in ("eager", kernel))
    assert [tuple(value.shape) for value in fused] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    assert all(map(alike, eager, fused))


@each_step
@each_model
def test_without_padding_too(name: str, kernel: str, part: str) -> None:
    given = {"ids": IDS[1:], "seen": SEEN[1:]}
    eager, fused = (each_call(model_of(name, attention), part, **given) for attention in ("eager", kernel))
    assert [tuple(value.shape) for value in fused] == [(1, 4, 5, 5), (1, 4, 1, 6), (1, 4, 1, 7)]
    assert all(torch.allclose(a[a > -1e9], b[b > -1e9], atol=1e-5) for a, b in zip(eager, fused, strict=True))


@each_model
def test_a_head_of_the_pattern_ablated_is_that_head_of_z_in_each_step(name: str, kernel: str) -> None:
    for attention in ("eager", kernel):
        model = model_of(name, attention)
        parts = anatomy(model)
        with ablate(model, parts.pattern[LAYER].head(HEAD)), capture(model, parts.z[LAYER], keep="all") as acts:
            without = generated(model)
        zero = [~value.any(-1).any(1).any(0) for value in acts.calls(parts.z[LAYER])]
        assert [one.tolist() for one in zero] == [[False, False, True, False]] * STEPS
        with ablate(model, parts.z[LAYER].head(HEAD)):
            assert torch.allclose(generated(model), without, atol=1e-5)
        assert not torch.allclose(generated(model), without, atol=1e-3)


@each_model
def test_the_pattern_of_another_head_patched_in_each_step_gives_the_same_in_both(name: str, kernel: str) -> None:
    eager, fused = model_of(name, "eager"), model_of(name, kernel)
    where = anatomy(eager).pattern[LAYER], anatomy(fused).pattern[LAYER]
    with capture(fused, where[1].head(0), keep="all") as acts:
        generated(fused)
    of_other = acts.calls(where[1].head(0))
    outputs = []
    for model, path in zip((eager, fused), where, strict=True):
        given = iter(of_other)
        with edit(model, path.head(HEAD), lambda value, given=given: next(given)):
            outputs.append(generated(model))
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[1], generated(fused), atol=1e-4)


@each_model
def test_an_edit_of_scores_by_queries_and_keys_acts_the_same(name: str, kernel: str) -> None:
    """The newest key alone: what this says is said in the true shape, of all heads."""
    outputs = []
    for attention in ("eager", kernel):
        model = model_of(name, attention)
        with patch(model, {anatomy(model).scores[LAYER][:, [0, 3], -1:, :-1]: -1e4}):
            outputs.append(generated(model))
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[1], generated(model), atol=1e-3)


@pytest.mark.parametrize("kernel", ["sdpa", "flex_attention"])
def test_gradients_of_a_pattern_have_its_shape(kernel: str) -> None:
    found = []
    for attention in ("eager", kernel):
        model = model_of("LlamaForCausalLM", attention)
        out = model(IDS, attention_mask=SEEN, use_cache=True)
        whole = torch.cat([SEEN, torch.ones(2, 1, dtype=torch.long)], 1)
        with capture(model, anatomy(model).pattern.grad) as acts, torch.enable_grad():  # all: flex has none on a CPU
            model.get_input_embeddings().weight.requires_grad_()
            again = model(torch.tensor([[7], [8]]), attention_mask=whole, cache=out.cache)
            again.logits[:, -1, 7].sum().backward()
        found.append(acts[anatomy(model).pattern[LAYER].grad])
    assert found[1].shape == (2, 4, 1, 6)
    assert torch.allclose(found[0] * whole[:, None, None], found[1] * whole[:, None, None], atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "flex_attention"])
def test_attention_as_steps_has_the_heads_apart(kernel: str) -> None:
    model = model_of("LlamaForCausalLM", kernel)
    with fused_attention_as_steps(), capture(model, f"model.layers.{LAYER}.self_attn@softmax()", keep="all") as acts:
        logits = generated(model)
    (key,) = acts
    assert [value.shape[1:3] for value in acts.calls(key)] == [(4, 5), (4, 1), (4, 1)]
    assert torch.allclose(logits, generated(model), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 12), (1, 6, 4), (2, 3, 4)])
def test_positions_are_not_taken_for_heads(shape: tuple[int, ...]) -> None:
    class ThreePositions(nn.Module):
        """As many positions as a group has heads, made by another reshape than that of heads."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(*[x.reshape(1, 2, 3, 4)] * 3)

    model = ThreePositions()
    with capture(model, "@scaled_dot_product_attention().pattern") as acts:
        model(torch.randn(shape))
    assert acts["@scaled_dot_product_attention().pattern"].shape == (1, 2, 3, 3)
