"""HookPoint: one hook point, and the hooks on it."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from gallery.toy import MLP, inputs
from gallery.values import Pair
from point_hooks import double, look, names_of, zero

import nicehooks
from nicehooks import (
    NotReachedWarning,
    SiteNotFound,
    TreeMismatch,
    edit,
    suspend,
)
from nicehooks.hookpoints import HookIntrospectionMixin, HookPoint


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


def test_a_hook_that_is_added_is_returned_as_it_is_listed():
    point = HookPoint()
    point.add_hook(zero)
    handle = point.add_hook(lambda value, hook: value + 1, level=None, alias_names=["one"])
    assert handle == point.fwd_hooks[1] and not handle.is_permanent and handle.context_level is None
    assert point(torch.ones(1)).item() == 1.0
    handle.hook.remove()
    assert [each.user_hook for each in point.fwd_hooks] == [zero] and point(torch.ones(1)).item() == 0.0
    backward = point.add_hook(double, dir="bwd")
    assert backward == point.bwd_hooks[0] and backward.dir == "bwd"
    backward.hook.remove()
    assert not point.bwd_hooks


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


def test_a_point_shows_its_name_and_how_many_hooks_act_on_it():
    point = HookPoint()
    assert repr(point) == "HookPoint()"
    point.name = "hook_x"
    point.add_hook(look)
    point.add_hook(double)
    point.add_hook(double, dir="bwd")
    assert repr(point) == "HookPoint(name='hook_x', 2 fwd, 1 bwd)"
    point.remove_hooks("both")
    assert repr(point) == "HookPoint(name='hook_x')"


def test_whatever_has_hook_points_by_name_can_list_their_hooks():
    class Holder(HookIntrospectionMixin):
        def __init__(self):
            self.hook_dict = {"a": HookPoint(), "b": HookPoint()}

    holder = Holder()
    holder.hook_dict["b"].add_hook(look)
    holder.hook_dict["b"].add_perma_hook(double, dir="bwd")
    (forward, backward) = holder.list_hooks()["b"]
    assert list(holder.list_hooks()) == ["b"] and holder.list_hooks(name_filter="a") == {}
    assert (forward.user_hook, forward.dir, forward.is_permanent) == (look, "fwd", False)
    assert (backward.user_hook, backward.dir, backward.is_permanent) == (double, "bwd", True)
    assert holder.list_hooks(dir="bwd", including_permanent=False) == {}
    with pytest.raises(SiteNotFound, match="no hook point 'c' in Holder"):
        holder.list_hooks(["a", "c"])
