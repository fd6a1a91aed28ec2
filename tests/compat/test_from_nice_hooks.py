"""The faults that docs/from_nice_hooks.md says did not come along."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from gallery.hooked import NamesOfExamples
from torch import nn
from worlds import inputs, make, state

import nicehooks as nice_hooks


def test_scripts_run_with_the_import_alone_changed(capsys):
    my_model, args, kwargs = NamesOfExamples(), (inputs(),), {"scale": 2.0}

    def my_hook(module: nn.Module, path: nice_hooks.ModulePath, args, output):
        print(path, tuple(output.shape))

    handle = nice_hooks.register_forward_hook(my_model, "path.to_.module", my_hook)
    result = nice_hooks.run(my_model, *args, **kwargs)
    handle.remove()
    assert capsys.readouterr().out == "path.to_.module (5, 4)\n"
    assert torch.equal(result, my_model(*args, **kwargs))

    result = nice_hooks.run(my_model, *args, forward_hooks={"mod1": my_hook})
    with nice_hooks.register_forward_hook(my_model, "mod1", my_hook):
        assert torch.equal(result, my_model(*args))
    assert capsys.readouterr().out == "mod1 (5, 5)\n" * 2

    result, cache = nice_hooks.run(my_model, *args, return_activations=True)
    assert set(cache) == {"path.to_.module", "mod1.0", "mod1.1", "mod1", "mod2", ""} and torch.equal(cache[""], result)
    result, cache = nice_hooks.run(my_model, *args, return_activations=["mod1.*", "mod2"])
    assert list(cache) == ["mod1.0", "mod1.1", "mod2"]
    result = nice_hooks.run(my_model, *args, with_activations={"mod1": torch.ones(5)})
    assert torch.equal(result, my_model.mod2(torch.ones(5, 5)))
    result, cache = nice_hooks.run(
        my_model, *args, with_activations={"mod1[:,3:5]": torch.ones(2)}, return_activations=["mod1"]
    )
    assert torch.equal(cache["mod1"][:, 3:5], torch.ones(5, 2)) and not torch.equal(cache["mod1"], torch.ones(5, 5))


@pytest.mark.parametrize("path", ["mod1[0:5]", "mod1[:5]", "mod1[:,-5:]", "mod1[*]", "path.**", "mod1.*"])
def test_every_kind_of_path(path):
    model, seen = NamesOfExamples(), []
    with nice_hooks.register_forward_hook(model, path, lambda module, path, args, output: seen.append(str(path))):
        model(inputs())
    expected = {
        "mod1[*]": [f"mod1[{i}]" for i in range(5)],
        "path.**": ["path.to_.module"],
        "mod1.*": ["mod1.0", "mod1.1"],
    }
    assert seen == expected.get(path, [str(nice_hooks.ModulePath.parse(path))])


def test_a_wrong_name_beside_a_good_one_is_not_dropped():
    model, called = make("Mlp"), []
    model.register_forward_hook(lambda *given: called.append(1))
    for options in (
        {"return_activations": ["embed", "embd"]},
        {"with_activations": {"embed": 0.0, "embd": 0.0}},
        {"forward_hooks": {"embed": print, "embd": print}},
        {"full_backward_hooks": {"embed": print, "embd": print}},
    ):
        with pytest.raises(nice_hooks.SiteNotFound, match="no module matches 'embd'"):
            nice_hooks.run(model, inputs(), **options)
    assert called == []


def test_wildcards_and_slices_of_an_index_write_their_part_alone():
    model = make("Mlp")
    clean = model.embed(inputs())
    hooks = {"embed[*, 1:3]": lambda module, path, args, output: output * 0 + path.chain[0][0]}
    _, acts = nice_hooks.run(model, inputs(), forward_hooks=hooks, return_activations="embed")
    assert acts["embed"][:, 1].tolist() == acts["embed"][:, 2].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(acts["embed"][:, 3:], clean[:, 3:]) and torch.equal(acts["embed"][:, 0], clean[:, 0])


@pytest.mark.parametrize("kind", ["forward_hooks", "forward_pre_hooks"])
def test_hooks_do_not_survive_an_error(kind):
    model = make("Mlp")
    before, clean = state(model), model(inputs())

    def broken(module, path, *given):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        nice_hooks.run(model, inputs(), **{kind: {"head": broken}}, with_activations={"embed": 0.0})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # in the model itself
        nice_hooks.run(model, inputs()[:, :2], **{kind: {"head": broken}}, return_activations=True)
    assert state(model) == before and torch.equal(model(inputs()), clean)


def test_a_patch_that_did_nothing_does_not_pass():
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(nice_hooks.SiteNotReached, match="never calls it"):
        nice_hooks.run(attention, *[inputs()] * 3, with_activations={"out_proj": 0.0})


def test_layers_in_place_behind_a_hook_on_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    seen = []
    hooks = {"0": lambda module, path, given, output: seen.append(output[0].shape)}
    nice_hooks.run(model, inputs(), full_backward_hooks=hooks).sum().backward()
    assert seen == [(5, 4)]
    model[0].register_full_backward_hook(lambda *given: None)
    with pytest.raises(RuntimeError, match="modified inplace"):
        model(inputs().requires_grad_())


# --- paths, handles and options as they are there ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("mod1", None),
        ("mod1[0]", (0,)),
        ("mod1[:5]", (slice(None, 5),)),
        ("mod1[:, -1]", (slice(None), -1)),
        ("mod1[0][:, 1]", (0, (slice(None), 1))),
    ],
)
def test_a_path_is_a_name_and_an_index(text, index):
    path = nice_hooks.ModulePath.parse(text)
    name, found = path
    assert (name, found, path.slice) == ("mod1", index, index)
    if text.count("[") < 2:
        assert nice_hooks.ModulePath(name, found) == path and str(nice_hooks.ModulePath(name, found)) == text


def test_an_index_may_have_a_star_or_be_no_tuple():
    path = nice_hooks.ModulePath("mod1", (slice(None), "*"))
    assert str(path) == "mod1[:, *]" and path.has_stars
    assert str(nice_hooks.ModulePath("mod1", slice(2))) == "mod1[:2]"
    assert str(nice_hooks.ModulePath("mod1", [0, 2])) == "mod1[[0, 2]]"
    assert nice_hooks.ModulePath("mod1", 2) == nice_hooks.ModulePath.parse("mod1#2")  # a number is a call


def test_paths_still_select_as_one_item():
    model, path = make("Mlp"), nice_hooks.ModulePath("embed", (slice(None), 0))
    _, acts = nice_hooks.run(model, inputs(), return_activations=[path])
    assert list(acts) == ["embed[:, 0]"] and list(acts.select(path)) == ["embed[:, 0]"]
    assert torch.equal(acts[path], acts["embed[:,0]"])


def test_none_is_a_left_out_option_everywhere():
    model = NamesOfExamples()
    options = dict.fromkeys(
        [
            "return_activations",
            "with_activations",
            "forward_hooks",
            "forward_pre_hooks",
            "full_backward_hooks",
            "full_backward_pre_hooks",
            "model_kwargs",
        ]
    )
    assert torch.equal(nice_hooks.run(model, inputs(), **options), model(inputs()))


def test_a_handle_has_one_handle_for_each_module():
    model, seen = NamesOfExamples(), []
    handle = nice_hooks.register_forward_hook(
        model, "mod1.*", lambda module, path, args, output: seen.append(str(path))
    )
    assert isinstance(handle, nice_hooks.RemovableHandleCollection) and len(handle.handles) == 2
    first, second = handle.handles
    first.remove()
    first.remove()
    model(inputs())
    assert seen == ["mod1.1"] and handle.active
    second.remove()
    model(inputs())
    assert seen == ["mod1.1"] and not handle.active


@pytest.mark.parametrize(
    "register", [nice_hooks.register_full_backward_hook, nice_hooks.register_full_backward_pre_hook]
)
def test_handles_of_hooks_on_gradients(register):
    model, seen = NamesOfExamples(), []
    handle = register(model, "mod1.*", lambda module, path, *gradients: seen.append(str(path)))
    handle.handles[1].remove()
    model(inputs()).sum().backward()
    handle.remove()
    assert seen == ["mod1.0"]


def test_the_root_and_its_children():
    model = NamesOfExamples()
    assert [str(path) for path, _ in nice_hooks.expand_module_path(model, "*")] == ["path", "mod1", "mod2"][1:]
    assert [module for _, module in nice_hooks.expand_module_path(model, "")] == [model]
    _, cache = nice_hooks.run(model, inputs(), return_activations=["", "*"])
    assert set(cache) == {"", "mod1", "mod2"}


def test_the_type_names_are_public():
    assert nice_hooks.to_paths("a") == ["a"] and nice_hooks.to_paths(["a", "b"]) == ["a", "b"]
    assert nice_hooks.to_paths(True) == ["**"] and nice_hooks.to_paths(False) == nice_hooks.to_paths(None) == []
    assert {int, slice, torch.Tensor, type(None)} < set(get_args(nice_hooks.AnySlice))
    assert get_args(nice_hooks.PathsLike) == (str, list[str], bool, type(None))
