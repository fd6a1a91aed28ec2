"""Laws 7 and 8. What cannot be done says so; what is not asked for is not done."""

from __future__ import annotations

import re
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from gallery.calling import Half
from gallery.checkpointed import Checkpointed
from gallery.overwriting import Overwriting
from gallery.returning import WithNoneAndNothing
from torch import nn
from torch.utils.checkpoint import checkpoint
from worlds import WORLDS, inputs, make, state

from nicehooks import (
    CheckpointWarning,
    NiceHooksWarning,
    NotCalledWarning,
    NotReachedWarning,
    PathError,
    SiteNotFound,
    SiteNotReached,
    StaleActivation,
    TreeMismatch,
    UnsupportedModule,
    ablate,
    capture,
    edit,
    patch,
    select,
    steer,
    suspend,
)

# --- nothing matches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["nowhere", "blocks.33", "blocks.{0,7}", "*.nothing", nn.LSTM, lambda name, module: False]
)
def test_a_path_that_matches_nothing_raises_beside_good_ones(where):
    model = make("Mlp")
    with pytest.raises(SiteNotFound), capture(model, "head", where):
        pytest.fail("entered")
    with pytest.raises(SiteNotFound), patch(model, {"head": 1.0, where: 1.0}):
        pytest.fail("entered")


def test_a_container_is_no_site():
    model = make("Mlp")
    with pytest.raises(
        SiteNotFound, match=r"'blocks' is a ModuleList, which is never called itself.\n  its children: 'blocks.\*'"
    ):
        capture(model, "blocks").__enter__()
    with capture(model, "**") as acts:
        model(inputs())
    assert "blocks" not in list(acts)


def test_an_empty_list_is_no_selection():
    model = make("Mlp")
    for context in (capture(model, []), ablate(model, []), edit(model, (), abs), capture(model, [[]])):
        with pytest.raises(SiteNotFound, match="was given an empty list of sites"), context:
            pytest.fail("entered")
    with pytest.raises(SiteNotFound, match="was given an empty list of sites"), patch(model, {}):
        pytest.fail("entered")
    with capture(model, False) as acts, ablate(model, False):
        model(inputs())
    assert not acts


def test_ablate_without_a_path_says_what_it_says_of_an_empty_list():
    model, heads = make("Mlp"), []
    with pytest.raises(TypeError) as of_none:
        ablate(model, *heads)
    with pytest.raises(SiteNotFound) as of_empty, ablate(model, heads):
        pass
    said = "ablate(model, …) was given an empty list of sites, perhaps by a filter. To select none, write False."
    assert str(of_none.value) == str(of_empty.value) == said


def test_a_wildcard_passes_over_modules_that_return_nothing():
    model = WithNoneAndNothing()
    with ablate(model, "pair[0]"), ablate(model, "**@input[0]"):
        assert not model(inputs()).any()
    with ablate(model, lambda name, module: True):
        assert not model(inputs()).any()
    with pytest.raises(TreeMismatch, match="came where None stands"), ablate(model, "**", "nothing"):
        model(inputs())


@pytest.mark.parametrize("path", ["pair[1]", "nothing"])
def test_a_number_needs_a_tensor_to_fill(path):
    for context in (ablate(WithNoneAndNothing(), path), patch(WithNoneAndNothing(), path, 5.0)):
        with pytest.raises(TreeMismatch, match="came where None stands, in which there is no tensor"), context:
            context.model(inputs())


@pytest.mark.parametrize("context", [ablate, lambda m, p: patch(m, p, 1.0), lambda m, p: steer(m, p, torch.ones(1))])
def test_a_region_that_is_always_empty_was_not_reached(context):
    model = make("Mlp")
    with pytest.raises(SiteNotReached, match="was empty every time"), context(model, "head[:, 50:60]"):
        model(inputs())
    with context(model, "head[3:]"):  # some of the time is enough
        model(inputs()[:2])
        model(inputs())


