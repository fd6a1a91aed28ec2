"""Law 5: a value that leaves its transform is lifted, or says so when it is read."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from worlds import AROUND, inputs, make, total

from nicehooks import ActivationCache, StaleActivation, capture, captured, patch
from nicehooks.torch_private_tensors import is_wrapped

OVER = """\
'embed' was captured inside a torch.func transform (vmap, grad, …) that is over, and its value was good in there only.
    output, acts = captured(model, "embed")(x)  # inside the transform: return acts from the function
    with capture(model, "embed") as acts: ...   # around the transform: acts gets the full batch"""


def leaked(transform, path="embed", make_use=lambda acts: acts, **options):
    """A cache that a function under a transform keeps."""
    model, kept = make("Mlp"), []

    def keeps(x):
        with capture(model, path, **options) as acts:
            out = model(x)
        acts[path]  # can be read in here
        kept.append(make_use(acts))
        return out

    AROUND[transform](keeps)
    return kept[-1]


@pytest.mark.parametrize("transform", AROUND)
@pytest.mark.parametrize(
    "options",
    [{}, {"clone": True}, {"keep": "all"}, {"map": lambda value: value * 2}],
    ids=["plain", "clone", "keep", "map"],
)
def test_a_value_that_outlives_its_transform_raises(transform, options):
    acts = leaked(transform, **options)
    with pytest.raises(StaleActivation, match=f"^{re.escape(OVER)}$"):
        acts["embed"]


READS = {
    "get": lambda acts: acts.get("embed"),
    "a part": lambda acts: acts["embed[..., 0]"],
    "values": lambda acts: acts.values(),
    "items": lambda acts: acts.items(),
    "dict": dict,
    "copy": lambda acts: acts.copy(),
    "pop": lambda acts: acts.pop("embed"),
    "pickle": pickle.dumps,
    "select": lambda acts: acts.select("embed"),
    "stack": lambda acts: acts.stack(),
    "calls": lambda acts: acts.calls("embed"),
    "arithmetic": lambda acts: acts + 1,
    "as a value to patch": lambda acts: patch(make("Mlp"), acts),
}


@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_it_raises(read):
    with pytest.raises(StaleActivation, match="is over"):
        READS[read](leaked("vmap"))


DERIVED = {
    "copied": lambda acts: acts.copy(),
    "selected": lambda acts: acts.select("embed"),
    "computed": lambda acts: acts * 2 - 1,
    "updated": lambda acts: ActivationCache() | acts,
}


@pytest.mark.parametrize("transform", ["vmap", "grad"])
@pytest.mark.parametrize("way", DERIVED)
def test_what_was_made_of_it_raises_too(way, transform):
    with pytest.raises(StaleActivation, match="is over"):
        leaked(transform, make_use=DERIVED[way])["embed"]


def test_its_text_can_be_read():
    assert str(leaked("vmap")) == "ActivationCache: 1 site, 24 bytes\n  embed  Tensor[6] float32"


@pytest.mark.parametrize("transform", AROUND)
def test_it_is_over_in_another_transform_of_the_same_level(transform):
    acts = leaked(transform)

    def reads(x):
        with pytest.raises(StaleActivation, match="is over"):
            acts["embed"]
        return x * 1

    AROUND[transform](reads)


def test_it_lives_in_the_transforms_inside_of_its_own():
    model, x = make("Mlp"), inputs()

    def rows(x):
        with capture(model, "embed") as acts:
            model(x)
        return vmap(lambda weight: (acts["embed"] * weight).sum())(torch.ones(3, 6)), grad(
            lambda weight: (acts["embed"] * weight).sum()
        )(torch.ones(6))

    sums, gradients = vmap(rows)(x)
    assert torch.allclose(sums, model.embed(x).sum(-1, keepdim=True).expand(5, 3), atol=1e-6)
    assert torch.allclose(gradients, model.embed(x))


def test_only_what_belongs_to_the_transform_is_over():
    """What is captured in `grad` in `vmap`: what `grad` made, what came from `vmap`, and what came from neither."""
    model, kept = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), []

    def of_one(x):
        def of_weight(weight):
            with capture(model, "0@input[0]", "1@bias", "1") as acts, patch(model, "1@weight", weight):
                out = model(x).sum()
            kept.append(acts)
            return out

        found = grad(of_weight)(torch.ones(2, 3))
        with pytest.raises(StaleActivation, match="'1' was captured inside"):
            kept[-1]["1"]
        return found, kept[-1]["0@input[0]"] * 1

    assert torch.equal(vmap(of_one)(inputs())[1], inputs())
    with pytest.raises(StaleActivation, match=r"'0@input\[0\]' was captured inside"):
        kept[-1]["0@input[0]"]
    assert kept[-1]["1@bias"] is model[1].bias


def test_gradients_that_outlive_their_transform_raise():
    model, kept = make("Mlp"), []

    def keeps(x):
        with capture(model, "embed@grad") as acts:
            found = grad(lambda x: total(model(x)))(x)
        kept.append(acts)
        return found

    vmap(keeps)(inputs())
    with pytest.raises(StaleActivation, match="'embed@grad' was captured inside"):
        kept[0]["embed@grad"]


def test_a_handle_that_is_attached_inside_sees_the_full_batch():
    """It may outlive every transform, and acts in every thread."""
    model, handles = make("Mlp"), []

    def attaches(x):
        handles.append(capture(model, "embed").attach())
        return model(x)

    vmap(attaches)(inputs())
    assert torch.allclose(handles[0].cache["embed"], model.embed(inputs()))
    vmap(vmap(model))(inputs()[None])
    assert handles[0].cache["embed"].shape == (1, 5, 6)
    handles[0].remove()


@pytest.mark.parametrize("transform", AROUND)
@pytest.mark.parametrize(
    "options",
    [{"clone": True}, {"detach": True}, {"to": torch.float64}, {"map": lambda value: value.square().sum(-1)}],
    ids=["clone", "detach", "to", "map"],
)
def test_what_is_made_of_a_value_outside_belongs_to_no_transform(transform, options):
    model = make("Mlp")
    with capture(model, "embed", **options) as acts, capture(model, "embed") as plain:
        AROUND[transform](model)
    assert not is_wrapped(acts["embed"])
    value = plain["embed"]
    expected = options["map"](value) if "map" in options else value.to(options.get("to", value.dtype))
    assert torch.equal(acts["embed"], expected)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_inference_mode_around_vmap(where):
    model = make("Mlp")
    with torch.inference_mode():
        if where == "inside":
            _, acts = vmap(captured(model, "embed"))(inputs())
        else:
            with capture(model, "embed") as acts:
                vmap(model)(inputs())
        assert torch.allclose(acts["embed"], model.embed(inputs()))
