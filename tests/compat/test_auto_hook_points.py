"""The hook points of auto_hook: first items of tuples, points written by hand, parameters; and where warnings point."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from gallery.calling import Idle
from gallery.hooked import PointByHand
from gallery.trees import HasCouples
from torch import nn

from nicehooks.hookpoints import auto_hook, check_auto_hook


def test_hooks_get_the_first_item_of_a_tuple_and_put_it_back():
    model, seen = auto_hook(HasCouples()), []
    out = model.run_with_hooks(
        torch.ones(2),
        fwd_hooks=[
            ("part.hook_point", lambda value, hook: value * 0),
            ("part.hook_point", lambda v, hook: seen.append(v)),
        ],
    )
    _, cache = model.run_with_cache(torch.ones(2), names_filter="part.hook_point")
    assert out.tolist() == [1.0, 1.0] and seen[0].tolist() == [0.0, 0.0]
    assert cache["part.hook_point"].tolist() == [2.0, 2.0]
    model.add_hook("part.hook_point", lambda value, hook: value * 10)
    assert model(torch.ones(2)).tolist() == [21.0, 21.0]


@pytest.mark.parametrize("how", [auto_hook, copy.deepcopy], ids=["hooked", "copied"])
def test_hook_points_written_by_hand_are_the_models_own(how):
    model = how(auto_hook(PointByHand()))
    assert list(model.hook_dict) == ["hook_point", "fc.hook_point", "relu_hook_point"]
    assert model.hook_dict["relu_hook_point"] is model.relu_hook_point
    told = []
    out = model.run_with_hooks(
        torch.ones(2), fwd_hooks=[("relu_hook_point", lambda value, hook: (told.append(hook.name), value * 0)[1])]
    )
    assert not out.any() and told == ["relu_hook_point"]
    model.relu_hook_point.add_hook(lambda value, hook: value * 0)
    assert list(model.list_hooks()) == ["relu_hook_point"]
    assert model.unwrap() is model and not model.relu_hook_point.has_hooks()
    torch.manual_seed(0)  # of a layer that its ReLU lets through
    assert check_auto_hook(PointByHand, {"x": torch.ones(3, 2)}).ok


def test_a_parameter_stays_as_it_is():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = auto_hook(nn.Parameter(torch.ones(2)))

        def forward(self, x):
            return x * self.scale

    parameter = nn.Parameter(torch.ones(2))
    assert auto_hook(parameter) is parameter
    assert list(auto_hook(Scaled()).hook_dict) == ["hook_point", "scale.hook_point"]
    with pytest.raises(TypeError, match=r"auto_hook takes a class of torch.nn.Modules"):
        auto_hook(torch.ones(2))


def test_every_warning_is_in_the_line_of_the_caller():
    model = auto_hook(nn.Sequential(nn.Linear(2, 2), nn.Identity()))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.cache_all({})
        with model.hooks([("0.hook_point", lambda value, hook: None)]):
            pass
        model(torch.ones(2))
        model.add_hook("1.hook_point", lambda grad, hook: grad, dir="bwd")
        model(torch.ones(2))
        model.reset_hooks()
        check_auto_hook(Idle(), {"x": torch.ones(2)})
    kinds = [type(one.message).__name__ for one in seen]
    assert kinds == ["DeprecationWarning", "NotCalledWarning", "NotReachedWarning", "HookCheckWarning"]
    assert {one.filename for one in seen} == {__file__}
