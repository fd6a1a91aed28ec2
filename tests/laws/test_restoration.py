"""Law 2. After exit, however it came about, the model is what it was, and nothing keeps it or an activation alive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from functools import partial

import pytest
import torch
from gallery.methods import Attention
from gallery.plain import Adds, AddsTenfold, Mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from worlds import MODELS, inputs, make, same, state

from nicehooks import (
    ContextMisuse,
    NiceHooksError,
    NotReachedWarning,
    SiteNotFound,
    UnsupportedModule,
    ablate,
    capture,
    edit,
    patch,
    sites,
    steer,
    suspend,
)


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


CONTEXTS = {
    "capture": lambda model: capture(model, "**"),
    "capture all": lambda model: capture(model, "**", keep="all", clone=True),
    "capture input": lambda model: capture(model, "**@input"),
    "stop": lambda model: capture(model, "*", stop=True),
    "edit": lambda model: (
        edit(model, "**[..., 0]", lambda value: value * 2) if not has_trees(model) else edit(model, "inner", abs)
    ),
    "patch": lambda model: patch(model, "", 1.0),
    "weight": lambda model: ablate(model, "**@weight"),
    "suspend": suspend,
}


PLAIN = type(nn.Identity()._parameters)
"""What torch itself keeps parameters in."""


def has_trees(model):
    return type(model).__name__ == "Nested"


@pytest.fixture(params=CONTEXTS)
def context(request, model):
    return CONTEXTS[request.param](model)


def test_after_a_plain_exit(model, context):
    before = state(model)
    with context:
        model(inputs())
    assert state(model) == before


def test_after_several_entries(model, context):
    before = state(model)
    for _ in range(3):
        with context:
            model(inputs())
        assert state(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_in_the_body(model, context, error):
    before = state(model)
    with pytest.raises(error), context:
        raise error
    assert state(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_the_model(context, model, error):
    leaf = [module for module in model.modules() if isinstance(module, nn.Linear | nn.LayerNorm)][-1]

    def fail(*args):
        raise error

    handle = leaf.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(error), context:
        model(inputs())
        if type(context).__name__ in ("capture", "suspend"):
            raise error  # with stop=True the failing module may never be called
    assert state(model) == before
    handle.remove()
    assert model(inputs()) is not None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_the_users_function(model, error):
    def fail(value):
        raise error

    for context in (edit(model, "**", fail), capture(model, "**", map=fail), edit(model, "**@weight", fail)):
        before = state(model)
        with pytest.raises(error), context:
            model(inputs())
        assert state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(12))
def test_after_an_error_half_way_through_entering(monkeypatch, error, at):
    """Wherever in entering it happens, what was done is undone."""
    model = make("Mlp")
    before = state(model)
    count = 0

    def fail_later(original):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise error
            return original(*args, **kwargs)

        return step

    from nicehooks.contexts import intervention
    from nicehooks.core import sessions, tap
    from nicehooks.ports import weights

    with monkeypatch.context() as patched:
        patched.setattr(weights, "stand_in", fail_later(weights.stand_in))
        patched.setattr(intervention, "bind", fail_later(intervention.bind))
        patched.setattr(tap, "tap_of", fail_later(tap.tap_of))
        patched.setattr(sessions, "begin", fail_later(sessions.begin))
        entered = False
        try:
            with ablate(model, "**@weight"):
                entered = True
                raise error
        except error:
            pass
    assert state(model) == before
    with capture(model, "**") as acts:
        model(inputs())
    assert len(acts) == 12
    assert entered == (at == 0 or count < at or not at)


def test_after_a_path_that_matches_nothing():
    model = make("Mlp")
    before = state(model)
    with pytest.raises(SiteNotFound), capture(model, "head", "nowhere"):
        pass
    assert state(model) == before


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(5)), st.permutations(range(5)))
def test_handles_may_be_removed_in_any_order(entering, leaving):
    model = make("Mlp")
    clean = model(inputs())
    before = state(model)
    handles = [
        ablate(model, "blocks.1"),
        steer(model, "embed", torch.ones(6)),
        edit(model, "head@input[0]", lambda value: value * 2),
        patch(model, "head@bias", 1.0),
        capture(model, "**"),
    ]
    for number in entering:
        assert handles[number].attach() is handles[number]
        handles[number].attach()
    model(inputs())
    for number in leaving:
        handles[number].remove()
        handles[number].remove()
    assert state(model) == before
    assert same(model(inputs()), clean)


def test_the_same_object_twice():
    model = make("Mlp")
    context = capture(model, "head")
    with context as first:
        model(inputs())
        with pytest.raises(ContextMisuse, match="active already"), context:
            pass
        with pytest.raises(ContextMisuse):
            context.attach()
        model(inputs())
    with context as second:
        model(inputs())
    assert first is not second
    assert list(first) == list(second) == ["head"]
    with context.attach() and pytest.raises(ContextMisuse), context:
        pass
    context.remove()


@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "save"])
def test_a_copy_made_inside_is_clean(copying):
    model = make("Mlp")
    clean, weights = model(inputs()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ablate(model, "**"), patch(model, "head@weight", 3.0), capture(model, "**"):
        assert not same(model(inputs()), clean)
        if copying == "deepcopy":
            twin = copy.deepcopy(model)
        elif copying == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        part = copy.deepcopy(model.blocks)
    assert same(twin(inputs()), clean)
    assert same(dict(twin.state_dict()), weights)
    for module in (*twin.modules(), *part.modules()):
        assert "forward" not in vars(module)
        assert "__reduce_ex__" not in vars(module)
        assert type(module._parameters) is type(module._buffers) is PLAIN


def test_the_model_may_change_inside():
    model = make("Mlp")
    other = make("Mlp")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    with patch(model, "embed@bias", 1.0), capture(model, "embed") as acts:
        model.to(torch.float64)
        model(inputs().double())
        assert acts["embed"].dtype == torch.float64
        model.to(torch.float32)
        model.load_state_dict(other.state_dict())
        model.eval()
        assert not model.embed.training
        model.train()
        assert not torch.equal(model(inputs()), other(inputs()))
    assert torch.equal(model(inputs()), other(inputs()))
    with patch(model, "embed@weight", 1.0):
        model.embed.weight = nn.Parameter(torch.zeros(6, 4))
        model.embed.register_buffer("extra", torch.ones(1))
        model(inputs())
    assert not model.embed.weight.any()
    assert type(model.embed._parameters) is PLAIN
    assert "extra" in model.embed._buffers


def test_a_forward_in_the_instance_is_called_and_comes_back():
    model = make("Mlp")
    calls = []

    def own(x):
        calls.append(x)
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], 6)

    model.embed.forward = own
    clean = model(inputs())
    before = state(model)
    with capture(model, "**", "embed@input[0]", "embed@input['x']") as acts:
        assert same(model(inputs()), clean)
    assert len(calls) == 2
    assert torch.equal(acts["embed@input[0]"], inputs())
    assert state(model) == before
    assert model.embed.forward is own


def test_a_forward_rebound_by_somebody_else_inside_stays():
    model = make("Mlp")
    clean = model(inputs())
    with steer(model, "embed", torch.ones(6)):
        inner = model.embed.forward

        def outer(x):
            return inner(x) * 2

        model.embed.forward = outer
        model(inputs())
    assert model.embed.forward is outer
    assert torch.equal(model.embed(inputs()), nn.functional.linear(inputs(), model.embed.weight, model.embed.bias) * 2)
    with capture(model, "embed") as acts:
        model(inputs())
    assert torch.equal(acts["embed"], model.embed(inputs()))
    model.embed.forward = inner
    assert same(model(inputs()), clean)


def test_a_forward_of_ours_that_somebody_puts_back_later_is_in_no_copy():
    model = make("Mlp")
    before, clean = state(model), model(inputs())
    with steer(model, "embed", torch.ones(6)):
        model.embed.forward = partial(lambda inner, x: inner(x) * 2, inner := model.embed.forward)
        model(inputs())
    model.embed.forward = inner
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(copied(inputs()), clean) and "forward" not in vars(copied.embed)
        with torch.no_grad():
            copied.embed.weight.zero_(), copied.embed.bias.zero_()
        assert not copied.embed(inputs()).any()
    with capture(model, "embed"):
        model(inputs())
        assert "forward" not in vars(copy.deepcopy(model).embed)
    del model.embed.forward, inner
    gc.collect()
    assert state(model) == before


def test_a_forward_that_takes_the_place_of_ours_leaves_nothing_of_ours():
    model = make("Mlp")
    before = state(model)
    handle = steer(model, "embed", torch.ones(6)).attach()
    model.embed.forward = lambda x: x.new_zeros(*x.shape[:-1], 6)
    model(inputs())
    with pytest.warns(NotReachedWarning):
        handle.remove()
    del model.embed.forward
    assert state(model) == before


def test_the_users_hooks_keep_firing_after_ours():
    model = make("Mlp")
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(out))
    model.embed.register_forward_pre_hook(lambda module, args: seen.append("before"))
    with ablate(model, "embed"):
        model(inputs())
    assert seen[0] == "before"
    assert not seen[1].any()


def test_a_forward_that_is_no_ordinary_method():
    class Static(nn.Module):
        @staticmethod
        def forward(x, scale=2):
            return x * scale

    class OfClass(nn.Module):
        @classmethod
        def forward(cls, x, scale=2):
            return x * scale

    class Made(nn.Module):
        @property
        def forward(self):  # pyright: ignore[reportIncompatibleMethodOverride]
            return lambda x, scale=2: x * scale

    with pytest.raises(UnsupportedModule, match="forward is a property of Made"), capture(nn.Sequential(Made()), "0"):
        pytest.fail("entered")
    for kind in (Static, OfClass):
        model = nn.Sequential(kind())
        before = state(model)
        with capture(model, "0", "0@input[0]") as acts, steer(model, "0", torch.ones(4)):
            assert torch.equal(model(inputs()), inputs() * 2 + 1)
        assert torch.equal(acts["0"], inputs() * 2) and torch.equal(acts["0@input[0]"], inputs())
        assert state(model) == before


def test_the_signature_of_forward_stays():
    import inspect

    model = make("Normed")
    before = inspect.signature(model.gate.forward)
    with capture(model, "gate"):
        assert inspect.signature(model.gate.forward) == before
        model(inputs())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_no_cycle_keeps_the_model_or_an_activation(context, model):
    if isinstance(context, capture):
        with context as acts:
            model(inputs())
        last = (
            weakref.ref(list(acts.values())[-1])
            if isinstance(list(acts.values())[-1], torch.Tensor)
            else weakref.ref(acts)
        )
        del acts
        assert last() is None
    else:
        with context:
            model(inputs())


def models_without_cycles():
    return ["Mlp", "Nested"]


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_model_goes_with_its_last_name(kind):
    model = make("Mlp")
    gone = weakref.ref(model)
    with CONTEXTS[kind](model) as acts:
        model(inputs())
    del model, acts
    assert gone() is None


@pytest.mark.usefixtures("no_gc")
def test_a_forgotten_handle_keeps_nothing_alive():
    model = make("Mlp")
    gone = weakref.ref(model)
    handle = capture(model, "**", "head@input[0]").attach()
    model(inputs())
    seen = weakref.ref(handle.cache["head"])
    del model, handle
    assert gone() is None
    assert seen() is None


@pytest.mark.usefixtures("no_gc")
def test_an_error_in_the_forward_leaves_no_cycle():
    model = make("Mlp")
    gone = weakref.ref(model)
    with pytest.raises(NiceHooksError), patch(model, "embed", torch.ones(7)):
        model(inputs())
    del model
    import sys

    sys.last_value = sys.last_traceback = None
    gc.collect()  # pytest keeps the traceback of the error itself
    assert gone() is None or isinstance(gone(), Mlp)


def test_removing_a_handle_whose_site_was_not_reached_warns():
    model = nn.MultiheadAttention(4, 2)
    handle = capture(model, "out_proj").attach()
    model(inputs(), inputs(), inputs())
    with pytest.warns(NotReachedWarning, match="never reached"):
        handle.remove()


@pytest.mark.parametrize("make", [lambda m: capture(m, "0"), lambda m: edit(m, "0", lambda value: value)])
def test_an_instance_that_becomes_one_of_another_class_runs_the_forward_of_that(make):
    model = nn.Sequential(Adds(1), nn.Identity())
    with make(model):
        assert model(torch.zeros(1)) == 1
        model[0].__class__ = AddsTenfold
        assert model(torch.zeros(1)) == model(torch.zeros(1)) == 10
    assert model(torch.zeros(1)) == 10


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("way", ["a call of a method is edited", "all calls are listed"])
def test_no_cycle_leads_through_a_method_of_the_model(way):
    model, seen = Attention(), []
    model.proj.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    if way == "all calls are listed":
        sites(model, inputs(), calls=True)
    else:
        with edit(model, "@mix()", lambda value: value + 1):
            seen.append(weakref.ref(model(inputs())))
    assert len(seen) > 0 and all(reference() is None for reference in seen)
