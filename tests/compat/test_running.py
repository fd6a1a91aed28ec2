"""`run`, and `expand_module_path`."""

from __future__ import annotations

import gc
import re
import threading
import weakref

import pytest
import torch
import torch._dynamo
from gallery.calling import Clash
from torch import nn
from worlds import WORLDS, inputs, same, unchanged

import nicehooks
from nicehooks import (
    ActivationCache,
    ContextMisuse,
    ModulePath,
    PathError,
    SiteNotFound,
    SiteNotReached,
    TreeMismatch,
    UnsupportedModule,
    capture,
    expand_module_path,
    run,
    select,
)

# --- run --------------------------------------------------------------------------------------------------------------


def test_without_options_it_is_a_call(net):
    assert torch.equal(run(net, inputs()), net(inputs()))
    assert torch.equal(run(net.two, inputs(), y=inputs(), scale=2.0)[0], net.two(inputs(), inputs(), scale=2.0)[0])


def test_all_activations_are_those_of_capture(net):
    result, acts = run(net, inputs(), return_activations=True)
    with capture(net) as expected:
        assert torch.equal(result, net(inputs()))
    assert type(acts) is ActivationCache
    assert list(acts) == list(expected) == ["first", "two.inner", "two", "relu", ""]
    assert all(same(acts[key], expected[key]) for key in acts)


@pytest.mark.parametrize("where", ["two.*", ["two.inner"], ModulePath.parse("two.inner"), nn.Linear, re.compile("inn")])
def test_some_activations(net, where):
    _, acts = run(net, inputs(), return_activations=where)
    assert list(acts) == [str(site) for site in select(net, where)]


@pytest.mark.parametrize("kind", [dict, ActivationCache])
def test_activations_replace_those_of_the_model(net, kind):
    result, acts = run(net, inputs(), with_activations=kind({"first[:, 1:3]": torch.ones(2)}), return_activations=True)
    expected = net.first(inputs())
    expected[:, 1:3] = 1
    assert torch.equal(acts["first"], expected)
    again, _ = run(net, -inputs(), with_activations=acts.select("two.inner"), return_activations=["first"])
    with nicehooks.patch(net, "two.inner", acts["two.inner"]):
        assert torch.equal(again, net(-inputs()))
    assert not torch.equal(again, result)


def test_patches_act_first_then_hooks_and_activations_show_both(net):
    seen = []

    def hook(module, path, args, output):
        seen.append(output)
        return output + 1

    _, acts = run(
        net,
        inputs(),
        with_activations={"first": 5.0},
        forward_hooks={"first": [hook, hook]},
        return_activations="first",
    )
    assert [value.unique().tolist() for value in seen] == [[5.0], [6.0]]
    assert acts["first"].unique().tolist() == [7.0]


def test_every_kind_of_hook_acts_in_this_run_alone(net):
    called = []

    def note(module, path, *rest):
        called.append((str(path), len(rest)))

    hooks = {"two": note}
    clean = unchanged(net)
    x = inputs().requires_grad_()
    out = run(
        net,
        x,
        forward_hooks=hooks,
        forward_pre_hooks=hooks,
        full_backward_hooks=hooks,
        full_backward_pre_hooks=hooks,
    )
    assert called == [("two", 1), ("two", 2)]
    assert clean()
    out.sum().backward()  # of what this run computed
    assert called[2:] == [("two", 1), ("two", 2)]
    net(x).sum().backward()
    assert len(called) == 4


def test_hooks_act_in_the_thread_of_the_run_alone(net):
    inside, done = threading.Event(), threading.Event()
    other = []

    def wait(module, path, args, output):
        inside.set()
        assert done.wait(10)
        return output * 0

    def work():
        assert inside.wait(10)
        other.append(net.first(inputs()))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    _, acts = run(net, inputs(), forward_hooks={"first": wait}, return_activations="first")
    thread.join()
    assert not acts["first"].any() and other[0].any()


def test_options_that_the_model_wants_too():
    clash, x = Clash(), inputs()
    with pytest.raises(ContextMisuse) as info:
        run(clash, x, return_activations=True)
    assert str(info.value) == (
        "'return_activations' is an option of run, and also a parameter of Clash.forward.\n"
        "  For the model:  run(model, …, model_kwargs={'return_activations': …})\n"
        "  For nicehooks:  use the contexts, with capture(model, …), patch(model, …):"
    )
    with pytest.raises(ContextMisuse, match="'model_kwargs' is an option of run"):
        run(clash, x, model_kwargs={"return_activations": 3})
    out = run(clash, x, model_kwargs={"return_activations": 3, "model_kwargs": 2}, model=5)
    assert torch.equal(out, clash(x, 3, 2, 5))
    out, acts = run(clash, x, return_activations=["inner"], model_kwargs={"return_activations": 3, "model_kwargs": 0})
    assert torch.equal(out, 3 * acts["inner"])


