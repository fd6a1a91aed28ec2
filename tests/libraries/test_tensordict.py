"""tensordict: a TensorDict is a container like others, with a part for each key."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from nicehooks import TreeMismatch, ablate, capture, describe, edit, patch


@pytest.fixture
def model():
    torch.manual_seed(0)
    first = TensorDictModule(nn.Linear(4, 5), in_keys=["a"], out_keys=["b"])
    return TensorDictSequential(first, TensorDictModule(nn.Linear(5, 2), in_keys=["b"], out_keys=["c"]))


def given():
    return TensorDict({"a": torch.ones(3, 4)}, [3])


def bias_of_the_last(model):
    return model.module[1].module.bias.expand(3, 2)


def test_keys_are_parts(model):
    clean = model(given())["c"]
    with capture(model, "**") as acts, capture(model, "module.0['b']") as part:
        model(given())
    assert type(acts["module.0"]) is TensorDict
    assert torch.equal(part["module.0['b']"], acts["module.0.module"])
    with capture(model, "module.0@grad['b']") as acts:
        model(given())["c"].sum().backward()
    assert acts["module.0@grad['b']"].shape == (3, 5)
    with ablate(model, "module.0['b']"):
        assert torch.allclose(model(given())["c"], bias_of_the_last(model))
    assert torch.equal(model(given())["c"], clean) and not describe(model)


def test_whole_containers(model):
    clean = model(given())["c"]
    with ablate(model, "module.0"):
        assert torch.allclose(model(given())["c"], bias_of_the_last(model))
    with edit(model, "module.0", lambda values: values.apply(lambda value: value * 0)):
        assert torch.allclose(model(given())["c"], bias_of_the_last(model))
    with edit(model, "module.0", lambda values: values):
        assert torch.equal(model(given())["c"], clean)


def test_one_with_fewer_keys_leaves_the_others_and_one_with_more_is_refused(model):
    with patch(model, "module.0", TensorDict({"b": torch.zeros(3, 5)}, [3])):
        out = model(given())
    assert torch.allclose(out["c"], bias_of_the_last(model)) and out["a"].eq(1).all()
    with pytest.raises(TreeMismatch, match=r"patch at 'module\.0': TensorDict\(a: .*, other: .*\) came where"):
        with patch(model, "module.0", TensorDict({"a": torch.ones(3, 4), "other": torch.ones(3, 4)}, [3])):
            model(given())


def test_the_model_writes_on_into_the_container_that_it_returned(model):
    """So the part, and not the whole, is what was captured there."""
    with capture(model, "module.0", "module.0['b']") as acts:
        model(given())
    assert torch.equal(acts["module.0['b']"], acts["module.0"]["b"])