def test_steering_whole_numbers_by_fractions_says_so():
    class Whole(nn.Module):
        def forward(self, x):
            return x.long()

    model = nn.Sequential(Whole())
    with steer(model, "0", torch.tensor(2), scale=3):
        assert torch.equal(model(torch.ones(2)), torch.tensor([7, 7]))
    for vector, scale in ((torch.tensor(0.6), 1), (torch.tensor(1), 0.5)):
        with pytest.raises(TreeMismatch, match="would be rounded"), steer(model, "0", vector, scale=scale):
            model(torch.ones(2))


@pytest.mark.parametrize("write", [lambda v: v.copy_(v.flip(0)), lambda v: v.copy_(v.roll(1, 1)), lambda v: v.neg_()])
def test_values_that_only_change_places_are_noticed_under_inference_mode(write):
    class Writes(nn.Module):
        def forward(self, x):
            write(x)
            return x

    model = nn.Sequential(nn.Linear(4, 4), Writes())
    with torch.inference_mode(), capture(model, "0") as acts:
        model(inputs())
    with pytest.raises(StaleActivation):
        acts["0"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_that_a_checkpoint_cannot_tell_apart_are_refused(reentrant):
    model = Checkpointed(reentrant)
    x = inputs().requires_grad_()
    with pytest.raises(UnsupportedModule, match="several steps or calls"), ablate(model, "inner.1[0]", steps=[0, 1]):
        (model(x) + model(x)).sum().backward()


def test_a_parameter_has_no_calls():
    model = make("Mlp")
    for context in (ablate(model, "head#1@weight"), ablate(model, "head@weight", calls=0)):
        with pytest.raises(UnsupportedModule, match="a parameter has no calls"), context:
            pytest.fail("entered")


def test_a_module_that_was_replaced_is_found_at_the_next_entry():
    model = make("Mlp")
    context = capture(model, "head")
    with context:
        model(inputs())
    model.head = nn.Linear(6, 3)
    with context as acts:
        model(inputs())
    assert acts["head"].shape == (5, 3)
    with pytest.raises(SiteNotReached, match="may hold another module under this name by now"), context:
        model.head = nn.Linear(6, 3)
        model(inputs())


def test_wrong_arguments_are_noticed_at_once():
    model = make("Mlp")
    for wrong in (
        lambda: capture("model", "head"),
        lambda: edit(model, "head", 3),
        lambda: patch(model, "head"),
        lambda: ablate(model),
        lambda: patch(model, {"head": 1}, 2),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="keep="):
        capture(model, "head", keep="some")
    with pytest.raises(TypeError, match="steps="):
        edit(model, "head", abs, steps="1").__enter__()
    with pytest.raises(ValueError, match="counting from the end"):
        edit(model, "head", abs, steps=slice(-2, None)).__enter__()


# --- not reached, not called ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context", [capture, ablate, lambda m, p: patch(m, p, 1.0), lambda m, p: steer(m, p, torch.ones(4))]
)
def test_a_site_that_is_not_reached_raises_on_exit(context):
    model = Half()
    before = state(model)
    with pytest.raises(SiteNotReached, match="'unused' was never reached in Half"), context(model, "unused"):
        model(inputs())
    assert state(model) == before


def test_also_beside_reached_ones_and_in_braces():
    model = Half()
    for where in (["used", "unused"], "{used,unused}", ["*", "unused"], select(model, "*")):
        with pytest.raises(SiteNotReached, match="unused"), capture(model, where):
            model(inputs())


def test_a_wildcard_raises_only_if_none_was_reached():
    model = Half()
    with capture(model, "*", nn.Linear, lambda name, module: "used" in name) as acts:
        model(inputs())
    assert list(acts) == ["used"]
    with pytest.raises(SiteNotReached), capture(model, "rest.*"):
        model(inputs())


def test_never_over_an_exception_that_is_on_its_way():
    model = Half()
    with pytest.raises(ZeroDivisionError), capture(model, "unused"):
        model(inputs())
        _ = 1 / 0