BAD = [
    ({"forward_hooks": [print]}, TypeError, r"run\(model, …, forward_hooks=…\) takes a dict from paths to hooks"),
    (
        {"forward_hooks": {"first": 3}},
        TypeError,
        r"forward_hooks=\{'first': …\}\) takes a function, or a list of them, not",
    ),
    ({"full_backward_hooks": {"first": [print, None]}}, TypeError, "full_backward_hooks=.* not NoneType"),
    (
        {"with_activations": torch.ones(3)},
        TypeError,
        "with_activations=…. takes a dict from paths to values, not Tensor",
    ),
    ({"model_kwargs": 3}, TypeError, "from names to values"),
    ({"forward_hooks": {"firts": print}}, SiteNotFound, "nearest names: first"),
    ({"with_activations": {"first": 1.0, "secnd": 1.0}}, SiteNotFound, "no module matches 'secnd'"),
    ({"return_activations": ["first", "secnd"]}, SiteNotFound, "no module matches 'secnd'"),
    ({"return_activations": []}, SiteNotFound, "empty list"),
    ({"forward_hooks": {"first[": print}}, PathError, "never closed"),
    ({"forward_hooks": {"first@input": print}}, UnsupportedModule, "edit.model, 'first@input', fn."),
    ({"with_activations": {"first": torch.ones(9)}}, TreeMismatch, "does not broadcast"),
]


@pytest.mark.parametrize(("options", "error", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(net, options, error, says):
    clean = unchanged(net)
    with pytest.raises(error, match=says):
        run(net, inputs(), **options)
    assert clean()


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match=r"run\(model, …\) takes a torch.nn.Module as model, not function"):
        run(lambda x: x, inputs(), return_activations=True)


class Broken(Exception):
    pass


def test_an_exception_in_a_hook_leaves_nothing(net):
    def broken(module, path, args, output):
        raise Broken

    clean = unchanged(net)
    with pytest.raises(Broken):
        run(
            net, inputs(), forward_hooks={"two.inner": broken}, with_activations={"first": 0.0}, return_activations=True
        )
    assert clean()


def test_a_site_that_the_run_does_not_come_by():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Lazy()
    for options in (
        {"forward_hooks": {"idle": print}},
        {"with_activations": {"idle": 0.0}},
        {"return_activations": "idle"},
    ):
        with pytest.raises(SiteNotReached, match="'idle' was never reached"):
            run(model, inputs(), **options)
    with pytest.raises(SiteNotReached, match="no gradient came by"), torch.no_grad():
        run(model, inputs(), full_backward_hooks={"used": print})


def test_nothing_keeps_an_activation_alive(net):
    _, acts = run(net, inputs(), forward_hooks={"two": lambda *_: None}, return_activations="relu")
    value = weakref.ref(acts["relu"])
    assert value() is not None
    del acts, _
    gc.collect()
    assert value() is None


@pytest.mark.parametrize("world", WORLDS)
def test_in_every_world_it_equals_the_contexts(net, world):
    if world == "autocast":
        net = net.to(torch.float32)
    f = WORLDS[world]

    def by_run(x):
        out, acts = run(
            net,
            x,
            with_activations={"first[..., 0]": 1.0},
            forward_hooks={"two.inner[..., 1]": lambda module, path, args, output: output + args[0].sum(-1)},
            forward_pre_hooks={"relu": lambda module, path, args: args[0] * 2},
            return_activations=["first", "relu"],
        )
        return out, acts["relu"]

    def by_hand(x):
        h = net.first(x)
        h = torch.cat([torch.ones_like(h[..., :1]), h[..., 1:]], -1)
        inner = net.two.inner(h)
        added = (inner[..., 1:2] + h.sum(-1, keepdim=True)).to(inner.dtype)
        inner = torch.cat([inner[..., :1], added, inner[..., 2:]], -1)
        left, right = inner * (h * 2) * 0.5, (h * 2).sin()
        relu = torch.relu(left * 2)
        return relu + right, relu

    for a, b in zip(
        torch.utils._pytree.tree_leaves(f(by_run, inputs())),
        torch.utils._pytree.tree_leaves(f(by_hand, inputs())),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


# --- expand_module_path -----------------------------------------------------------------------------------------------


def test_the_paths_that_a_pattern_selects(net):
    def shown(*args):
        return [str(path) for path, _ in expand_module_path(net, *args)]

    assert shown("*") == ["first", "two", "relu"]
    assert shown("{first,two.inner}[:, 0]") == ["first[:, 0]", "two.inner[:, 0]"]
    assert shown(nn.Linear) == ["first", "two.inner"]
    assert shown("first[*]") == ["first[*]"]
    assert shown("first[*]", torch.ones(2, 3)) == ["first[0]", "first[1]"]
    assert shown("*[*]", {"first": torch.ones(1), "two": (1, 2), "relu": torch.ones(1)}) == [
        "first[0]",
        "two[0]",
        "two[1]",
        "relu[0]",
    ]
    _, acts = run(net, inputs(), return_activations=True)
    assert shown("two[*][0, 2:]", acts) == ["two[0][0, 2:]", "two[1][0, 2:]"]
    assert all(isinstance(path, ModulePath) for path, _ in expand_module_path(net, True))
    assert [module for _, module in expand_module_path(net, "first")] == [net.first]
    with pytest.raises(SiteNotFound, match="nearest names"):
        shown("thw")
    with pytest.raises(SiteNotFound, match="'two' is not in this cache"):
        shown("two[*]", acts.select("first"))
    with pytest.raises(TreeMismatch, match=r"expand_module_path at 'first\[:, \*\]'"):
        shown("first[:, *]", torch.ones(2))
