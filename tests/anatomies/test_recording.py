"""What a recorded forward knows of the values that went by, and what recording leaves as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from gallery.decoders import Own
from gallery.every_architecture import tiny
from torch import nn

from nicehooks import UnsupportedModule, anatomy
from nicehooks.anatomies.noted_values import key_of
from nicehooks.anatomies.recording import record_forward


def test_a_tensor_that_is_written_into_is_another_value_afterwards() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Identity())
    x = torch.tensor([[-1.0, 2.0]])
    with torch.no_grad():
        _, record = record_forward(model, model, x)
    first, last = (next(call for call in record.calls if call.owner == name) for name in ("0", "2"))
    assert first.outputs[0].tensor.tolist() == [[-1.0, 2.0]] and last.inputs[0].tensor.tolist() == [[0.0, 2.0]]
    assert first.outputs[0].key != last.inputs[0].key and last.inputs[0].key == last.outputs[0].key


def test_what_ran_within_a_call_is_what_began_and_ended_in_it() -> None:
    model = Own()
    with torch.no_grad():
        _, record = record_forward(model, model, torch.randn(1, 3, 8))
    for outer in record.of_modules():
        assert record.within(outer) == [call for call in record.calls if call.is_in(outer)]


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (3, 1, 2), ()])
def test_a_key_is_that_of_the_numbers_whatever_their_strides(shape: tuple[int, ...]) -> None:
    value = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape)
    strided = value.new_zeros((*shape, 19))[..., 0]
    strided.copy_(value)
    lone = value.flatten()[:1].as_strided((1, 1), (19, 19))
    assert key_of(strided) == key_of(value) and key_of(lone) == key_of(value.flatten()[:1])


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_is_as_it_was(is_on: bool) -> None:
    was_on = gc.isenabled()
    try:
        gc.enable() if is_on else gc.disable()
        anatomy(Own(), inputs=torch.randn(1, 3, 8))
        assert gc.isenabled() is is_on
        with pytest.raises(UnsupportedModule):
            anatomy(nn.Bilinear(2, 2, 2))
        assert gc.isenabled() is is_on
    finally:
        gc.enable() if was_on else gc.disable()


MOST_FORWARDS = {"MambaForCausalLM": 3, "JambaForCausalLM": 3, "RwkvForCausalLM": 3, "BartForConditionalGeneration": 2}


@pytest.mark.parametrize(("name", "count"), [("LlamaForCausalLM", 2), *MOST_FORWARDS.items()])
def test_finding_and_checking_run_the_model_two_times_with_mixers_three_and_asking_again_not_at_all(
    name: str, count: int
) -> None:
    model = tiny(name)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    anatomy(model)
    assert len(calls) == count
    anatomy(model)
    assert len(calls) == count


def test_models_in_a_model_that_attend_otherwise_are_found_once_and_anew_when_one_is_switched() -> None:
    model = tiny("LlavaForConditionalGeneration")
    model.set_attn_implementation("eager")
    model.model.language_model.set_attn_implementation("sdpa")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    parts = anatomy(model)
    assert parts.attention == "sdpa" and str(parts.pattern[0]).endswith("@scaled_dot_product_attention().pattern")
    assert len(calls) == 2
    model.model.language_model.set_attn_implementation("eager")
    assert str(parts.pattern[0]).endswith("self_attn@softmax()") and len(calls) == 4
