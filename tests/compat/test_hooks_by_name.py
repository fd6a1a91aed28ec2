"""A model with hook points: running it with hooks or a cache, adding and listing hooks by name, levels of contexts."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo
from gallery.toy import MLP, POST, Toy, Z, inputs
from point_hooks import double, look, records, zero
from worlds import same, state

from nicehooks import (
    ActivationCache,
    NotCalledWarning,
    NotReachedWarning,
    SiteNotReached,
    TreeMismatch,
    ablate,
    capture,
    describe,
)
from nicehooks.hookpoints import HookPoint

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
    assert [(r.name, r.dir, r.hook, r.is_permanent, r.level) for r in records(model)] == [
        ("blocks.0.attn.hook_z", "fwd", look, False, None),
        (MLP, "fwd", zero, False, None),
        (Z, "fwd", look, False, None),
        (POST, "fwd", look, True, None),
    ]
    assert [r.name for r in records(model, [MLP, POST], including_permanent=False)] == [MLP]
    assert model.list_hooks(dir="bwd") == {}
    assert not same(model(inputs()), clean)
    model.reset_hooks()
    assert [r.name for r in records(model)] == [POST]
    assert same(model(inputs()), clean)
    model.remove_all_hook_fns(including_permanent=True)
    assert model.list_hooks() == {} and describe(model) == []
    assert "forward" not in vars(model) and "__nicehooks__" not in vars(model)


def test_one_point_of_a_predicate_can_be_removed(model):
    model.add_hook(lambda name: name.endswith("hook_z"), zero)
    model.hook_dict[Z].remove_hooks()
    assert [r.name for r in records(model)] == ["blocks.0.attn.hook_z"]
    assert "forward" not in vars(model.hook_dict[Z])
    model(inputs())
    model.reset_hooks()


def test_the_directions_of_reset_hooks(model):
    model.add_hook(MLP, double, dir="bwd")
    model.add_hook(MLP, double)
    model.hook_dict[MLP].ctx["kept"] = 1
    model.reset_hooks(direction="fwd", clear_contexts=False)
    assert [r.dir for r in records(model)] == ["bwd"]
    assert model.hook_dict[MLP].ctx == {"kept": 1}
    model.reset_hooks()
    assert model.list_hooks() == {} and model.hook_dict[MLP].ctx == {}


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
    assert [r.name for r in records(model)] == [MLP]


def test_a_hook_that_never_acted_is_told_when_it_is_removed(model):
    model.add_hook("blocks.0.hook_never", look)
    model(inputs())
    with pytest.warns(NotReachedWarning, match="'blocks.0.hook_never' was never reached"):
        model.reset_hooks()
    assert model.list_hooks() == {}


def test_all_hooks_go_also_if_a_warning_is_an_error(model):
    for name in ("blocks.0.hook_never", MLP, "blocks.1.hook_never"):
        model.add_hook(name, look)
    model(inputs())
    with warnings.catch_warnings(), pytest.raises(NotReachedWarning):
        warnings.simplefilter("error")
        model.reset_hooks()
    assert model.list_hooks() == {} and "forward" not in vars(model)


# --- contexts and levels ----------------------------------------------------------------------------------------------


def test_nested_contexts_and_their_levels(model, clean):
    assert model.context_level == 0
    with model.hooks(fwd_hooks=[(MLP, double)]) as same_model:
        assert same_model is model and model.context_level == 1
        outer = model(inputs())
        with model.hooks(fwd_hooks=[(MLP, zero)]):
            assert [(r.hook, r.level) for r in records(model)] == [(double, 1), (zero, 2)]
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
        assert len(records(model)) == 4
    assert [r.hook for r in records(model)] == [zero]
    with model.hooks(reset_hooks_end=False):
        model.add_hook(POST, double, level=1)
        with model.hooks():
            model.add_hook(POST, look, level=2)
            model.add_hook(POST, look, level=7)  # of no context: it stays
            model(inputs())
        assert [(r.hook, r.level) for r in records(model)] == [(zero, None), (double, 1), (look, 7)]
    assert [(r.hook, r.level) for r in records(model)] == [(zero, None), (look, 7)]
    model.reset_hooks()


def test_reset_hooks_inside_a_context_removes_what_it_is_asked_for(model, clean):
    with model.hooks(fwd_hooks=[(MLP, zero)]):
        with model.hooks(fwd_hooks=[(POST, zero)]):
            model.reset_hooks(level=2)
            assert [r.level for r in records(model)] == [1]
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
    assert [(r.name, r.dir, r.level) for r in records(model)] == [(MLP, "bwd", 1)]
    assert model.context_level == 0
    model.reset_hooks()
    assert model.list_hooks() == {}


def test_hooks_that_are_to_stay_do_not_after_an_error(model):
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(inputs(), fwd_hooks=[(MLP, lambda value, hook: 1 / 0)], reset_hooks_end=False)
    assert model.list_hooks() == {}


def test_a_context_without_a_run_warns(model):
    with pytest.warns(NotCalledWarning, match=r"hooks\('blocks.0.hook_mlp_out'\) was left"):
        with model.hooks(fwd_hooks=[(MLP, look)]):
            pass


def test_a_backward_hook_without_a_backward_is_an_error_in_a_context(model):
    with pytest.raises(SiteNotReached, match="Run backward inside the context"):
        with model.hooks(bwd_hooks=[(MLP, look)]):
            model(inputs())