def test_the_reason_is_given_for_attention():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = inputs()[None]
    with pytest.raises(SiteNotReached) as caught, capture(model, "out_proj"):
        model(x, x, x)
    assert str(caught.value) == (
        "'out_proj' was never reached in MultiheadAttention: nn.MultiheadAttention hands the weights of its out_proj "
        "to a fused function and never calls it. What comes out of it is the output of the attention: '[0]'.\n"
        "  while capture(model, 'out_proj') was active"
    )


def test_a_filter_that_never_admits_counts_as_not_reached():
    model = make("Mlp")
    for context in (edit(model, "head", abs, steps=3), edit(model, "head#1", abs), capture(model, "head#2")):
        with pytest.raises(SiteNotReached, match=r"not once with (steps=3|call=1|call=2)"), context:
            model(inputs())
    with edit(model, "head", abs, steps=lambda step: False):
        model(inputs())


@pytest.mark.parametrize("context", [capture, ablate])
def test_a_context_without_a_call_warns(context):
    model = make("Mlp")
    with pytest.warns(NotCalledWarning, match="the model was not called in it"), context(model, "head"):
        pass
    with pytest.warns(NotCalledWarning, match="inside suspend"), context(model, "head"), suspend(model):
        model(inputs())


def test_calling_a_part_of_the_model_is_calling_it():
    model = make("Mlp")
    with capture(model, "blocks.0.*") as acts:
        model.blocks[0](torch.ones(2, 6))
    assert list(acts) == ["blocks.0.0", "blocks.0.1"]


# --- stale values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_an_overwritten_value_raises_when_it_is_read(world):
    """In every world, captured outside of it; `clone=True` has the true value."""
    model = Overwriting()
    with capture(model, "*") as acts, capture(model, "*", clone=True) as true:
        WORLDS[world](model, inputs())
    for key in ("first", "second", "pair", "pair[1]"):
        with pytest.raises(StaleActivation, match=r"clone=True"):
            acts[key]
    assert acts["relu"] is not None
    if world == "eager":
        assert torch.equal(true["first"], model.first(inputs()))
        assert torch.equal(true["second"], model.second(model.first(inputs()).relu()))


@pytest.mark.parametrize(
    "read",
    [
        lambda acts: acts["first"],
        lambda acts: acts["first[:, -1]"],
        lambda acts: acts.get("first"),
        lambda acts: list(acts.values()),
        lambda acts: dict(acts),
        lambda acts: {**acts},
        lambda acts: acts.pop("first"),
        lambda acts: acts.map(torch.sin),
        lambda acts: acts + acts,
        lambda acts: torch.utils._pytree.tree_leaves(acts),
    ],
)
def test_there_is_no_way_around_it(read):
    model = Overwriting()
    with capture(model, "first") as acts:
        model(inputs())
    with pytest.raises(StaleActivation):
        read(acts)


def test_live_values_inside_a_transform_too():
    model = Overwriting()

    def inside(x):
        with capture(model, "first") as acts:
            model(x)
        return acts["first"]

    with pytest.raises(StaleActivation):
        torch.vmap(inside)(inputs())


@pytest.mark.parametrize("keep", ["first", "last", "all"])
def test_every_way_of_keeping_notices(keep):
    model = Overwriting()
    with capture(model, "first", keep=keep) as acts:
        model(inputs())
    with pytest.raises(StaleActivation):
        acts["first"]


def test_a_value_put_in_by_the_user_is_never_stale():
    model = Overwriting()
    with capture(model, "first") as acts:
        model(inputs())
    acts["first"] = value = torch.zeros(3)
    value += 1
    assert acts["first"] is value


