"""`patch_method_to_module`: methods that paths lead to, and a model that has no trace of it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch._dynamo
from gallery.methods import Attention, OtherScale, Overriding, Underscored
from torch import nn
from worlds import WORLDS, inputs, same, state

from nicehooks import (
    ContextMisuse,
    NotReachedWarning,
    SiteNotFound,
    UnsupportedModule,
    ablate,
    capture,
    edit,
    patch,
    patch_method_to_module,
    register_forward_hook,
    register_full_backward_hook,
    run,
    select,
    sites,
    suspend,
)

METHODS = ("mix", "act", "scaled")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), OtherScale(), Overriding())


@pytest.fixture
def patched(model):
    handles = [patch_method_to_module(Attention, name) for name in METHODS]
    yield model
    for handle in handles:
        handle.remove()


def class_state():
    return [dict(vars(kind)) for kind in (Attention, Overriding, OtherScale)]


def test_paths_lead_to_methods_of_instances_old_and_new(model):
    before, clean, classes = state(model), model(inputs()), class_state()
    with patch_method_to_module(Attention, "mix") as handle:
        assert repr(handle) == "patch_method_to_module(Attention, 'mix')" and handle.active
        assert [str(site) for site in select(model, "*.*")] == ["0.proj", "0.mix", "1.proj", "1.mix", "2.proj"]
        with capture(model, "*.mix") as acts:
            assert torch.equal(model(inputs()), clean)
        x = inputs()
        assert torch.equal(acts["0.mix"], model[0].proj(x) * x)
        new = nn.Sequential(Attention())
        with ablate(new, "0.mix"):
            assert not new(inputs()).any()
        assert isinstance(model.get_submodule("0.mix"), nn.Module)
    assert not handle.active
    assert state(model) == before and class_state() == classes
    with pytest.raises(SiteNotFound, match="nearest names"):
        select(model, "0.mix")


def test_what_is_listed(patched):
    records = {record.path: record for record in sites(patched, inputs())}
    assert records["0.mix"].type == "Attention.mix" and records["0.mix"].calls == 1
    assert records["1.act"].value == "Tensor[5, 4] float32"


def test_every_intervention_reaches_them(patched):
    x = inputs()
    mixed = patched[0].proj(x) * x
    with edit(patched, "0.mix@input['q'][:, 0]", lambda value: value * 0), capture(patched, "0.mix@input") as acts:
        patched(x)
    assert not acts["0.mix@input['q'][:, 0]"].any() and torch.equal(acts["0.mix@input['k']"], x)
    with patch(patched, {"0.mix[:, 0]": 7.0}), capture(patched, "0.act@input[0]", "0") as acts:
        patched(x)
    assert acts["0.act@input[0]"][:, 0].unique().tolist() == [7.0]
    assert torch.equal(acts["0"][:, 1:], mixed.sin()[:, 1:] * 2)
    with ablate(patched, "1.mix"):
        patched(x)
        with suspend(patched), capture(patched, "1.mix") as acts:
            patched(x)
    assert acts["1.mix"].any()
    _, acts = run(
        patched, x, forward_hooks={"1.scaled": lambda m, path, args, out: args[0]}, return_activations=["1.*"]
    )
    assert torch.equal(acts["1.scaled"], acts["1.act"])


def test_hooks_and_gradients(patched):
    seen = []
    with (
        register_forward_hook(patched, "0.*", lambda module, path, args, out: seen.append((str(path), len(args)))),
        register_full_backward_hook(patched, "0.mix", lambda module, path, given, out: seen.append(len(given))),
    ):
        patched(inputs().requires_grad_()).sum().backward()
    assert seen == [("0.proj", 1), ("0.mix", 1), ("0.act", 1), ("0.scaled", 1), 1]


def test_a_call_from_anywhere_is_a_call_of_the_module(patched):
    with capture(patched, "0.mix") as acts:
        patched[0].mix(inputs(), inputs(), by=3.0)
    assert torch.equal(acts["0.mix"], patched[0].proj(inputs()) * inputs() * 3.0)


def test_beside_the_port_of_calls(patched):
    with (
        capture(patched, "0@mix()", "0@act()", "0@mix().input['k']") as calls,
        capture(patched, "0.mix", "0.act") as acts,
    ):
        patched(inputs())
    assert torch.equal(calls["0@mix()"], acts["0.mix"]) and torch.equal(calls["0@act()"], acts["0.act"])
    assert torch.equal(calls["0@mix().input['k']"], inputs())


def test_an_overriding_subclass_has_a_method_of_its_own(patched):
    torch.manual_seed(0)
    clean = patched(inputs())
    with pytest.raises(SiteNotFound):
        select(patched, "2.mix")
    with patch_method_to_module(Overriding, "mix"), capture(patched, "2.mix", "2") as acts:
        assert torch.equal(patched(inputs()), clean)
    assert torch.equal(acts["2"], acts["2.mix"].sin() * 2)


def test_an_inherited_method_is_patched_on_the_subclass_alone(model):
    classes = class_state()
    with patch_method_to_module(OtherScale, "mix"):
        assert [str(site) for site in select(model, "*.mix")] == ["1.mix"]
        with patch_method_to_module(Attention, "mix"), capture(model, "*.mix@input['k']") as acts:
            model(inputs())
        assert list(acts) == ["0.mix@input['k']", "1.mix@input['k']"]
    assert class_state() == classes


def test_nothing_of_the_model_changes_and_nothing_recurses(model):
    before = (
        list(model.state_dict()),
        [n for n, _ in model.named_modules()],
        repr(model),
        len(list(model.parameters())),
    )
    with patch_method_to_module(Attention, "mix"), capture(model, "0.mix"):
        model(inputs())
        after = (
            list(model.state_dict()),
            [n for n, _ in model.named_modules()],
            repr(model),
            len(list(model.parameters())),
        )
        assert after == before
        model.to(torch.float64).to(torch.float32).eval().train().apply(lambda module: None)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(twin(inputs()), model(inputs()))
            assert twin[0].mix is not model[0].mix and twin[0].mix.owner is twin[0]
            assert list(vars(twin[0])) == [name for name in vars(model[0]) if name != "forward"]
        assert copy.deepcopy(model[0].mix).owner is not model[0]
        assert repr(model[0].mix) == "Attention.mix()"
        assert list(model[0].mix.modules()) == [model[0].mix] and not model[0].mix.state_dict()


def test_a_model_is_not_kept_alive(patched):
    model = nn.Sequential(Attention())
    with capture(model, "0.mix"), capture(model, "0@mix()", "0@mix().input['k']"):
        model(inputs())
    references = [weakref.ref(model[0]), weakref.ref(model[0].mix)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_two_handles_of_one_method(model):
    one, two = (patch_method_to_module(Attention, "mix") for _ in range(2))
    one.remove()
    one.remove()
    assert [str(site) for site in select(model, "0.mix")] == ["0.mix"]
    with pytest.raises(ContextMisuse, match="was removed"), one:
        pass
    with pytest.raises(ValueError, match="broken"), two:
        raise ValueError("broken")
    assert not two.active
    with pytest.raises(SiteNotFound):
        select(model, "0.mix")


def test_a_method_that_something_acts_on_is_not_put_back_silently(model):
    handle = patch_method_to_module(Attention, "mix")
    hook = ablate(model, "0.mix").attach()
    model(inputs())
    with pytest.warns(NotReachedWarning, match=r"patch_method_to_module\(Attention, 'mix'\) was removed while"):
        handle.remove()
    hook.remove()


def test_what_somebody_else_has_set_meanwhile_stays(model):
    original = vars(Attention)["mix"]
    handle = patch_method_to_module(Attention, "mix")

    def other(self, q, k, by=1.0):
        return q

    Attention.mix = other
    try:
        handle.remove()
        assert vars(Attention)["mix"] is other
    finally:
        Attention.mix = original


def test_an_attribute_of_the_instance_goes_first(patched):
    patched[0].mix = lambda q, k, by=1.0: q
    assert [str(site) for site in select(patched, "*.mix")] == ["1.mix"]
    patched(inputs())


BAD = [
    ("forward", "its result is at the path of the module"),
    ("state_dict", "belongs to every nn.Module"),
    ("__len__", "there is no Attention.__len__"),
    ("__call__", "belongs to every nn.Module"),
    ("width", "is no method but a property"),
    ("table", "is no method but a tuple"),
    ("mixx", "there is no Attention.mixx. The methods of Attention: act, mix, scaled"),
]


@pytest.mark.parametrize(("name", "says"), BAD)
def test_what_cannot_be_a_module_is_refused(name, says):
    classes = class_state()
    with pytest.raises(UnsupportedModule, match=says):
        patch_method_to_module(Attention, name)
    assert class_state() == classes


INSTEAD = {
    "a module": (Attention(), "not Attention: write patch_method_to_module(Attention, …)"),
    "another class": (dict, "not dict: write a subclass of torch.nn.Module"),
    "a text": ("Attention", "not str: write a subclass of torch.nn.Module"),
}


@pytest.mark.parametrize("case", INSTEAD)
def test_it_takes_a_class_of_modules(case):
    what, said = INSTEAD[case]
    with pytest.raises(TypeError) as caught:
        patch_method_to_module(what, "mix")
    assert str(caught.value) == f"patch_method_to_module(cls, name) takes a class of modules, {said}"


def test_underscores_at_one_end_of_a_name_make_no_method_of_python():
    model = nn.Sequential(Underscored())
    with patch_method_to_module(Underscored, "_mix__"), capture(model, "0._mix__") as acts:
        model(inputs())
    assert torch.equal(acts["0._mix__"], inputs() + 1)


@pytest.mark.parametrize("world", WORLDS)
def test_in_every_world(patched, world):
    def by_path(x):
        with ablate(patched, "1.act[..., 0]"), capture(patched, "0.mix") as acts:
            return patched(x), acts["0.mix"]

    def by_hand(x):
        mixed = patched[0].proj(x) * x
        h = mixed.sin() * 2
        h = (patched[1].proj(h) * h).sin() * 3
        h = torch.cat([torch.zeros_like(h[..., :1]), h[..., 1:]], -1)
        return patched[2](h), mixed

    found, expected = (torch.utils._pytree.tree_leaves(WORLDS[world](f, inputs())) for f in (by_path, by_hand))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_in_compiled_code():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), OtherScale())
    run_compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = clean = run_compiled(inputs())
    handles = [patch_method_to_module(Attention, name) for name in METHODS]
    try:
        assert torch.allclose(run_compiled(inputs()), clean)
        for _ in range(2):
            with (
                edit(model, "0.mix", lambda value: value * 2),
                ablate(model, "1.act[:, 0]"),
                capture(model, "*.*") as acts,
            ):
                out = run_compiled(inputs())
                found = dict(acts)
                assert torch.allclose(out, model(inputs()), atol=1e-6)
            assert found.keys() == acts.keys() and len(found) == 8
            assert all(torch.allclose(found[key], acts[key], atol=1e-6) for key in found)
        assert torch.allclose(run_compiled(inputs()), clean) and not torch.allclose(out, clean)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.allclose(run_compiled(inputs()), clean)


def test_a_context_inside_compiled_code(patched):
    torch._dynamo.reset()
    model = patched[:2]

    def f(x):
        with capture(model, "0.mix") as acts, ablate(model, "1.act[:, 0]"):
            return model(x), acts["0.mix"]

    found, expected = torch.compile(f, fullgraph=True, backend="eager")(inputs()), f(inputs())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
