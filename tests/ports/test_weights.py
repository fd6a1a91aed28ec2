"""A weight that is replaced is that of the model as it was entered on: what changed in between is told, or refused."""

import re

import pytest
import torch
from gallery.parameters import CallsItsChild, Reads
from gallery.returning import Awaited, GoesThrough, Yields
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from worlds import inputs

from nicehooks import ablate, capture, patch, select
from nicehooks.errors import NotReachedWarning, SiteNotFound, UnsupportedModule


def three():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))


def tied():
    model = three()
    model[2].weight = model[0].weight
    return model


def parametrized():
    model = three()
    parametrizations.weight_norm(model[0])
    return model


def replace_module(model):
    model[1][0] = nn.Linear(4, 4)


def take_out(model):
    model[1] = nn.Identity()


def untie(model):
    model[2].weight = nn.Parameter(torch.ones(4, 4))


def tie(model):
    model[2].weight = model[0].weight


def add_parametrization(model):
    parametrizations.weight_norm(model[0])


def remove_parametrization(model):
    parametrize.remove_parametrizations(model[0], "weight")


def parametrize_anew(model):
    remove_parametrization(model)
    add_parametrization(model)


CHANGES = [
    (three, "1.0@weight", replace_module),
    (three, "1.0@weight", take_out),
    (tied, "0@weight", untie),
    (three, "0@weight", tie),
    (three, "0@weight", add_parametrization),
    (parametrized, "0@weight", remove_parametrization),
    (parametrized, "0@weight", parametrize_anew),
    (three, "1.0", replace_module),
    (three, "1.0", take_out),
    (three, "1.0@input[0]", replace_module),
    (three, "**", replace_module),
]


@pytest.mark.parametrize(("build", "path", "change"), CHANGES, ids=lambda it: getattr(it, "__name__", it))
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("as_sites", [False, True])
def test_a_model_that_is_changed_inside_a_context_is_told_of(build, path, change, attached, as_sites):
    model = build()
    handle = ablate(model, *(select(model, path) if as_sites else [path]))
    handle.attach() if attached else handle.__enter__()
    model(inputs())
    change(model)
    shown = "1.0" if path == "**" else path
    with pytest.warns(
        NotReachedWarning, match=rf"stand now where these sites were: '{re.escape(shown)}'\. What it did"
    ):
        handle.remove()


@pytest.mark.parametrize(("build", "path", "change"), CHANGES, ids=lambda it: getattr(it, "__name__", it))
def test_a_context_that_is_entered_again_acts_on_the_model_as_it_is_then(build, path, change):
    model = build()
    context = ablate(model, path)
    with context:
        model(inputs())
    change(model)
    if change is take_out:
        with pytest.raises(SiteNotFound):
            context.__enter__()
        return
    with context:
        again = model(inputs())
    with ablate(model, path):
        assert torch.equal(again, model(inputs()))
    assert not torch.equal(again, model(inputs()))


def test_the_whole_message():
    model = three()
    with pytest.warns(NotReachedWarning) as caught, capture(model, "**"):  # noqa: PT031
        model(inputs())
        for name in ("0", "1", "2"):
            setattr(model, name, nn.Linear(4, 4))
    assert str(caught[0].message) == (
        "capture(model, '**'): inside the context the model was changed. Other modules, or none, stand now where these "
        "sites were: '0', '1', '1.0' and 1 more. What it did, it did to the modules and weights that were there when "
        "it was entered.\n  Change the model before the context is entered; or leave it, and enter it again."
    )


def test_what_leaves_every_site_where_it_was_is_not_told_of():
    model = three()
    with ablate(model, "0@weight"), capture(model, "*"), capture(model, "1.0@weight"):
        model(inputs())
        model.append(nn.ReLU())
        model[1].append(nn.ReLU())
        model.half().float().eval()
        model[2].register_buffer("more", torch.ones(1))


def test_a_capture_of_a_weight_does_not_ask_who_else_holds_it():
    model = tied()
    with capture(model, "0@weight") as acts:
        model(inputs())
        untie(model)
    assert acts["0@weight"] is model[0].weight