# --- TorchScript, fast paths, inference mode --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own: refusing them is what is tested
def test_torchscript_is_refused_by_name():
    model = make("Mlp")
    model.head = torch.jit.script(nn.Linear(6, 2))
    for where in ("head", "**", nn.Module, model.head):
        with (
            pytest.raises(UnsupportedModule, match="'head' is a RecursiveScriptModule: TorchScript"),
            capture(model, where),
        ):
            pytest.fail("entered")
    with pytest.raises(UnsupportedModule, match="''"), capture(torch.jit.trace(make("Mlp"), inputs()), ""):
        pytest.fail("entered")
    with capture(model, "embed", "blocks.*") as acts:
        model(inputs())
    assert len(acts) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_fast_path_of_the_encoder_does_not_hide_its_submodules(mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    with mode():
        clean = model(x)
        with capture(model, "layers.*.linear1", "layers.0.self_attn[0]") as acts:
            out = model(x)
        assert torch.allclose(out, clean, atol=1e-6)
        assert list(acts) == ["layers.0.self_attn[0]", "layers.0.linear1", "layers.1.linear1"]
        with ablate(model, "layers.1.linear2"):
            assert not torch.allclose(model(x), clean, atol=1e-3)
        with capture(model, "layers.0") as acts:  # nothing inside a layer is asked for, but it is inside the encoder
            model(x)
        assert acts["layers.0"].shape == x.shape
        assert torch.equal(model(x), clean)


def test_a_value_of_inference_mode_can_be_patched_into_autograd():
    model = make("Mlp")
    with torch.inference_mode(), capture(model, "blocks.*") as acts:
        model(inputs())
    with patch(model, acts):
        model(inputs()).sum().backward()
    with patch(model, {"blocks.1[:, 0]": acts["blocks.1"][:, 0]}), steer(model, "embed", acts["blocks.0"]):
        model(inputs()).sum().backward()
    assert model.head.weight.grad is not None
    with pytest.raises(RuntimeError, match="make a clone to get a normal tensor"):
        (acts["blocks.0"] * model.embed.weight.sum()).sum().backward()
    (acts.clone()["blocks.0"] * model.embed.weight.sum()).sum().backward()


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_edit_in_a_checkpointed_region_warns_that_backward_must_run_inside(reentrant):
    model = Checkpointed(reentrant)
    x = inputs().requires_grad_()
    with (
        pytest.warns(NiceHooksWarning, match="backward inside the context"),
        edit(model, "inner.1", lambda value: value * 2),
    ):
        out = model(x)
    del out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with edit(model, "inner.1", lambda value: value * 2):
            model(x).sum().backward()
    found = x.grad.clone()
    x.grad = None
    with edit(model.inner, "1", lambda value: value * 2):
        model.inner(x).sum().backward()
    assert torch.equal(found, x.grad)


# --- shapes and structures --------------------------------------------------------------------------------------------


def test_dtype_is_cast_and_shape_is_broadcast_as_in_an_assignment():
    model = make("Mlp")
    with (
        patch(model, {"embed[:, 0]": torch.arange(5), "head": torch.ones(1, 1, 2, dtype=torch.float64)}),
        capture(model, "*") as acts,
    ):
        out = model(inputs())
    assert out.dtype == torch.float32
    assert (out == 1).all()
    assert torch.equal(acts["embed"][:, 0], torch.arange(5.0))


def test_a_wrong_shape_names_both_and_the_path():
    model = make("Mlp")
    with pytest.raises(TreeMismatch) as caught, patch(model, "blocks.1[:, 0]", torch.ones(7)):
        model(inputs())
    assert str(caught.value) == "patch at 'blocks.1[:, 0]': Tensor[7] float32 does not broadcast to Tensor[5] float32."


def test_a_tensor_where_the_module_returns_a_tuple():
    model = nn.LSTM(4, 3)
    with pytest.raises(TreeMismatch) as caught, edit(model, "", lambda value: value[0] * 2):
        model(inputs())
    assert str(caught.value) == (
        "edit at '': Tensor[5, 3] float32 came where "
        "(Tensor[5, 3] float32, (Tensor[1, 3] float32, Tensor[1, 3] float32)) stands.\n"
        "  the value there is (Tensor[5, 3] float32, (Tensor[1, 3] float32, Tensor[1, 3] float32)); "
        "choose a part of it:\n"
        '    edit(model, "[0]", …)'
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("head[:, 9]", "capture at 'head[:, 9]': [:, 9] is out of range for Tensor[5, 2] float32."),
        ("head['x']", "capture at 'head['x']': ['x'] is a key, but the value is Tensor[5, 2] float32."),
        ("head/5", "capture at 'head/5': /5 does not divide the last dimension of Tensor[5, 2] float32."),
        ("head[0][0][0]", "capture at 'head[0][0][0]': [0] is out of range for Tensor[] float32."),
        ("head@input[3]", None),
        ("head@input['nothing']", None),
    ],
)
def test_a_subscript_that_does_not_fit(path, text):
    model = make("Mlp")
    with pytest.raises(TreeMismatch) as caught, capture(model, path):
        model(inputs())
    if text is not None:
        assert str(caught.value) == text.replace("'head['x']'", "\"head['x']\"")
    assert path.partition("@")[0].partition("[")[0].partition("/")[0] in str(caught.value)


