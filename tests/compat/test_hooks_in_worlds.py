"""Hooks under transforms, in compiled code and in threads; and what copies and memory know of them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch._dynamo
from gallery.toy import MLP, POST, Toy, Z, inputs, toy
from point_hooks import double, look, records, zero
from torch import nn
from torch.func import grad
from torch.utils.checkpoint import checkpoint
from worlds import WORLDS, same

from nicehooks import (
    capture,
    describe,
    edit,
)
from nicehooks.hookpoints import HookedRootModule, HookPoint, hooked

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


@pytest.mark.parametrize(
    "options", [{"clone": True}, {"detach": True}, {"device": "cpu"}, {"clone": True, "pos_slice": -1}]
)
def test_copies_in_a_cache_from_outside_of_a_transform_outlive_it(model, options):
    """As those of `capture`: the copy is made outside, where it is no wrapper of the transform."""
    cache, fwd, _ = model.get_caching_hooks([MLP], **options)
    with model.hooks(fwd_hooks=fwd):
        grad(lambda x: model(x).sum())(inputs())
    _, expected = model.run_with_cache(inputs(), names_filter=[MLP], **options)
    assert torch.equal(cache[MLP] + 0, expected[MLP])


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
            levels.append((model.context_level, len(records(model))))
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
        assert [r.hook for r in records(model)] == [zero]
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
    assert type(other) is Toy and other.list_hooks() == {} and describe(other) == []
    assert same(other(inputs()), clean) and "__nicehooks__" not in vars(other)
    assert other.hook_dict[MLP] is dict(other.named_modules())[MLP]
    assert len(records(model)) == 2
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
