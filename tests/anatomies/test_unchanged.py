"""What the forwards of `anatomy` leave behind: nothing, in a model that keeps something from call to call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny
from gallery.keeping import BatchNormed, HooksItself, KeepsLast, KeepsObject, ReplacesItself, keeping
from gallery.own_transformers import Neurons
from torch import Tensor, nn

from nicehooks import UnsupportedModule, anatomy
from nicehooks.anatomies import unchanged

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def held(model: nn.Module) -> dict[Any, Any]:
    """All that the modules hold, as it is bound, with the numbers or the keys that are in it."""
    return {
        (name, key): (value, inside(value))
        for name, module in model.named_modules()
        for key, value in [*vars(module).items(), *((f"buffer {key}", one) for key, one in module._buffers.items())]
    }


def inside(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, dict) else None


def assert_unchanged(before: dict[Any, Any], model: nn.Module) -> None:
    now = held(model)
    assert before.keys() == now.keys()
    assert [key for key in now if now[key][0] is not before[key][0]] == []
    assert [key for key in now if now[key][1] != before[key][1]] == []


@pytest.mark.parametrize("name", ["RecurrentGemmaForCausalLM", "MiniMaxForCausalLM", "MambaForCausalLM"])
def test_a_model_with_states_of_its_own_keeps_none_of_ours(name: str) -> None:
    model = tiny(name)
    before = held(model)
    anatomy(model)
    assert_unchanged(before, model)


def test_a_state_from_a_generation_is_still_there() -> None:
    model = tiny("RecurrentGemmaForCausalLM")
    with torch.no_grad():
        model(IDS, use_cache=True)
        expected = model(IDS[:, :1], use_cache=True, cache_position=torch.tensor([5])).logits
        model(IDS, use_cache=True)
        before = held(model)
        anatomy(model)
        assert_unchanged(before, model)
        assert torch.equal(model(IDS[:, :1], use_cache=True, cache_position=torch.tensor([5])).logits, expected)


@pytest.mark.parametrize("kind", [KeepsLast, HooksItself, BatchNormed])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("small", [0, unchanged.COPIED_AT_ONCE], ids=["copied when written into", "copied at once"])
def test_what_layers_bind_count_register_and_write_into_is_put_back(
    kind: type[nn.Module], is_training: bool, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unchanged, "COPIED_AT_ONCE", small)
    model = keeping(kind).train(is_training)
    before = held(model)
    parts = anatomy(model)
    assert parts.n_layers == 2
    assert_unchanged(before, model)
    model(IDS)
    before = held(model)
    anatomy(model, inputs=IDS)
    assert_unchanged(before, model)


def test_it_is_put_back_when_nothing_is_found_too() -> None:
    model = keeping(KeepsLast)
    model.last = nn.Linear(3, 3)  # pyright: ignore[reportAttributeAccessIssue]  # no input is wide enough
    before = held(model)
    with pytest.raises(UnsupportedModule):
        anatomy(model)
    assert_unchanged(before, model)


def test_a_module_that_has_bound_an_object_stays_as_it_is() -> None:
    model = keeping(KeepsObject)
    anatomy(model)
    kept: Any = model.pile[0]
    assert kept.kept is not None and kept.count > 1


def test_a_model_that_has_made_itself_anew_stays_as_it_is_and_its_parts_are_those_that_it_has_now() -> None:
    model = keeping(lambda: ReplacesItself(Neurons))
    parts = anatomy(model)
    block: Any = model.pile[0]
    assert block.is_made and parts.module("mlp", 0) is block.mlp
