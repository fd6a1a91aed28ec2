"""The rows of docs/from_nnsight.md: each beside the same by PyTorch's own hooks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from by_hooks import arguments_by_hooks, changed_by_hook, outputs_by_hooks, put
from gallery.families import small
from gallery.plain import Gate
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from nicehooks import (
    NotCaptured,
    SiteNotReached,
    capture,
    captured,
    describe,
    edit,
    grad_at,
    patch,
    sites,
    steer,
)

IDS, OTHER = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9, 2, 6, 5, 3]])
H0, H1 = "transformer.h.0", "transformer.h.1"
WIDTH = 16


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def test_the_module_is_taken_as_it_is_and_stays_so() -> None:
    model, before = small(), pickle.dumps(small())
    with capture(model, H1) as acts:
        assert isinstance(model, GPT2LMHeadModel)
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)
    assert tokens.shape == (1, 7) and list(acts) == [H1] and pickle.dumps(model) == before


def test_values_are_those_of_hooks_with_their_graph() -> None:
    model = small()
    _, seen = outputs_by_hooks(model, lambda: model(IDS))
    with (
        capture(model, H1) as one,
        capture(model, "transformer.h.*") as blocks,
        capture(model, f"{H1}.attn[0]") as first,
    ):
        model(IDS)
    with capture(model, "**") as every:
        model(IDS)
    assert list(blocks) == [H0, H1] and set(every) == {name for name, calls in seen.items() if calls}
    for acts in (one, blocks, every):
        assert torch.equal(acts[H1], seen[H1][0]) and acts[H1].grad_fn is not None
    assert torch.equal(first[f"{H1}.attn[0]"], seen[f"{H1}.attn"][0][0])
    assert torch.equal(every["transformer.h.0.mlp"], seen["transformer.h.0.mlp"][0])


def test_inputs_are_those_of_a_hook() -> None:
    model = small()
    seen = arguments_by_hooks(model, lambda: model(IDS))
    with capture(model, f"{H1}@input[0]", f"{H1}@input['hidden_states']", "transformer@input['input_ids']") as acts:
        model(IDS)
    with capture(model, f"{H1}@input") as whole:
        model(IDS)
    expected = seen[H1][0].arguments["hidden_states"]
    assert torch.equal(acts[f"{H1}@input[0]"], expected)
    assert torch.equal(acts[f"{H1}@input['hidden_states']"], expected)
    assert torch.equal(whole[f"{H1}@input['hidden_states']"], expected)
    assert acts["transformer@input['input_ids']"] is IDS  # the model passes it by its name


def test_changes_are_those_of_hooks_and_nothing_is_written_in_place() -> None:
    model, vector = small(), torch.arange(float(WIDTH))
    last = (slice(None), -1)
    for context, hook in (
        (patch(model, f"{H1}[:, -1]", vector), lambda value: put(value, last, vector)),
        (edit(model, H1, lambda value: value.tanh()), lambda value: value.tanh()),
        (steer(model, H1, vector), lambda value: value + vector),
        (steer(model, H1, vector, scale=2.0), lambda value: value + 2 * vector),
    ):
        clean = logits(model)
        with changed_by_hook(model, H1, hook):
            expected = logits(model)
        with capture(model, H1) as before, context:
            assert torch.equal(logits(model), expected)
        assert torch.equal(before[H1], outputs_by_hooks(model, lambda: model(IDS))[1][H1][0])
        assert not torch.equal(clean, expected)


def test_a_value_of_one_run_in_another_and_both_in_one_batch() -> None:
    model = small()
    with torch.no_grad():
        with capture(model, H1) as there:
            model(OTHER)
        with changed_by_hook(model, H1, lambda value: put(value, (0, -1), there[H1][0, -1])):
            expected = logits(model)
        with patch(model, f"{H1}[:, -1]", there[f"{H1}[:, -1]"]):
            assert torch.equal(logits(model), expected)
        with capture(model, H1) as both, patch(model, f"{H1}[1, -1]", there[f"{H1}[0, -1]"]):
            batched = logits(model, torch.cat([OTHER, IDS]))
        assert torch.allclose(batched[1:], expected, atol=1e-5)
        assert torch.allclose(batched[:1], logits(model, OTHER), atol=1e-5)
        assert torch.allclose(both[H1][:1], there[H1], atol=1e-5)


def test_a_run_that_does_not_come_by_is_an_error_and_waits_for_nothing() -> None:
    model = small()
    with pytest.raises(SiteNotReached, match=r"transformer\.h\.1#1"), patch(model, f"{H1}#1", 0.0):
        model(IDS)
    with capture(model, H1) as acts:
        with pytest.raises(NotCaptured):
            acts[H1]
        model(IDS)


def test_invokes_are_a_batch_or_a_map_over_patches() -> None:
    model, vectors = small(), torch.eye(3, WIDTH)

    def one(vector: Tensor) -> Tensor:
        with patch(model, f"{H1}[:, -1]", vector):
            return model(IDS, use_cache=False).logits

    with torch.no_grad():
        alone = torch.stack([one(vector) for vector in vectors])
        assert torch.allclose(torch.vmap(one)(vectors), alone, atol=1e-5)
        with patch(model, {f"{H1}[{i}, -1]": vector for i, vector in enumerate(vectors)}):
            assert torch.allclose(logits(model, IDS.expand(3, -1)), alone[:, 0], atol=1e-5)


def test_gradients_are_those_that_a_tensor_retains() -> None:
    model, kept = small(), []
    with changed_by_hook(model, H1, lambda value: value.retain_grad() or kept.append(value)):
        logits(model).square().sum().backward()
    with capture(model, f"{H1}@grad") as acts:
        logits(model).square().sum().backward()
    _, gradients = grad_at(model, H1, lambda out: out.logits.square().sum())(IDS)
    model.zero_grad()
    assert torch.equal(acts[f"{H1}@grad"], kept[0].grad) and torch.equal(gradients[H1], kept[0].grad)


def test_calls_inside_a_forward_have_paths_by_their_names() -> None:
    model, site = small(), f"{H1}.attn@softmax()"
    with capture(model, site) as acts:
        model(IDS)
    assert torch.equal(acts[site], model(IDS, output_attentions=True).attentions[1])
    gate = Gate()
    paths = [record.path for record in sites(gate, torch.ones(2), torch.ones(2), calls=True)]
    assert paths == ["", "@sigmoid()", "@mul#0()", "@mul#1()"]


def test_stop_runs_nothing_behind_it() -> None:
    model = small()
    with capture(model, H0, stop=True) as acts:
        out, seen = outputs_by_hooks(model, lambda: model(IDS))
    assert out is None and f"{H0}.mlp" in seen and not [name for name in seen if name.startswith(H1)]
    assert torch.equal(acts[H0], outputs_by_hooks(model, lambda: model(IDS))[1][H0][0])


def test_a_module_whose_output_is_put_still_runs_and_is_seen_inside() -> None:
    model, value = small(), torch.randn(1, 5, WIDTH)
    with changed_by_hook(model, H1, lambda _: value):
        expected = logits(model)
    with patch(model, H1, value), capture(model, f"{H1}.mlp") as inside:
        assert torch.equal(logits(model), expected)
    assert torch.equal(inside[f"{H1}.mlp"], outputs_by_hooks(model, lambda: model(IDS))[1][f"{H1}.mlp"][0])


def test_steps_of_a_generation() -> None:
    model = small()
    how: dict[str, Any] = {
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
    }
    tokens, seen = outputs_by_hooks(model, lambda: model.generate(IDS, **how))
    with capture(model, H1, keep="all") as every, capture(model, H1, keep="all", steps=slice(3)) as first:
        assert torch.equal(model.generate(IDS, **how), tokens)
    with (
        capture(model, H1, keep="all", steps=[1, 4]) as some,
        capture(model, H1, keep="all", steps=lambda step: step > 2) as late,
    ):
        model.generate(IDS, **how)
    for acts, steps in ((every, range(5)), (first, range(3)), (some, (1, 4)), (late, (3, 4))):
        assert len(acts[H1]) == len(steps)
        assert all(torch.equal(value, seen[H1][step]) for value, step in zip(acts[H1], steps, strict=True))


def test_an_edit_that_stays_is_a_handle_and_listed() -> None:
    model = small()
    clean = logits(model)
    handle = edit(model, H1, lambda value: value * 2).attach()
    assert not torch.equal(logits(model), clean) and [record.path for record in describe(model)] == [H1]
    handle.remove()
    assert torch.equal(logits(model), clean) and not describe(model)


def test_shapes_without_a_context_and_the_models_own_print() -> None:
    model = small()
    shown = {record.path: record.value for record in sites(model, IDS)}
    _, seen = outputs_by_hooks(model, lambda: model(IDS))
    assert set(shown) >= set(seen) and shown[H1] == "Tensor[1, 5, 16] float32"
    assert seen[H1][0].shape == (1, 5, 16)
    plain = str(model)
    with capture(model, H1):
        model(IDS)
        assert str(model) == plain


def test_no_context_asks_where_a_model_runs() -> None:
    for context in (capture, edit, patch, steer):
        with pytest.raises(TypeError, match="remote"):
            context(small(), H1, remote=True)  # type: ignore[call-arg]


# --- what is different on purpose -------------------------------------------------------------------------------------


def test_the_body_runs_once_line_by_line() -> None:
    model, lines = small(), []
    with edit(model, H1, lambda value: lines.append("inside")):
        lines.append("before")
        model(IDS)
        lines.append("behind")
    assert lines == ["before", "inside", "behind"]


def test_places_are_given_in_any_order_and_kept_in_that_of_the_model() -> None:
    model = small()
    with capture(model, H1, "transformer.wte", H0) as acts:
        model(IDS)
    assert list(acts) == ["transformer.wte", H0, H1]


def test_contexts_act_inside_transforms() -> None:
    model, batch = small(), torch.stack([IDS, OTHER])
    with torch.no_grad():
        out, acts = torch.vmap(captured(model, H1))(batch, use_cache=False)
        for i, ids in enumerate(batch):
            with capture(model, H1) as alone:
                assert torch.allclose(out.logits[i], logits(model, ids), atol=1e-5)
            assert torch.allclose(acts[H1][i], alone[H1], atol=1e-5)
