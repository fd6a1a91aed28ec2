"""auto_hook: hook points for any class or model, which stays what it is."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from gallery.hooked import (
    AutoencoderWithPoints,
    Decorated,
    HoldsParameters,
    ReturnsAllSorts,
    ShiftedBlock,
    Taken,
    Undecorated,
)
from gallery.parameters import Autoencoder
from point_hooks import records
from torch import nn
from torch.func import functional_call, grad, vmap
from worlds import inputs, same, state, total

from nicehooks import SiteNotFound, SiteNotReached, TreeMismatch, UnsupportedModule, capture
from nicehooks.hookpoints import HookPoint, auto_hook

NAMES = [
    "hook_point",
    "scale.hook_point",
    "layer.0.hook_point",
    "layer.0.shift.hook_point",
    "layer.0.fc.hook_point",
    "layer.1.hook_point",
    "layer.1.shift.hook_point",
    "layer.1.fc.hook_point",
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decorated()


@pytest.fixture(params=["class", "instance"])
def hooked(request):
    """A model of a decorated class; a decorated instance of a class that is not."""
    torch.manual_seed(0)
    model = Decorated()
    if request.param == "class":
        return model
    return auto_hook(Undecorated.of(model))


# --- names ------------------------------------------------------------------------------------------------------------


def test_hook_points_in_order_and_how_they_are_shown(hooked):
    assert list(hooked.hook_dict) == NAMES
    assert repr({name: hooked.hook_dict[name] for name in NAMES[:2]}.items()) == (
        "dict_items([('hook_point', HookPoint()), ('scale.hook_point', HookPoint())])"
    )
    assert isinstance(hooked.hook_dict, dict) and all(isinstance(p, HookPoint) for p in hooked.hook_points())
    assert [point.name for point in hooked.hook_points()] == NAMES
    assert not {id(module) for module in hooked.modules()} & {id(point) for point in hooked.hook_points()}
    assert hooked.hook_dict["layer.1.fc.hook_point"] is hooked.hook_dict["layer.1.fc.hook_point"]
    assert list(hooked.mod_dict) == [*(name for name, _ in hooked.named_modules() if name), *NAMES]
    assert hooked.mod_dict["scale.hook_point"] is hooked.hook_dict["scale.hook_point"]


def test_an_autoencoder_has_its_parameters_as_hook_points():
    autoencoder = auto_hook(Autoencoder())
    assert list(autoencoder.hook_dict) == [
        "hook_point",
        "W_enc.hook_point",
        "W_dec.hook_point",
        "b_enc.hook_point",
        "b_dec.hook_point",
    ]


def test_lists_of_parameters_and_what_is_torchs_own():
    model = auto_hook(HoldsParameters())
    expected = [
        "hook_point",
        "first.hook_point",
        "weights.0.hook_point",
        "by_name.up.hook_point",
        "odd.hook_point",
        "norm.hook_point",
    ]
    assert list(model.hook_dict) == expected
    assert (
        list(auto_hook(nn.DataParallel(HoldsParameters())).hook_dict) == expected
    )  # a wrapper is no module of its own
    with capture(model, "**"):  # what others have bound meanwhile changes nothing
        assert model.list_hooks() == {} and list(model.hook_dict) == expected
        model(inputs())
    seen = fired(model)
    assert sorted(seen) == sorted(expected)


def test_what_comes_after_construction_is_found(hooked):
    hooked.extra = ShiftedBlock()
    hooked.reset_hooks()
    assert list(hooked.hook_dict) == [*NAMES, "extra.hook_point", "extra.shift.hook_point", "extra.fc.hook_point"]
    hooked.layer[1].fc = nn.Linear(4, 4)
    before = hooked.hook_dict["layer.1.fc.hook_point"]
    hooked.add_hook("layer.1.fc.hook_point", lambda value, hook: value * 0)
    if "hook_dict" in vars(hooked):  # an instance looks again when a method is called
        assert hooked.hook_dict["layer.1.fc.hook_point"] is not before
    assert not hooked.layer[1].fc(inputs()).any()


def fired(model, x=None):
    seen = {}
    with model.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: seen.setdefault(hook.name, []).append(value))]):
        model(inputs() if x is None else x)
    return seen


# --- what the hooks see and do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_the_same_as_hook_points_written_by_hand(name):
    torch.manual_seed(0)
    plain = Autoencoder()
    by_hand, model, x = AutoencoderWithPoints(plain), auto_hook(plain), inputs()
    seen = [], []

    def note(into):
        return lambda value, hook: (into.append(value), value * 2 + len(into))[1]

    a = by_hand.run_with_hooks(x, fwd_hooks=[(f"{name}_hook_point", note(seen[0]))])
    b = model.run_with_hooks(x, fwd_hooks=[(f"{name}.hook_point", note(seen[1]))])
    assert torch.equal(a, b) and same(*seen) and len(seen[0]) == (2 if name == "b_dec" else 1)
    gradients = [], []
    with by_hand.hooks(bwd_hooks=[(f"{name}_hook_point", lambda g, hook: (gradients[0].append(g), g * 3)[1])]):
        total(by_hand(x)).backward()
    expected = {parameter: plain.get_parameter(parameter).grad.clone() for parameter in ("W_enc", "W_dec")}
    plain.zero_grad()
    with model.hooks(bwd_hooks=[(f"{name}.hook_point", lambda g, hook: (gradients[1].append(g), g * 3)[1])]):
        total(model(x)).backward()
    assert len(gradients[0]) == len(seen[0]) and all(map(torch.allclose, *gradients))
    assert all(torch.allclose(plain.get_parameter(key).grad, value) for key, value in expected.items())


def test_run_with_cache_and_with_hooks(hooked):
    x, clean = inputs(), hooked(inputs())
    before = state(hooked)
    out, cache = hooked.run_with_cache(x)
    assert torch.equal(out, clean) and sorted(cache) == sorted(NAMES)
    first = hooked.layer[0]
    assert torch.equal(cache["layer.0.shift.hook_point"], torch.relu(first.fc(x)) + first.shift)
    assert torch.equal(cache["hook_point"], clean) and torch.equal(cache["scale.hook_point"], clean)
    zeroed = hooked.run_with_hooks(x, fwd_hooks=[("layer.1.shift.hook_point", lambda value, hook: value * 0)])
    assert not zeroed.any()
    with hooked.hooks(fwd_hooks=[("scale.hook_point", lambda value, hook: value + 1)]) as same_model:
        assert same_model is hooked and hooked.list_hooks() and torch.equal(hooked(x), clean + 1)
    assert torch.equal(hooked(x), clean) and state(hooked) == before
    cache, fwd, bwd = hooked.get_caching_hooks(incl_bwd=True)
    with hooked.hooks(fwd, bwd):
        total(hooked(x)).backward()
    assert {f"{name}_grad" for name in NAMES} <= set(cache)


def test_added_hooks_stay_until_they_are_reset(hooked):
    x, clean = inputs(), hooked(inputs())
    before = state(hooked)
    hooked.add_hook("scale.hook_point", lambda value, hook: value * 2)
    hooked.add_perma_hook("hook_point", lambda value, hook: value + 1)
    assert torch.equal(hooked(x), clean * 2 + 1)
    point = hooked.hook_dict["scale.hook_point"]
    assert len(point.fwd_hooks) == 1 and point.has_hooks("fwd") and not point.has_hooks("bwd")
    assert [record.name for record in records(hooked)] == ["hook_point", "scale.hook_point"]
    hooked.reset_hooks()
    assert torch.equal(hooked(x), clean + 1)
    hooked.reset_hooks(including_permanent=True)
    assert torch.equal(hooked(x), clean) and state(hooked) == before
    point.add_hook(lambda gradient, hook: gradient * 0, dir="bwd")
    assert len(point.bwd_hooks) == 1 and not point.fwd_hooks
    hooked(x).sum().backward()
    assert not hooked.scale.grad.any()
    point.remove_hooks("bwd")
    assert state(hooked) == before


def test_hooks_are_told_their_point(hooked):
    told = []

    def look(value, hook):
        hook.ctx["sum"] = value.sum().item()
        told.append(hook)

    hooked.run_with_hooks(inputs(), fwd_hooks=[("layer.1.shift.hook_point", look), ("layer.1.fc.hook_point", look)])
    names = ["layer.1.fc.hook_point", "layer.1.shift.hook_point"]
    assert [point.name for point in told] == names and told[0].layer() == 1
    assert all(hooked.hook_dict[name] is point for name, point in zip(names, told, strict=True))
    assert "sum" in hooked.hook_dict[names[1]].ctx
    hooked.clear_contexts()
    assert hooked.hook_dict[names[1]].ctx == {}


def test_under_transforms_and_with_other_parameters():
    torch.manual_seed(0)
    model, x = auto_hook(Autoencoder()), inputs()
    hooks = [("W_enc.hook_point", lambda value, hook: value * 2), ("b_dec.hook_point", lambda value, hook: value + 1)]
    expected = model.run_with_hooks(x, fwd_hooks=hooks)
    rows = vmap(lambda row: model.run_with_hooks(row, fwd_hooks=hooks))(x)
    assert torch.allclose(rows, expected, atol=1e-6)
    other = {name: value.detach() * 2 for name, value in model.named_parameters()}
    twice = copy.deepcopy(model)
    twice.load_state_dict(other)
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(functional_call(model, other, (x,)), twice.run_with_hooks(x, fwd_hooks=hooks))
        gradients = grad(lambda p: total(functional_call(model, p, (x,))))(other)
    total(twice.run_with_hooks(x, fwd_hooks=hooks)).backward()
    assert all(torch.allclose(gradients[name], p.grad, atol=1e-5) for name, p in twice.named_parameters())


def test_a_tensor_that_two_modules_share_has_a_point_in_each(model):
    model.layer[1].shift = model.layer[0].shift
    assert list(model.hook_dict) == NAMES
    seen = fired(model)
    assert len(seen["layer.0.shift.hook_point"]) == len(seen["layer.1.shift.hook_point"]) == 1
    assert not torch.equal(seen["layer.0.shift.hook_point"][0], seen["layer.1.shift.hook_point"][0])


# --- gradients of what is no tensor -----------------------------------------------------------------------------------


def test_backward_hooks_get_the_gradient_of_the_first_item_of_a_tuple():
    model, x, seen = ReturnsAllSorts(), inputs().requires_grad_(), {}
    with model.hooks(bwd_hooks=[("two.hook_point", lambda g, hook: (seen.update({hook.name: g}), g * 2)[1])]):
        model(x).sum().backward()
    assert list(seen) == ["two.hook_point"]
    assert torch.equal(seen["two.hook_point"], torch.ones_like(x))
    assert torch.equal(x.grad, torch.full_like(x, 2 * 2.0 + 15.0))


@pytest.mark.parametrize(("name", "what"), [("nothing.hook_point", "None"), ("count.hook_point", "int")])
def test_backward_hooks_where_there_is_no_tensor_are_refused_by_name(name, what):
    model = ReturnsAllSorts()
    before = state(model)
    with pytest.raises(TreeMismatch, match=f"{name.partition('.')[0]}@grad': {what} has no tensor in it that could"):
        with model.hooks(bwd_hooks=[(name, lambda g, hook: g)]):
            model(inputs())
    assert state(model) == before


def test_a_predicate_passes_over_what_has_no_gradient():
    model, seen = ReturnsAllSorts(), set()
    with model.hooks(bwd_hooks=[(lambda name: True, lambda g, hook: seen.add(hook.name))]):
        model(inputs().requires_grad_()).sum().backward()
    assert sorted(seen) == ["hook_point", "two.hook_point"]
    assert sorted(fired(model)) == ["count.hook_point", "hook_point", "two.hook_point"]


# --- what the model stays ---------------------------------------------------------------------------------------------


def test_a_decorated_class_is_the_same_class():
    class Own(Autoencoder):
        pass

    own = Own()
    assert auto_hook(Own) is Own and auto_hook(Own) is Own
    assert type(own) is Own and list(own.hook_dict)[:2] == ["hook_point", "W_enc.hook_point"]  # made before, too
    assert vars(own).keys() == vars(Autoencoder()).keys()
    assert auto_hook(own) is own and vars(own).keys() == vars(Autoencoder()).keys()
    assert not hasattr(Autoencoder, "hook_dict")


def test_methods_can_be_called_on_the_class(model):
    hooks = [("scale.hook_point", lambda value, hook: value * 0)]
    assert not Decorated.run_with_hooks(model, inputs(), fwd_hooks=hooks).any()
    with Decorated.hooks(model, fwd_hooks=hooks):
        assert not model(inputs()).any() and model.context_level == 1 and not model.is_caching
    assert model.context_level == 0
    cache = model.add_caching_hooks("scale.hook_point")
    assert model.is_caching and torch.equal(model(inputs()), cache["scale.hook_point"])
    model.reset_hooks()
    assert not model.is_caching


def test_threads_look_at_the_hook_points_at_the_same_time(hooked):
    def look(_):
        return [hooked.run_with_hooks(inputs(), fwd_hooks=[(name, lambda value, hook: None)]) for name in NAMES]

    with ThreadPoolExecutor(4) as pool:
        outputs = [out for outs in pool.map(look, range(8)) for out in outs]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_an_instance_keeps_everything():
    torch.manual_seed(0)
    model = Autoencoder()
    model.note = ["mine"]
    attributes, clean = dict(vars(model)), model(inputs())
    structure = [list(model.state_dict()), list(model.named_modules()), [n for n, _ in model.named_parameters()]]
    assert auto_hook(model) is model and type(model) is Autoencoder
    after = [list(model.state_dict()), list(model.named_modules()), [n for n, _ in model.named_parameters()]]
    assert after == structure and torch.equal(model(inputs()), clean)
    assert {name: value for name, value in vars(model).items() if name in attributes} == attributes
    entries = dict(vars(model))
    assert auto_hook(model) is model and vars(model) == entries
    assert not hasattr(Autoencoder(), "hook_dict")


def test_an_instance_is_unwrapped():
    model = Autoencoder()
    attributes, clean = dict(vars(model)), model(inputs())
    auto_hook(model)
    model.add_perma_hook("W_enc.hook_point", lambda value, hook: value * 0)
    assert not torch.equal(model(inputs()), clean)
    assert model.unwrap() is model
    assert vars(model) == attributes and torch.equal(model(inputs()), clean)
    assert not hasattr(model, "hook_dict") and not hasattr(model, "unwrap")
    auto_hook(model)
    assert list(model.hook_dict) == list(auto_hook(Autoencoder()).hook_dict)


def test_a_class_is_unwrapped():
    class Own(Autoencoder):
        pass

    class Sub(Own):
        pass

    entries = dict(vars(Own))
    auto_hook(Own)
    model, sub, clean = Own(), Sub(), []
    clean += [model(inputs()), sub(inputs())]
    model.add_hook("W_enc.hook_point", lambda value, hook: value * 0)
    sub.add_perma_hook("W_enc.hook_point", lambda value, hook: value * 0)
    with pytest.raises(UnsupportedModule, match=r"Sub was not decorated itself, .*: Own\.unwrap\(\)"):
        Sub.unwrap()
    assert model.unwrap() is model and torch.equal(model(inputs()), clean[0]) and model.hook_dict
    assert Own.unwrap() is Own
    assert dict(vars(Own)) == entries and not hasattr(model, "hook_dict")
    assert torch.equal(sub(inputs()), clean[1])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_have_points_of_their_own_and_no_hooks(hooked, copied):
    x, clean = inputs(), hooked(inputs())
    hooked.add_hook("scale.hook_point", lambda value, hook: value * 0)
    other = copied(hooked)
    assert type(other) is type(hooked) and list(other.hook_dict) == NAMES
    assert torch.equal(other(x), clean) and not other.list_hooks() and hooked.list_hooks()
    hooked.reset_hooks()
    other.add_hook("layer.1.fc.hook_point", lambda value, hook: value + 1)
    assert torch.equal(hooked(x), clean) and not torch.equal(other(x), clean)
    assert other.hook_dict["scale.hook_point"] is not hooked.hook_dict["scale.hook_point"]


@pytest.mark.parametrize("make", [Decorated, lambda: auto_hook(Undecorated.of(Decorated()))], ids=["class", "instance"])
def test_nothing_keeps_the_model_alive(make):
    model = make()
    assert model.hook_dict and not model.list_hooks()
    gone = weakref.ref(model)
    del model
    assert gone() is None  # at once: what auto_hook adds makes no cycle
    model = make()
    model.add_hook("scale.hook_point", lambda value, hook: None)
    model(inputs())
    point, gone = model.hook_dict["scale.hook_point"], weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(SiteNotFound, match=r"no longer exists: nothing else has it\. Give the model a name"):
        point.has_hooks()


def test_a_method_of_a_class_keeps_its_model_alive_and_that_of_an_instance_says_what_to_write():
    assert list(Decorated().run_with_cache(inputs())[1]) == list(auto_hook(Decorated()).run_with_cache(inputs())[1])
    model = Decorated()
    method, gone = copy.deepcopy(model).run_with_hooks, weakref.ref(model)
    assert torch.equal(method(inputs()), model(inputs())) and not copy.deepcopy(model).list_hooks()
    method = model.run_with_hooks
    del model
    assert gone() is not None
    del method
    assert gone() is None  # at once
    method = auto_hook(Undecorated.of(Decorated())).run_with_hooks
    with pytest.raises(SiteNotFound, match=r"nothing else has it.*\n    model = auto_hook\(Model\(\)\)"):
        method(inputs())


def test_what_transformer_lens_has_as_attributes_can_be_assigned():
    model = Decorated()
    model.is_caching = model.context_level = 7
    assert model.is_caching is False and model.context_level == 0


@pytest.mark.parametrize("make", [lambda: nn.Parameter(torch.ones(2)), lambda: nn.ReLU()])
def test_parameters_and_modules_with_a_name_that_is_taken(make):
    @auto_hook
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_dict = make()

    with pytest.raises(UnsupportedModule, match=r"Own sets self\.hook_dict, but auto_hook"):
        _ = Own().hook_dict


# --- names that are taken ---------------------------------------------------------------------------------------------


def test_names_that_are_taken_are_not_replaced():
    class Own(Taken):
        def hooks(self):
            return "mine"

    with pytest.raises(UnsupportedModule, match="Own has 'hooks' of its own"):
        auto_hook(Own)
    assert Own().hooks() == "mine" and not hasattr(Own, "hook_dict")
    model = Taken([1])
    with pytest.raises(UnsupportedModule, match="Taken has 'hooks' of its own"):
        auto_hook(model)
    assert model.hooks == [1] and not hasattr(model, "hook_dict")
    with pytest.raises(UnsupportedModule, match="A HookedRootModule has them"):
        auto_hook(AutoencoderWithPoints(Autoencoder()))


def test_attributes_that_an_instance_sets_are_noticed():
    class Own(Taken):
        pass

    auto_hook(Own)
    assert list(Own().hook_dict) == ["hook_point"]
    with pytest.raises(UnsupportedModule, match=r"Own sets self\.hooks, but auto_hook has given the class a method"):
        Own([1])
    model = Own(nn.ModuleList())
    with pytest.raises(UnsupportedModule, match=r"Own sets self\.hooks"):
        _ = model.hooks


@pytest.mark.parametrize("what", [3, "model", torch.randn, int])
def test_only_modules(what):
    with pytest.raises(TypeError, match=r"auto_hook takes a class of torch\.nn\.Modules, or a torch\.nn\.Module"):
        auto_hook(what)


def test_torchs_own_classes_are_left_alone():
    with pytest.raises(UnsupportedModule, match=r"auto_hook\(Linear\(…\)\)"):
        auto_hook(nn.Linear)
    assert list(auto_hook(nn.Linear(2, 2)).hook_dict) == ["hook_point"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(UnsupportedModule, match="TorchScript"):
        auto_hook(torch.jit.trace(nn.Linear(4, 4), inputs()))


def test_wrong_names_and_hooks_that_never_act_are_said(hooked):
    with pytest.raises(SiteNotFound, match=r"nearest names: .*layer\.1\.fc\.hook_point"):
        hooked.add_hook("layer.1.f.hook_point", lambda value, hook: None)
    hooked.extra = nn.Linear(4, 4)
    with pytest.raises(SiteNotReached, match="extra"):
        hooked.run_with_hooks(inputs(), fwd_hooks=[("extra.hook_point", lambda value, hook: None)])


def test_a_class_may_check_the_hooks_that_are_added():
    @auto_hook
    class Checked(Autoencoder):
        def check_hooks_to_add(self, point, name, hook, dir="fwd", is_permanent=False, prepend=False):
            if name.startswith("b_"):
                raise ValueError(name)

    model = Checked()
    with pytest.raises(ValueError, match=r"b_dec\.hook_point"):
        model.add_hook("b_dec.hook_point", lambda value, hook: None)
    model.add_hook("W_dec.hook_point", lambda value, hook: value * 0)
    assert torch.equal(model(inputs()), model.b_dec.expand(5, 4))


@pytest.mark.parametrize("tapped", [False, True])
def test_a_shallow_copy_acts_on_itself(tapped):
    model, x = auto_hook(Undecorated.of(Decorated())), inputs()
    clean = model(x)
    with capture(model, "layer.0.fc") if tapped else nullcontext():
        other = copy.copy(model)
        _ = model(x)
    other.add_hook("hook_point", lambda value, hook: value * 0)
    assert torch.equal(model(x), clean) and not other(x).any() and not model.list_hooks()
    assert other.hook_dict["hook_point"] is not model.hook_dict["hook_point"]
    third = copy.copy(other)
    assert torch.equal(third(x), clean) and vars(third).keys() == vars(model).keys()
    assert not [name for name in vars(copy.copy(other.unwrap())) if name.startswith("__")]
