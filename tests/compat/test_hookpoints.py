"""HookPoint, HookedRootModule, hooked: what they do, in every world, and the faults that do not come along."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch._dynamo
from hookpoint_models import Toy, inputs, toy
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from worlds import WORLDS, Pair, same, state

import nicehooks
from nicehooks import (
    ActivationCache,
    NotCalledWarning,
    NotReachedWarning,
    PathError,
    SiteNotFound,
    SiteNotReached,
    StaleActivation,
    TreeMismatch,
    UnsupportedModule,
    ablate,
    capture,
    describe,
    edit,
    suspend,
)
from nicehooks.hookpoints import HookedMethods, HookedRootModule, HookPoint, hooked

MLP = "blocks.0.hook_mlp_out"
POST = "blocks.1.hook_resid_post"
Z = "blocks.1.attn.hook_z"


def double(value, hook):
    return value * 2


def zero(value, hook):
    return value * 0


def look(value, hook):
    return None


def names_of(point):
    return [handle.hook.hook.__name__ for handle in point.fwd_hooks]


@pytest.fixture
def model():
    return toy()


@pytest.fixture
def clean(model):
    return model(inputs())


# --- one hook point ---------------------------------------------------------------------------------------------------


def test_a_hook_point_is_the_identity_and_has_nothing_to_begin_with():
    point, x = HookPoint(), torch.ones(3)
    assert point(x) is x
    assert (point.name, point.ctx, point.fwd_hooks, point.bwd_hooks) == (None, {}, [], [])
    assert not point.has_hooks()


def test_hooks_are_told_their_point_and_none_leaves_the_value():
    point, told = HookPoint(), []
    point.name = "blocks.3.hook_x"
    point.add_hook(lambda value, hook: told.append((value.sum().item(), hook, hook.layer())))
    assert point(torch.ones(2)).tolist() == [1.0, 1.0]
    assert told == [(2.0, point, 3)]


def test_what_a_hook_returns_is_assigned_and_hooks_act_in_order():
    point = HookPoint()
    point.add_hook(lambda value, hook: value + 1)
    point.add_hook(double)
    assert point(torch.ones(2)).tolist() == [4.0, 4.0]
    point.remove_hooks()
    point.add_hook(lambda value, hook: 7.0)
    assert point(torch.ones(2)).tolist() == [7.0, 7.0]


def test_prepend_acts_before_all_that_is_there():
    point = HookPoint()
    for name in ("a", "b", "c"):
        point.add_hook(
            lambda value, hook, name=name: hook.ctx.setdefault("order", []).append(name), prepend=name != "a"
        )
    with edit(point, "", lambda value: point.ctx["order"].append("edit")):
        point.add_hook(lambda value, hook: hook.ctx.update(order=["first"]), prepend=True)
        point(torch.ones(1))
    assert point.ctx["order"] == ["first", "c", "b", "a", "edit"]


def test_what_is_prepended_inside_suspend_acts():
    point = HookPoint()
    point.add_hook(zero)
    with suspend(point):
        point.add_hook(lambda value, hook: value + 1, prepend=True)
        assert point(torch.ones(1)).item() == 2.0
    assert point(torch.ones(1)).item() == 1.0  # the other one acts again, and came first


def test_a_backward_hook_gets_the_gradient_itself_and_replaces_it():
    x, seen = torch.ones(2, requires_grad=True), []
    point = HookPoint()
    point.add_hook(lambda grad, hook: seen.append((grad.tolist(), hook.name)), dir="bwd")
    point.add_hook(lambda grad, hook: grad * 5, dir="bwd")
    point.add_hook(lambda grad, hook: (grad + 1,), dir="bwd")
    (point(x) * 3).sum().backward()
    assert seen == [([3.0, 3.0], None)]
    assert x.grad.tolist() == [16.0, 16.0]


def test_a_backward_hook_sees_the_use_at_its_point_alone():
    x, seen = torch.ones(1, requires_grad=True), []
    point = HookPoint()
    point.add_hook(lambda grad, hook: seen.append(grad.item()), dir="bwd")
    (x * 10 + point(x) * 3).sum().backward()
    assert seen == [3.0]
    assert x.grad.item() == 13.0


def test_a_removed_backward_hook_does_not_act_on_a_graph_that_is_there():
    x, point = torch.ones(1, requires_grad=True), HookPoint()
    point.add_hook(double, dir="bwd")
    point.add_hook(look, dir="bwd")
    out = point(x)
    with pytest.warns(NotReachedWarning, match="no gradient came by"):
        point.bwd_hooks[0].hook.remove()
    out.sum().backward()
    assert x.grad.item() == 1.0


@pytest.mark.parametrize("call", ["add_hook", "add_perma_hook"])
def test_a_wrong_direction_is_a_value_error(call):
    point = HookPoint()
    with pytest.raises(ValueError, match=r"dir='both': it is 'fwd' \(the value\) or 'bwd' \(the gradient\)"):
        getattr(point, call)(look, dir="both")
    for method in (point.remove_hooks, point.has_hooks):
        with pytest.raises(ValueError, match="dir='up': it is 'fwd'"):
            method(dir="up")
    assert vars(point) == vars(HookPoint()) | {k: vars(point)[k] for k in ("_modules", "_parameters", "_buffers")}


def test_a_hook_is_a_function():
    with pytest.raises(TypeError, match="a hook is a function"):
        HookPoint().add_hook(3)


def test_permanent_hooks_and_levels():
    point = HookPoint()
    point.add_perma_hook(look)
    point.add_hook(double, level=2)
    point.add_hook(zero, dir="bwd")
    assert [(h.is_permanent, h.context_level) for h in point.fwd_hooks] == [(True, None), (False, 2)]
    assert point.has_hooks("fwd", including_permanent=False, level=2)
    assert not point.has_hooks("fwd", level=1)
    assert not point.has_hooks("bwd", level=2)
    point.remove_hooks("both", level=1)
    point.remove_hooks("both", including_permanent=True, level=1)
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (2, 1)
    point.remove_hooks()
    assert names_of(point) == ["look"] and len(point.bwd_hooks) == 1
    point.remove_hooks("both", including_permanent=True)
    assert not point.has_hooks()
    assert "forward" not in vars(point)


def test_aliases_are_the_names_that_a_hook_is_told():
    point, told = HookPoint(), []
    point.name, point.ctx["n"] = "hook_x", 1

    def add(value, hook):
        told.append((hook.name, hook.ctx["n"]))
        return value + hook.ctx["n"]

    point.add_hook(add, alias_names=["old_a", "old_b"])
    assert point(torch.zeros(1)).item() == 2.0
    assert told == [("old_a", 1), ("old_b", 1)]


def test_a_name_without_a_layer():
    point = HookPoint()
    point.name = "hook_embed"
    with pytest.raises(ValueError, match="'hook_embed' of this hook point has no number"):
        point.layer()


def test_clear_context():
    point = HookPoint()
    point.ctx["a"] = 1
    point.clear_context()
    assert point.ctx == {}


def test_a_value_that_does_not_fit_is_an_error_that_names_the_point(model):
    bad = [(MLP, lambda value, hook: value[:, :2])]
    with pytest.raises(TreeMismatch, match=r"hook at 'blocks.0.hook_mlp_out'.*does not broadcast"):
        model.run_with_hooks(inputs(), fwd_hooks=bad)


def test_trees_pass_through_a_point():
    point, x = HookPoint(), torch.ones(2, requires_grad=True)
    tree, seen = Pair(x * 1, [x * 2, None]), []
    point.name = "hook_tree"
    point.add_hook(lambda value, hook: Pair(nicehooks.KEEP, [value.right[0] * 10, None]))
    point.add_hook(lambda grad, hook: seen.append((hook.name, grad.tolist())), dir="bwd")
    out = point(tree)
    assert type(out) is Pair and out.right[0].tolist() == [20.0, 20.0] and out.right[1] is None
    (out.left.sum() + out.right[0].sum()).backward()
    assert sorted(seen) == [("hook_tree[0]", [1.0, 1.0]), ("hook_tree[1][0]", [1.0, 1.0])]


# --- a model with hook points -----------------------------------------------------------------------------------------


def test_setup_names_everything(model):
    assert list(model.mod_dict) == [name for name, _ in model.named_modules() if name]
    assert all(module.name == name for name, module in model.mod_dict.items())
    assert list(model.hook_dict) == [name for name, m in model.named_modules() if isinstance(m, HookPoint)]
    assert list(model.hook_points()) == list(model.hook_dict.values())


def test_run_with_hooks_acts_once_and_leaves_nothing(model, clean):
    before = state(model)
    out = model.run_with_hooks(inputs(), fwd_hooks=[(MLP, zero), (lambda name: name.endswith("hook_z"), zero)])
    with ablate(model, MLP, "blocks.*.attn.hook_z"):
        assert same(out, model(inputs()))
    assert not same(out, clean)
    assert same(model(inputs()), clean)
    assert [entry[:4] for entry in state(model)] == [entry[:4] for entry in before]


def test_the_cache_has_the_models_own_values_in_order(model):
    with capture(model, HookPoint) as acts:
        model(inputs())
    out, cache = model.run_with_cache(inputs())
    assert isinstance(cache, ActivationCache)
    assert list(cache) == list(acts)
    assert "blocks.0.hook_never" not in cache
    assert all(same(cache[name], acts[name]) for name in acts)
    assert all(value.grad_fn is not None for value in cache.values())
    assert same(out, model(inputs()))


@pytest.mark.parametrize(
    "names_filter",
    [MLP, [MLP], (MLP, MLP), {MLP}, lambda name: name == MLP],
    ids=["string", "list", "tuple", "set", "predicate"],
)
def test_names_filter(model, names_filter):
    assert list(model.run_with_cache(inputs(), names_filter=names_filter)[1]) == [MLP]


def test_gradients_have_names_of_their_own(model):
    loss, cache = model.run_with_cache(inputs(), return_type="loss", incl_bwd=True)
    names = [name for name in model.hook_dict if "never" not in name]
    assert sorted(cache) == sorted([*names, *(f"{name}_grad" for name in names)])
    with capture(model, f"{POST}@grad", MLP + "@grad") as grads:
        model(inputs(), return_type="loss").backward()
    assert same(cache[POST + "_grad"], grads[POST + "@grad"])
    assert same(cache[MLP + "_grad"], grads[MLP + "@grad"])
    assert loss.ndim == 0


@pytest.mark.parametrize(
    ("pos_slice", "kept"),
    [
        (None, [0, 1, 2, 3, 4]),
        (2, [2]),
        (-1, [4]),
        ((3,), [0, 1, 2]),
        ((1, 3), [1, 2]),
        ((0, 5, 2), [0, 2, 4]),
        (slice(-2, None), [3, 4]),
        ([0, 3, 3], [0, 3, 3]),
        (torch.tensor([4, 0]), [4, 0]),
    ],
)
def test_pos_slice_takes_positions(model, pos_slice, kept):
    _, whole = model.run_with_cache(inputs())
    _, cache = model.run_with_cache(inputs(), pos_slice=pos_slice)
    assert same(cache[POST], whole[POST][:, kept])
    for name in ("hook_q", "hook_k", "hook_v", "hook_z"):
        assert same(cache[f"blocks.0.attn.{name}"], whole[f"blocks.0.attn.{name}"][:, kept])
    pattern = "blocks.0.attn.hook_pattern"
    assert same(cache[pattern], whole[pattern][:, :, kept])  # [batch, head, query, key]


def test_a_position_that_is_not_there_is_an_error(model):
    for pos_slice in (5, -6, [0, 5]):
        with pytest.raises(TreeMismatch, match=r"is not within the dimension -2 of Tensor\[3, 5, 8\]"):
            model.run_with_cache(inputs(), pos_slice=pos_slice)
    assert not model.list_hooks()


@pytest.mark.parametrize("pos_slice", ["1", 1.0, True, [0.5], [True], {}, (1, 2, 3, 4), slice(None, None, -1)])
def test_what_is_no_pos_slice(model, pos_slice):
    with pytest.raises((TypeError, ValueError), match=r"^pos_slice="):
        model.run_with_cache(inputs(), pos_slice=pos_slice)


def test_remove_batch_dim(model):
    _, cache = model.run_with_cache(inputs(batch=1), remove_batch_dim=True, pos_slice=-1)
    assert cache[POST].shape == (1, 8) and cache[Z].shape == (1, 2, 4)
    with pytest.raises(TreeMismatch, match=r"takes one example, but 'hook_embed' is Tensor\[3, 5, 8\]"):
        model.run_with_cache(inputs(), remove_batch_dim=True)
    assert not model.list_hooks()


def test_device_and_detach(model):
    _, cache = model.run_with_cache(inputs(), names_filter=POST, device="meta", detach=True)
    assert cache[POST].device.type == "meta" and not cache[POST].requires_grad
    _, cache = model.run_with_cache(inputs(), names_filter=POST, detach=True)
    assert not cache[POST].requires_grad


def test_caching_hooks_by_hand(model):
    mine = {}
    cache, fwd, bwd = model.get_caching_hooks([MLP, POST], incl_bwd=True, cache=mine)
    assert cache is mine and [name for name, _ in fwd] == [name for name, _ in bwd] == [MLP, POST]
    assert not model.is_caching
    with model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
        assert model.is_caching
        model(inputs(), return_type="loss").backward()
    assert not model.is_caching
    assert list(mine) == [MLP, POST, POST + "_grad", MLP + "_grad"]


def test_names_of_a_predicate_are_one_wildcard(model):
    """So hook points that are never reached are fine beside those that are."""
    _, fwd, _ = model.get_caching_hooks(lambda name: "blocks.0" in name)
    assert "blocks.0.hook_never" in [name for name, _ in fwd]
    with model.hooks(fwd):
        model(inputs())


def test_add_caching_hooks_stays(model):
    cache = model.add_caching_hooks(names_filter=MLP)
    model(inputs())
    first = cache[MLP]
    model(inputs(batch=2))
    assert first.shape[0] == 3 and cache[MLP].shape[0] == 2 and model.is_caching
    model.reset_hooks()
    assert not model.is_caching


def test_deprecated_names_work_and_warn(model):
    everything, some = {}, {}
    with pytest.warns(DeprecationWarning, match="cache_all is deprecated"):
        model.cache_all(everything)
    with pytest.warns(DeprecationWarning, match="cache_some is deprecated"):
        model.cache_some(some, lambda name: name == MLP)
    model(inputs())
    assert MLP in everything and POST in everything and list(some) == [MLP]
    model.reset_hooks()


def test_add_hook_by_name_and_by_predicate(model, clean):
    model.add_hook(MLP, zero)
    model.add_hook(lambda name: name.endswith("hook_z"), look)
    model.add_perma_hook(POST, look)
    assert [(r.name, r.dir, r.hook, r.is_permanent, r.level) for r in model.list_hooks()] == [
        ("blocks.0.attn.hook_z", "fwd", look, False, None),
        (MLP, "fwd", zero, False, None),
        (Z, "fwd", look, False, None),
        (POST, "fwd", look, True, None),
    ]
    assert [r.name for r in model.list_hooks([MLP, POST], including_permanent=False)] == [MLP]
    assert model.list_hooks(dir="bwd") == []
    assert not same(model(inputs()), clean)
    model.reset_hooks()
    assert [r.name for r in model.list_hooks()] == [POST]
    assert same(model(inputs()), clean)
    model.remove_all_hook_fns(including_permanent=True)
    assert model.list_hooks() == [] and describe(model) == []
    assert "forward" not in vars(model) and "__nicehooks__" not in vars(model)


def test_one_point_of_a_predicate_can_be_removed(model):
    model.add_hook(lambda name: name.endswith("hook_z"), zero)
    model.hook_dict[Z].remove_hooks()
    assert [r.name for r in model.list_hooks()] == ["blocks.0.attn.hook_z"]
    assert "forward" not in vars(model.hook_dict[Z])
    model(inputs())
    model.reset_hooks()


def test_the_directions_of_reset_hooks(model):
    model.add_hook(MLP, double, dir="bwd")
    model.add_hook(MLP, double)
    model.hook_dict[MLP].ctx["kept"] = 1
    model.reset_hooks(direction="fwd", clear_contexts=False)
    assert [r.dir for r in model.list_hooks()] == ["bwd"]
    assert model.hook_dict[MLP].ctx == {"kept": 1}
    model.reset_hooks()
    assert model.list_hooks() == [] and model.hook_dict[MLP].ctx == {}


def test_checks_of_a_subclass_are_asked_before_anything_is_added():
    class Strict(Toy):
        def check_hooks_to_add(self, hook_point, hook_point_name, hook, dir="fwd", is_permanent=False, prepend=False):
            assert self.hook_dict[hook_point_name] is hook_point
            if "blocks.1" in hook_point_name:
                raise PermissionError(hook_point_name)

    model = Strict()
    model.check_and_add_hook(model.hook_dict[MLP], MLP, look)
    with pytest.raises(PermissionError):
        model.add_hook(lambda name: name.endswith("hook_z"), look)
    with pytest.raises(PermissionError):
        model.check_and_add_hook(model.hook_dict[POST], POST, look)
    assert [r.name for r in model.list_hooks()] == [MLP]


def test_a_hook_that_never_acted_is_told_when_it_is_removed(model):
    model.add_hook("blocks.0.hook_never", look)
    model(inputs())
    with pytest.warns(NotReachedWarning, match="'blocks.0.hook_never' was never reached"):
        model.reset_hooks()
    assert model.list_hooks() == []


def test_all_hooks_go_also_if_a_warning_is_an_error(model):
    for name in ("blocks.0.hook_never", MLP, "blocks.1.hook_never"):
        model.add_hook(name, look)
    model(inputs())
    with warnings.catch_warnings(), pytest.raises(NotReachedWarning):
        warnings.simplefilter("error")
        model.reset_hooks()
    assert model.list_hooks() == [] and "forward" not in vars(model)


# --- contexts and levels ----------------------------------------------------------------------------------------------


def test_nested_contexts_and_their_levels(model, clean):
    assert model.context_level == 0
    with model.hooks(fwd_hooks=[(MLP, double)]) as same_model:
        assert same_model is model and model.context_level == 1
        outer = model(inputs())
        with model.hooks(fwd_hooks=[(MLP, zero)]):
            assert [(r.hook, r.level) for r in model.list_hooks()] == [(double, 1), (zero, 2)]
            model(inputs())
        with model.hooks():
            assert model.context_level == 2
        assert same(model(inputs()), outer)
    assert model.context_level == 0
    assert same(model(inputs()), clean)


def test_a_context_that_fails_takes_its_own_level_along(model, clean):
    with model.hooks(fwd_hooks=[(MLP, double)]):
        outer = model(inputs())
        with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[(MLP, zero), (POST, lambda value, hook: 1 / 0)]):
            model(inputs())
        assert model.context_level == 1
        assert same(model(inputs()), outer)
    assert same(model(inputs()), clean)


def test_a_hook_of_the_level_of_a_context_ends_with_it(model):
    with model.hooks(fwd_hooks=[(MLP, look)]):
        model.add_hook(POST, double, level=model.context_level)
        model.hook_dict[Z].add_hook(double, level=1)
        model.add_hook(POST, zero)
        model(inputs())
        assert len(model.list_hooks()) == 4
    assert [r.hook for r in model.list_hooks()] == [zero]
    with model.hooks(reset_hooks_end=False):
        model.add_hook(POST, double, level=1)
        with model.hooks():
            model.add_hook(POST, look, level=2)
            model.add_hook(POST, look, level=7)  # of no context: it stays
            model(inputs())
        assert [(r.hook, r.level) for r in model.list_hooks()] == [(zero, None), (double, 1), (look, 7)]
    assert [(r.hook, r.level) for r in model.list_hooks()] == [(zero, None), (look, 7)]
    model.reset_hooks()


def test_reset_hooks_inside_a_context_removes_what_it_is_asked_for(model, clean):
    with model.hooks(fwd_hooks=[(MLP, zero)]):
        with model.hooks(fwd_hooks=[(POST, zero)]):
            model.reset_hooks(level=2)
            assert [r.level for r in model.list_hooks()] == [1]
        model.reset_hooks()
        assert same(model(inputs()), clean)


def test_one_hook_of_a_context_can_be_removed(model):
    """Before the run, and then it need not act; or between forward and backward, and then it does not."""
    grads = []
    with model.hooks(
        fwd_hooks=[("blocks.0.hook_never", look), (MLP, look)],
        bwd_hooks=[(MLP, lambda grad, hook: grads.append(1)), (POST, lambda grad, hook: grads.append(2))],
    ):
        model.hook_dict["blocks.0.hook_never"].remove_hooks()
        loss = model(inputs(), return_type="loss")
        model.hook_dict[MLP].bwd_hooks[0].hook.remove()
        loss.backward()
    assert grads == [2]


def test_clear_contexts_empties_what_hooks_wrote(model):
    def count(value, hook):
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1

    model.run_with_hooks(inputs(), fwd_hooks=[(MLP, count)])
    model.run_with_hooks(inputs(), fwd_hooks=[(MLP, count)])
    assert model.hook_dict[MLP].ctx == {"n": 2}
    model.run_with_hooks(inputs(), fwd_hooks=[(MLP, count)], clear_contexts=True)
    assert model.hook_dict[MLP].ctx == {}


def test_hooks_that_are_to_stay_do(model, clean):
    loss = model.run_with_hooks(
        inputs(), return_type="loss", bwd_hooks=[(MLP, lambda g, hook: hook.ctx.update(grad=g))], reset_hooks_end=False
    )
    loss.backward()
    assert model.hook_dict[MLP].ctx["grad"].shape == (3, 5, 8)
    assert [(r.name, r.dir, r.level) for r in model.list_hooks()] == [(MLP, "bwd", 1)]
    assert model.context_level == 0
    model.reset_hooks()
    assert model.list_hooks() == []


def test_hooks_that_are_to_stay_do_not_after_an_error(model):
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(inputs(), fwd_hooks=[(MLP, lambda value, hook: 1 / 0)], reset_hooks_end=False)
    assert model.list_hooks() == []


def test_a_context_without_a_run_warns(model):
    with pytest.warns(NotCalledWarning, match=r"hooks\('blocks.0.hook_mlp_out'\) was left"):
        with model.hooks(fwd_hooks=[(MLP, look)]):
            pass


def test_a_backward_hook_without_a_backward_is_an_error_in_a_context(model):
    with pytest.raises(SiteNotReached, match="Run backward inside the context"):
        with model.hooks(bwd_hooks=[(MLP, look)]):
            model(inputs())


# --- worlds -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def grouped():
    """What the worlds map over: they take the first rows of a batch of batches."""
    return inputs(batch=12).reshape(4, 3, 5, 4)


def test_hooks_act_in_every_world(model, world):
    def shift(value, hook):
        return value.sin() + 1

    def by_hooks(x):
        return model.run_with_hooks(x, fwd_hooks=[(MLP, shift), (lambda name: name == Z, double)])

    def by_edits(x):
        with edit(model, MLP, lambda v: v.sin() + 1), edit(model, Z, lambda v: v * 2):
            return model(x)

    out = world(by_hooks, grouped())
    assert same(out, world(by_edits, grouped()))
    assert not same(out, world(model, grouped()))


def test_caches_hold_live_values_in_every_world(model, world):
    def by_cache(x):
        out, cache = model.run_with_cache(x, names_filter=[MLP, Z], pos_slice=slice(1, 3))
        return out.sum() + cache[MLP].square().sum() + cache[Z].sum()

    def by_capture(x):
        with capture(model, MLP, Z) as acts:
            out = model(x)
        return out.sum() + acts[MLP][..., 1:3, :].square().sum() + acts[Z][..., 1:3, :, :].sum()

    assert same(world(by_cache, grouped()), world(by_capture, grouped()))


def test_a_cache_from_outside_of_vmap_has_the_full_batch(model):
    cache, fwd, _ = model.get_caching_hooks([MLP, Z], pos_slice=-1)
    with model.hooks(fwd):
        torch.vmap(model)(inputs())
    _, expected = model.run_with_cache(inputs(), names_filter=[MLP, Z], pos_slice=-1)
    assert all(torch.allclose(cache[name], expected[name], atol=1e-6) for name in expected)


def test_a_gradient_per_example(model):
    """Backward hooks act under `torch.func`, where those of modules raise."""

    def gradient(x):
        seen = {}
        with model.hooks(bwd_hooks=[(MLP, lambda grad, hook: seen.update({hook.name: grad}))]):
            torch.func.grad(lambda x: model(x, return_type="loss"))(x)
        return seen[MLP]

    found = torch.stack([gradient(row) for row in inputs()])
    cache = {}
    with model.hooks(bwd_hooks=[(MLP, lambda grad, hook: cache.update(grad=grad))]):
        torch.stack([model(row, return_type="loss") for row in inputs()])  # three calls, three graphs
        torch.vmap(torch.func.grad(lambda x: model(x, return_type="loss")))(inputs())
    assert found.shape == (3, 5, 8)
    assert torch.isfinite(found).all() and found.any()


def test_gradients_flow_through_a_cache(model):
    """The caches of others are detached always, and what is computed from them has a gradient of zero, silently."""
    x = inputs().requires_grad_()
    _, cache = model.run_with_cache(x, names_filter=MLP)
    cache[MLP].square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_model_sees_hooks_and_compiles_nothing_again(model, clean, fresh_dynamo):
    run = torch.compile(model, fullgraph=True, backend="eager")
    assert same(run(inputs()), clean)
    counts = []
    for _ in range(3):
        vector = torch.randn(8)

        def steer(value, hook, vector=vector):
            return value + vector * (hook.layer() + 1)

        cache, fwd, _ = model.get_caching_hooks(lambda name: name.endswith("hook_z"), pos_slice=-1)
        with model.hooks(fwd_hooks=[(POST, steer), *fwd]):
            out = run(inputs())
            seen = dict(cache)
            assert torch.allclose(out, model(inputs()), atol=1e-6)
        assert list(seen) == ["blocks.0.attn.hook_z", Z] and seen[Z].shape == (3, 1, 2, 4)
        assert all(torch.allclose(seen[name], cache[name], atol=1e-6) for name in seen)
        assert same(run(inputs()), clean)
        counts.append(graphs())
    assert counts == [2, 2, 2]


def test_a_compiled_model_sees_attached_hooks_and_their_context(model, clean, fresh_dynamo):
    run = torch.compile(model, fullgraph=True, backend="eager")
    model.add_hook(MLP, lambda value, hook: hook.ctx.update(mean=value.mean()))
    model.hook_dict[MLP].add_hook(zero, prepend=True)
    out = run(inputs())
    assert model.hook_dict[MLP].ctx["mean"].item() == 0.0
    assert torch.allclose(out, model.run_with_hooks(inputs(), fwd_hooks=[(MLP, look)]), atol=1e-6)
    model.reset_hooks()
    assert same(run(inputs()), clean)


def test_scoped_hooks_act_in_their_own_thread_and_attached_ones_everywhere(model, clean):
    inside, outside, levels, barrier = [], [], [], threading.Barrier(2)

    def work(value):
        with model.hooks(fwd_hooks=[(POST, lambda old, hook: old * 0 + value)]):
            barrier.wait()
            levels.append((model.context_level, len(model.list_hooks())))
            inside.append((value, model(inputs())))
            barrier.wait()

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert levels == [(1, 1), (1, 1)]
    for value, out in inside:
        with edit(model, POST, lambda old, value=value: old * 0 + value):
            assert same(out, model(inputs()))
    with model.hooks(fwd_hooks=[(POST, zero)]):
        model(inputs())
        thread = threading.Thread(target=lambda: outside.append((model(inputs()), model.reset_hooks())))
        thread.start()
        thread.join()
        assert [r.hook for r in model.list_hooks()] == [zero]
    assert same(outside[0][0], clean)
    model.add_hook(POST, zero)
    thread = threading.Thread(target=lambda: outside.append(model(inputs())))
    thread.start()
    thread.join()
    assert not same(outside[1], clean)
    model.reset_hooks()


def test_a_checkpointed_region_is_cached_once():
    class Recomputed(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), HookPoint(), nn.Tanh())
            self.setup()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False).sum()

    model, count = Recomputed(), []
    cache, fwd, _ = model.get_caching_hooks("inner.1")
    with model.hooks([*fwd, ("inner.1", lambda value, hook: count.append(1))]):
        loss = model(torch.ones(2, 4))
        first = cache["inner.1"]
        loss.backward()
        assert cache["inner.1"] is first and len(count) == 2


# --- ownership, copies, memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_clean_models(model, clean, how):
    model.add_hook(MLP, zero)
    model.hook_dict[POST].add_hook(zero)
    with model.hooks(fwd_hooks=[(Z, zero)]):
        other = how(model)
        model(inputs())
    assert type(other) is Toy and other.list_hooks() == [] and describe(other) == []
    assert same(other(inputs()), clean) and "__nicehooks__" not in vars(other)
    assert other.hook_dict[MLP] is dict(other.named_modules())[MLP]
    assert len(model.list_hooks()) == 2
    model.reset_hooks()


def test_a_saved_model_with_hooks_is_loaded_without(model, clean):
    model.add_hook(MLP, zero)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)(inputs()), clean)
    model.reset_hooks()


@pytest.mark.parametrize("of", ["point", "model", "view"])
def test_attached_hooks_keep_no_model_alive(of):
    model = toy()
    if of == "point":
        model.hook_dict[MLP].add_hook(double)
    else:
        (model if of == "model" else hooked(model)).add_hook(MLP, double)
    model(inputs())
    gone = weakref.ref(model), weakref.ref(model.hook_dict[MLP])
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_model_that_is_written_for_hook_points_has_no_trace_of_hooks(model):
    model.run_with_cache(inputs())
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


# --- any model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=11)
    return GPT2LMHeadModel(config).eval()


IDS = torch.tensor([[1, 2, 3, 4]])


def test_hooked_shows_every_module_and_parameter(gpt2):
    view = hooked(gpt2)
    assert "transformer.h.0.mlp" in view.hook_dict and "transformer.h.0.mlp.c_fc@weight" in view.hook_dict
    assert "transformer.h" not in view.hook_dict and "transformer.h" in view.mod_dict
    assert isinstance(view, HookedMethods) and not isinstance(view, nn.Module)
    assert repr(view) == f"hooked(GPT2LMHeadModel: {len(view.hook_dict)} hook points)"
    assert view.hook_dict["transformer.h.1.mlp"].layer() == 1
    assert same(view(IDS).logits, gpt2(IDS).logits)


def test_hooked_caches_by_name(gpt2):
    before = state(gpt2)
    out, cache = hooked(gpt2).run_with_cache(IDS, names_filter=lambda name: name.endswith("mlp"))
    assert list(cache) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    with capture(gpt2, "transformer.h.*.mlp") as acts:
        logits = gpt2(IDS).logits
    assert all(same(cache[name], acts[name]) for name in acts) and same(out.logits, logits)
    assert [entry[:4] for entry in state(gpt2)] == [entry[:4] for entry in before]


def test_hooked_caches_everything_but_parameters_by_default(gpt2):
    _, cache = hooked(gpt2).run_with_cache(IDS)
    with capture(gpt2) as acts:
        gpt2(IDS)
    assert list(cache) == list(acts)
    assert isinstance(cache["transformer.h.0.attn"], tuple)


def test_hooked_caches_and_changes_parameters(gpt2):
    weight = "transformer.h.0.mlp.c_fc@weight"
    clean = gpt2(IDS).logits
    _, cache = hooked(gpt2).run_with_cache(IDS, names_filter=weight)
    assert cache[weight] is gpt2.transformer.h[0].mlp.c_fc.weight
    place = hooked(gpt2).hook_dict[weight]
    place.add_hook(lambda value, hook: value * 0)
    assert place.has_hooks("fwd") and not hooked(gpt2).hook_dict["transformer.h.0.mlp.c_fc"].has_hooks()
    assert not same(gpt2(IDS).logits, clean)
    hooked(gpt2).reset_hooks()
    assert same(gpt2(IDS).logits, clean)
    with pytest.raises(UnsupportedModule, match="is a parameter, which has no gradient of one call"):
        place.add_hook(look, dir="bwd")


def test_hooked_sees_hooks_on_parametrized_weights():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    place = hooked(model).hook_dict["@weight"]
    place.add_hook(zero)
    assert place.has_hooks() and not (model(torch.ones(3)) - model.bias).any()
    place.remove_hooks()
    assert not place.has_hooks() and (model(torch.ones(3)) - model.bias).any()


def test_hooked_hands_tuples_to_hooks(gpt2):
    clean = gpt2(IDS).logits

    def without_attention(value, hook):
        assert isinstance(value, tuple)
        return (value[0] * 0, *value[1:])

    out = hooked(gpt2).run_with_hooks(IDS, fwd_hooks=[("transformer.h.0.attn", without_attention)]).logits
    with ablate(gpt2, "transformer.h.0.attn[0]"):
        assert same(out, gpt2(IDS).logits)
    assert not same(out, clean)


def test_hooked_gradients_of_parts(gpt2):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = gpt2

        def forward(self, ids):
            return self.model(ids, labels=ids).loss

    _, cache = hooked(Loss()).run_with_cache(
        IDS, names_filter=["model.transformer.h.0.attn", "model.transformer.h.0.mlp"], incl_bwd=True
    )
    assert sorted(cache) == [
        "model.transformer.h.0.attn",
        "model.transformer.h.0.attn[0]_grad",
        "model.transformer.h.0.mlp",
        "model.transformer.h.0.mlp_grad",
    ]
    assert cache["model.transformer.h.0.attn[0]_grad"].shape == (1, 4, 16)


def test_hooked_views_share_hooks_and_contexts(gpt2):
    hooked(gpt2).add_hook("transformer.h.0.mlp", lambda value, hook: hook.ctx.update(seen=value.shape))
    gpt2(IDS)
    assert hooked(gpt2).hook_dict["transformer.h.0.mlp"].ctx == {"seen": (1, 4, 16)}
    assert [r.name for r in hooked(gpt2).list_hooks()] == ["transformer.h.0.mlp"]
    hooked(gpt2).reset_hooks()
    assert hooked(gpt2).list_hooks() == [] and hooked(gpt2).hook_dict["transformer.h.0.mlp"].ctx == {}
    assert "forward" not in vars(gpt2)


def test_hooked_works_under_generate_compile_and_vmap(gpt2, fresh_dynamo):
    count = []
    with hooked(gpt2).hooks(fwd_hooks=[("transformer.h.0", lambda value, hook: count.append(1))]):
        gpt2.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(count) == 3
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4)
    run = torch.compile(model, fullgraph=True, backend="eager")
    with hooked(model).hooks(fwd_hooks=[("0", double)]):
        assert torch.allclose(run(x), model(x)) and torch.allclose(torch.vmap(model)(x), model(x), atol=1e-6)
        assert torch.allclose(run(x), (model[0](x)).tanh())


def test_hooked_around_a_compiled_model(model, clean, fresh_dynamo):
    run = torch.compile(model, fullgraph=True, backend="eager")
    out = hooked(run).run_with_hooks(inputs(), fwd_hooks=[(MLP, zero)])
    assert torch.allclose(out, model.run_with_hooks(inputs(), fwd_hooks=[(MLP, zero)]), atol=1e-6)
    hooked(run).add_hook(MLP, zero)
    assert torch.allclose(run(inputs()), out, atol=1e-6) and [r.hook for r in model.list_hooks()] == [zero]
    hooked(run).reset_hooks()
    assert torch.allclose(run(inputs()), clean, atol=1e-6) and "__nicehooks__" not in vars(model)


def test_hooked_reaches_what_a_fused_encoder_would_skip():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        _, cache = hooked(encoder).run_with_cache(torch.randn(2, 3, 8), names_filter="layers.0.linear1")
    assert cache["layers.0.linear1"].shape == (2, 3, 16)


def test_a_cached_value_that_is_overwritten_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    _, cache = hooked(model).run_with_cache(torch.ones(2, 4), names_filter="0")
    with pytest.raises(StaleActivation, match="'0'"):
        cache["0"]


def test_hooked_takes_a_module():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not function"):
        hooked(double)


def test_a_place_whose_model_is_gone_says_so():
    place = hooked(nn.Sequential(nn.ReLU())).hook_dict["0"]
    gc.collect()
    with pytest.raises(SiteNotFound, match="the model of the hook point '0' no longer exists"):
        place.add_hook(look)


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(scripted)
    with pytest.raises(UnsupportedModule, match="TorchScript"):
        hooked(model).run_with_cache(torch.ones(2), names_filter="0")


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
    assert model.list_hooks() == [] and model.context_level == 0 and "forward" not in vars(model)


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
    assert [(r.hook, r.level) for r in model.list_hooks()] == [(double, level), (look, level)]
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
        assert model.list_hooks() == [] and model.context_level == 0 and not model.is_caching
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


def test_backward_hooks_that_are_removed_before_backward_warn(model):
    seen = []
    with pytest.warns(NotReachedWarning, match="with model.hooks"):
        loss = model.run_with_hooks(
            inputs(), return_type="loss", bwd_hooks=[(MLP, lambda grad, hook: seen.append(grad))]
        )
    loss.backward()
    assert seen == []
    with model.hooks(bwd_hooks=[(MLP, lambda grad, hook: seen.append(grad))]):
        model(inputs(), return_type="loss").backward()
    assert len(seen) == 1


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


class Checks(Toy):
    def __init__(self):
        self.seen = []
        super().__init__()
        self.is_caching, self.context_level = False, 0  # plain attributes elsewhere

    def check_and_add_hook(self, hook_point, hook_point_name, hook, *args, **kwargs):
        self.seen.append((hook_point_name, hook, args, kwargs))
        super().check_and_add_hook(hook_point, hook_point_name, hook, *args, **kwargs)


def test_a_model_with_a_check_and_add_hook_of_its_own_is_asked():
    model = Checks()
    assert model.context_level == 0 and not model.is_caching
    model.add_hook(MLP, zero, prepend=True)
    model.add_hook(lambda name: name.endswith("hook_z"), look, dir="bwd", is_permanent=True)
    assert [name for name, *_ in model.seen] == [MLP, "blocks.0.attn.hook_z", Z]
    assert model.seen[0][3] == {"dir": "fwd", "is_permanent": False, "level": None, "prepend": True}
    assert [record.name for record in model.list_hooks()] == ["blocks.0.attn.hook_z", MLP, Z]


class OwnPoint(HookPoint):
    def __init__(self):
        super().__init__()
        self.added = []

    def add_hook(self, hook, dir="fwd", is_permanent=False, level=None, prepend=False, alias_names=None):
        self.added.append((dir, level))
        super().add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)


class WithOwnPoint(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.mine, self.plain = OwnPoint(), HookPoint()
        self.setup()

    def forward(self, x):
        return self.plain(self.mine(x) + 1)


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
    assert [(record.name, record.level) for record in model.list_hooks()] == [("mine", 1)]
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


class Pair2(nn.Module):
    def forward(self, x):
        return x, x


def test_the_advice_for_a_tuple_can_be_followed():
    model, x = nn.Sequential(Pair2()), torch.ones(2)
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
