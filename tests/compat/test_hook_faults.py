"""The faults of hook points that do not come along, and what subclasses may have of their own."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
import torch._dynamo
from gallery.hooked import AsksBack, WithOwnPoint
from gallery.returning import InPair
from gallery.toy import MLP, POST, Z, inputs, toy
from point_hooks import double, look, records, zero
from torch import nn
from worlds import same, state

from nicehooks import (
    PathError,
    SiteNotFound,
    SiteNotReached,
    TreeMismatch,
    capture,
    describe,
    edit,
)
from nicehooks.hookpoints import HookedRootModule, HookPoint, hooked

# --- faults that do not come along ------------------------------------------------------------------------------------


WRONG = "blocks.0.hook_mlp_outt"


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.run_with_cache(inputs(), names_filter=[MLP, WRONG]),
        lambda model: model.run_with_cache(inputs(), names_filter=WRONG),
        lambda model: model.get_caching_hooks([WRONG, MLP]),
        lambda model: model.add_caching_hooks([MLP, WRONG]),
        lambda model: model.add_hook(WRONG, look),
        lambda model: model.run_with_hooks(inputs(), fwd_hooks=[(MLP, look), (WRONG, look)]),
        lambda model: model.run_with_hooks(inputs(), bwd_hooks=[(WRONG, look)]),
        lambda model: model.list_hooks([WRONG]),
    ],
)
def test_a_wrong_name_beside_a_good_one_is_an_error_that_names_the_nearest(model, call):
    with pytest.raises(SiteNotFound) as error:
        call(model)
    assert str(error.value).splitlines() == [
        f"no hook point '{WRONG}' in Toy.",
        f"  nearest names: {MLP}, blocks.1.hook_mlp_out, blocks.0.hook_attn_out",
    ]
    assert model.list_hooks() == {} and model.context_level == 0 and "forward" not in vars(model)


def test_a_module_that_is_no_hook_point(model):
    with pytest.raises(
        SiteNotFound, match=r"'blocks.0.mlp' in Toy is no hook point, but a Sequential. hooked\(model\)"
    ):
        model.add_hook("blocks.0.mlp", look)


def test_a_filter_that_matches_nothing_is_an_error(model):
    def nothing(name):
        return False

    for call in (
        lambda: model.run_with_cache(inputs(), names_filter=nothing),
        lambda: model.add_hook(nothing, look),
        lambda: model.run_with_hooks(inputs(), fwd_hooks=[(nothing, look)]),
    ):
        with pytest.raises(SiteNotFound, match="nothing matches no hook point of Toy"):
            call()
    with pytest.raises(SiteNotFound, match="empty list"):
        model.run_with_cache(inputs(), names_filter=[])


def test_a_filter_that_is_none(model):
    for wrong in (3, [MLP, 3]):
        with pytest.raises(PathError, match="it is a name, a list of names, or a predicate"):
            model.run_with_cache(inputs(), names_filter=wrong)


def test_a_model_without_setup_says_so():
    class Forgetful(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.hook_x = HookPoint()

        def forward(self, x):
            return self.hook_x(x)

    for call in (
        lambda: Forgetful().run_with_cache(inputs()),
        lambda: Forgetful().add_hook("hook_x", look),
        lambda: Forgetful().add_hook(lambda name: True, look),
    ):
        with pytest.raises(SiteNotFound, match=r"self.setup\(\)"):
            call()


def test_a_named_point_that_the_forward_does_not_reach_is_an_error(model):
    with pytest.raises(SiteNotReached, match=r"'blocks.0.hook_never' was never reached in Toy"):
        model.run_with_cache(inputs(), names_filter=["blocks.0.hook_never", MLP])
    with pytest.raises(SiteNotReached, match=r"'blocks.0.hook_never' was never reached in Toy"):
        model.run_with_hooks(inputs(), fwd_hooks=[(lambda name: "never" in name, look)])


@pytest.mark.parametrize("level", [None, 1, 2])
def test_temporary_helpers_leave_the_hooks_of_others(model, level):
    model.add_hook(MLP, double, level=level)
    model.hook_dict[POST].add_hook(look, level=level)
    model.run_with_hooks(inputs(), fwd_hooks=[(MLP, look)])
    model.run_with_cache(inputs())
    with model.hooks(fwd_hooks=[(Z, look)]):
        model(inputs())
    assert [(r.hook, r.level) for r in records(model)] == [(double, level), (look, level)]
    model.reset_hooks()


def test_no_hook_survives_an_error(model, clean):
    def fail(value, hook):
        raise ZeroDivisionError

    before = state(model)
    for call in (
        lambda: model.run_with_hooks(inputs(), fwd_hooks=[(MLP, double), (POST, fail)]),
        lambda: model.run_with_cache(torch.ones(3, 5, 9)),
        lambda: model.run_with_cache(inputs(), incl_bwd=True),
        lambda: model.run_with_hooks(inputs(), fwd_hooks=[(MLP, double), ("no", look)]),
        lambda: model.run_with_hooks(inputs(), fwd_hooks=[(MLP, double), (POST, 3)]),
        lambda: model.add_hook(POST, look, dir="up"),
    ):
        with pytest.raises((ZeroDivisionError, RuntimeError, TreeMismatch, SiteNotFound, TypeError, ValueError)):
            call()
        assert model.list_hooks() == {} and model.context_level == 0 and not model.is_caching
    assert [entry[:4] for entry in state(model)] == [entry[:4] for entry in before]
    assert same(model(inputs()), clean)


def test_incl_bwd_is_not_swallowed_by_a_model_that_takes_anything(model):
    _, cache = model.run_with_cache(inputs(), return_type="loss", incl_bwd=True, other=1)
    assert POST + "_grad" in cache and model.received == ["other"]
    view_cache = hooked(model).run_with_cache(inputs(), return_type="loss", incl_bwd=True, names_filter=POST)[1]
    assert list(view_cache) == [POST, POST + "_grad"] and model.received == []


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda model: model.run_with_cache(inputs(), incl_bwd=True), r"is a tensor of shape \[3, 5, 5\]"),
        (
            lambda model: hooked(nn.LSTM(4, 3)).run_with_cache(inputs(), incl_bwd=True),
            r"is a tuple",
        ),
    ],
)
def test_incl_bwd_needs_a_scalar(model, run, says):
    with pytest.raises(TreeMismatch, match=says):
        run(model)


def test_incl_bwd_needs_gradients(model):
    with torch.no_grad(), pytest.raises(TreeMismatch, match="without a gradient"):
        model.run_with_cache(inputs(), return_type="loss", incl_bwd=True)


def test_backward_hooks_of_a_run_act_in_the_backward_after_it_and_in_no_other(model):
    seen, before = [], state(model)
    look_at_gradient = lambda grad, hook: seen.append((hook.name, grad))  # noqa: E731
    loss = model.run_with_hooks(inputs(), return_type="loss", bwd_hooks=[(MLP, look_at_gradient)])
    assert seen == [] and model.list_hooks() == {} and describe(model) == [] and model.context_level == 0
    model(inputs(), return_type="loss").backward()  # of another run
    assert seen == []
    loss.backward()
    assert [name for name, _ in seen] == [MLP]
    with capture(model, MLP + "@grad") as grads:
        model(inputs(), return_type="loss").backward()
    assert same(seen[0][1], grads[MLP + "@grad"]) and len(seen) == 1
    assert [entry[:4] for entry in state(model)] == [entry[:4] for entry in before]


def test_backward_hooks_of_a_run_are_held_by_its_graph_and_by_nothing_else(model):
    class Look:
        def __call__(self, grad, hook):
            return grad * 0

    hook = Look()
    gone = weakref.ref(hook)
    loss = model.run_with_hooks(inputs(), return_type="loss", bwd_hooks=[(MLP, hook), (POST, hook)])
    del hook
    gc.collect()
    assert gone() is not None
    loss.backward()
    assert not model.blocks[0].mlp[0].weight.grad.any()
    del loss
    gc.collect()
    assert gone() is None


def test_backward_of_a_run_of_a_model_that_nobody_holds():
    seen = []
    toy().run_with_hooks(
        inputs(), return_type="loss", bwd_hooks=[(MLP, lambda grad, hook: seen.append(hook.name))]
    ).backward()
    assert seen == [MLP]


def test_backward_hooks_of_a_run_that_no_backward_can_reach_are_an_error(model):
    with torch.no_grad(), pytest.raises(SiteNotReached, match="no gradient came by"):
        model.run_with_hooks(inputs(), bwd_hooks=[(MLP, look)])
    with pytest.raises(SiteNotReached, match=r"'blocks.0.hook_never@grad'"):
        model.run_with_hooks(inputs(), bwd_hooks=[("blocks.0.hook_never", look)])


@pytest.mark.parametrize("kind", [HookPoint, HookedRootModule, type(hooked(nn.ReLU()))])
def test_no_default_argument_is_mutable(kind):
    found = [
        (name, parameter.name)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if method.__module__.startswith("nicehooks")
        for parameter in inspect.signature(method).parameters.values()
        if isinstance(parameter.default, list | dict | set)
    ]
    assert found == []


def test_the_models_own_hooks_fire(model, clean):
    fired = []
    with model.register_forward_hook(lambda module, args, out: fired.append(out.shape)):
        model.run_with_hooks(inputs(), fwd_hooks=[(MLP, look)])
        model.run_with_cache(inputs(), names_filter=MLP)
        hooked(model).run_with_hooks(inputs())
    assert fired == [clean.shape] * 3


@pytest.mark.parametrize("wrong", [{MLP: look}, look, "name", [MLP], [(MLP,)], 3])
def test_hooks_are_pairs(model, wrong):
    with pytest.raises(TypeError, match=r"fwd_hooks is a list of pairs \(name, function\)"):
        model.run_with_hooks(inputs(), fwd_hooks=wrong)


def test_names_are_names(model):
    with pytest.raises(TypeError, match="3 is no name of a hook point"):
        model.add_hook(3, look)


def test_a_hook_point_of_another_model(model):
    other = toy()
    other.hook_dict[MLP] = model.hook_dict[MLP]
    with pytest.raises(SiteNotFound, match="is no part of this Toy"):
        other.run_with_hooks(inputs(), fwd_hooks=[(MLP, look)])


# --- what subclasses may have of their own ----------------------------------------------------------------------------


def test_a_model_with_a_check_and_add_hook_of_its_own_is_asked():
    model = AsksBack()
    assert model.context_level == 0 and not model.is_caching
    model.add_hook(MLP, zero, prepend=True)
    model.add_hook(lambda name: name.endswith("hook_z"), look, dir="bwd", is_permanent=True)
    assert [name for name, *_ in model.seen] == [MLP, "blocks.0.attn.hook_z", Z]
    assert model.seen[0][3] == {"dir": "fwd", "is_permanent": False, "level": None, "prepend": True}
    assert [record.name for record in records(model)] == ["blocks.0.attn.hook_z", MLP, Z]


def test_a_point_with_an_add_hook_of_its_own_is_asked():
    model, x = WithOwnPoint(), torch.ones(2, requires_grad=True)
    model.add_hook("mine", zero)
    assert model(x).tolist() == [1, 1]
    model.reset_hooks()
    with model.hooks([("mine", double), ("plain", double)], [("mine", double)]):
        output = model(x)
        output.sum().backward()
    assert output.tolist() == [6, 6] and x.grad.tolist() == [8, 8]
    assert model.mine.added == [("fwd", None), ("fwd", 1), ("bwd", 1)] and not model.list_hooks()
    model.run_with_hooks(x, fwd_hooks=[("mine", double)], reset_hooks_end=False)
    assert [(record.name, record.level) for record in records(model)] == [("mine", 1)]
    assert torch.equal(model(x), 2 * x + 1)
    model.reset_hooks()
    with pytest.raises(SiteNotFound), model.hooks([("mine", double), ("no", double)]):
        pass
    with pytest.raises(ValueError, match="inside"), model.hooks([("mine", double)], reset_hooks_end=False):
        raise ValueError("inside")
    assert not model.list_hooks() and model.context_level == 0


def test_hooks_that_are_removed_in_a_call_have_their_turn_in_it():
    point, seen = HookPoint(), []

    def first(value, hook):
        seen.append(1)
        hook.remove_hooks("fwd")

    point.add_hook(first)
    point.add_hook(lambda value, hook: seen.append(2))
    point(torch.ones(2))
    assert seen == [1, 2] and not point.fwd_hooks
    point(torch.ones(2))
    assert seen == [1, 2]


def test_caches_may_keep_copies():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x, own = torch.ones(2, 4), {}
    _, cache = hooked(model).run_with_cache(x, names_filter="0", clone=True)
    hooked(model).add_caching_hooks("0", cache=own, clone=True)
    model(x)
    hooked(model).reset_hooks()
    assert torch.equal(cache["0"], model[0](x)) and torch.equal(own["0"], model[0](x)) and own["0"].min() < 0


def test_the_advice_for_a_tuple_can_be_followed():
    model, x = nn.Sequential(InPair()), torch.ones(2)
    with pytest.raises(TreeMismatch, match=r'\n    edit\(model, "0\[0\]", …\)$'):
        hooked(model).run_with_hooks(x, fwd_hooks=[("0", lambda value, hook: value[0] * 0)])
    with edit(model, "0[0]", lambda value: value * 0):
        assert model(x)[0].tolist() == [0, 0]


def test_hooks_are_not_entered_inside_one_compiled_graph(model):
    def zeroed(x):
        return model.run_with_hooks(x, fwd_hooks=[(MLP, zero)])

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot be entered inside compiled code"):
        torch.compile(zeroed, fullgraph=True, backend="eager")(inputs())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(zeroed, backend="eager")(inputs()), zeroed(inputs()))
    assert not model.list_hooks() and model.context_level == 0