def test_a_path_with_a_mistake_is_noticed_on_entry():
    with (
        pytest.raises(PathError, match=r"this bracket is never closed\n    head\[:, 0\n        \^"),
        capture(make("Mlp"), "head[:, 0"),
    ):
        pytest.fail("entered")


def test_what_a_capture_that_stops_has_kept_from_running_is_said_so():
    model = make("Mlp")
    with (
        pytest.raises(SiteNotReached, match="a capture with stop=True ended the forward before it"),
        capture(model, "blocks.0", stop=True),
        capture(model, "head"),
    ):
        model(inputs())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_context_that_is_a_part_of_the_checkpointed_region_does_not_warn(reentrant):
    """Backward runs it again along with the region."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.ones(3, 4, requires_grad=True)

    def doubled(x):
        with edit(model, "0", lambda value: value * 2):
            return model(x)

    (expected,) = torch.autograd.grad(doubled(x).sum(), x)
    checkpoint(doubled, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)

    def around_another(x):
        with edit(model, "0", lambda value: value * 2):
            return checkpoint(model, x, use_reentrant=False)

    with pytest.warns(CheckpointWarning):  # the inner region is run again without it
        checkpoint(around_another, x, use_reentrant=False)


# --- another forward in the place of ours -----------------------------------------------------------------------------


def _anew(module):
    module.forward = lambda x: x


def _anew_as_a_method(module):
    module.forward = MethodType(lambda self, x: x, module)


def _wrapped(module):
    inner = module.forward
    module.forward = lambda x: inner(x) * 2


def _wrapped_by_an_object(module):
    class Twice:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return self.inner(x) * 2

    module.forward = partial(Twice(module.forward))


def _taken_away(module):
    del module.forward


def _hooked_by_accelerate(module):
    add_hook_to_module(module, ModelHook())


@pytest.mark.parametrize(("replace", "how"), [
    (_anew, "replaced by _anew.<locals>.<lambda>"),
    (_anew_as_a_method, "replaced by _anew_as_a_method.<locals>.<lambda>"),
    (_taken_away, "taken away"),
])  # fmt: skip
@pytest.mark.parametrize("attached", [False, True])
def test_a_forward_that_takes_the_place_of_ours_is_told_of(replace, how, attached):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.ones(2, 3)
    text = f"inside the context the forward of '0' (Linear) was {how}. From then on nothing acted there."
    handle = ablate(model, "0")
    handle.attach() if attached else handle.__enter__()
    model(x)
    replace(model[0])
    assert model[0](x).any()
    with pytest.warns(NotReachedWarning, match=re.escape(text)):
        handle.remove()


@pytest.mark.parametrize("replace", [_wrapped, _wrapped_by_an_object, _hooked_by_accelerate])
def test_a_forward_that_calls_ours_is_not(replace):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with ablate(model, "0"):
        replace(model[0])
        assert not model[0](torch.ones(2, 3)).any()
        model(torch.ones(2, 3))