def test_a_weight_that_is_gone_when_the_model_runs():
    model = three()
    gone = "'0@bias': Linear no longer holds this parameter itself"
    with pytest.raises(UnsupportedModule, match=gone), ablate(model, "0@bias"):
        model[0].bias = None
        model(inputs())


def test_a_module_that_is_gone_when_the_model_runs():
    """A forward that runs after it says so at once; what follows is an exception, which leaving says nothing over."""
    model = three()
    gone = "the module of site '1.0@weight' no longer exists"
    with pytest.raises(SiteNotFound, match=gone), ablate(model, "1.0@weight"):
        model[1] = nn.Identity()
        model(inputs())


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")  # it is what is tested
@pytest.mark.parametrize(("build", "name"), [
    (pruned, "weight_orig"),
    (pruned, "weight_mask"),
    (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), "weight_g"),
    (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), "weight_v"),
    (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), "weight_orig"),
])  # fmt: skip
def test_what_a_pre_hook_reads_is_changed_around_its_module_or_refused(build, name):
    """The hook runs before the forward of the module; that of a model around it has begun by then."""
    layer = build().eval()
    model, value = nn.Sequential(layer), torch.zeros_like(getattr(layer, name)) + 0.5
    with pytest.raises(UnsupportedModule) as caught, patch(layer, {f"@{name}": value}):
        pass
    assert str(caught.value) == (
        f"'@{name}': a pre-hook of this Linear computes 'weight' from it, before the forward begins in which it could "
        "be another one. Change what is computed, '@weight', or enter the context on a model that this module is a "
        "part of, and call that."
    )
    with (
        pytest.raises(UnsupportedModule, match=f"'0@{name}': a pre-hook of this Linear"),
        patch(model, {f"0@{name}": value}),
    ):
        layer(inputs())
    with patch(model, {f"0@{name}": value}):
        found = model(inputs())
    getattr(layer, name).data.copy_(value)
    assert torch.allclose(found, model(inputs()))
    with capture(layer, f"@{name}") as acts:
        layer(inputs())
    assert torch.equal(acts[f"@{name}"], value)


def test_a_parameter_whose_name_begins_like_another_one_s():
    """No pre-hook computes anything from it."""
    layer = pruned()
    layer.register_parameter("weigh", nn.Parameter(torch.ones(1)))
    layer.register_parameter("scale_orig", nn.Parameter(torch.ones(1)))
    with ablate(layer, "@weigh", "@scale_orig", "@bias"):
        layer(inputs())


@pytest.mark.parametrize("kind", [Yields, Awaited])
def test_the_weight_of_a_forward_that_runs_when_its_call_is_over(kind):
    model = kind()
    with pytest.raises(UnsupportedModule) as caught, ablate(model, "@scale"):
        pass
    assert str(caught.value) == (
        f"'@scale': the forward of {kind.__name__} is a generator, or a coroutine. It runs when its call is over, and "
        "nothing stands in the place of a weight any more. Enter the context on a module around it, whose forward goes "
        "through all of it, and call that."
    )


def test_a_generator_that_the_model_around_it_goes_through():
    model = GoesThrough(Yields())
    with ablate(model, "child@scale"):
        assert not model(inputs()).any()
    with ablate(model, "child.child@weight", "child.child@bias"):
        assert not model(inputs()).any()
    with pytest.raises(UnsupportedModule, match="'child@scale': the forward of Yields"), ablate(model, "child@scale"):
        model.child(inputs())


def test_one_weight_under_two_names_of_one_module():
    model = nn.Sequential(Reads(lambda module: module.again))
    model[0].again = model[0].weight
    with ablate(model, "0@weight"):
        assert not model(torch.ones(2, 3)).any()
    assert model(torch.ones(2, 3)).all()


def test_a_weight_that_a_part_of_the_model_reads_where_that_alone_is_called():
    model = nn.Sequential(CallsItsChild(Reads(lambda module: module.weight)))
    model[0].forward = lambda x: x * model[0].child.weight
    with ablate(model, "0.child@weight"):
        assert not model[0](torch.ones(2, 3)).any()
    assert model[0](torch.ones(2, 3)).all()
