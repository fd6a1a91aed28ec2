"""Trees of hooks by themselves: their laws, and everything that a tree is put together from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gallery.plain import OwnNorm
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worlds import WORLDS

from nicehooks import NiceHooksError, TreeMismatch
from nicehooks.anatomies.norms import NormFormula, formula_of
from nicehooks.compat.transformer_debugger.places import PLACES
from nicehooks.errors import HooksMisuse, NoSuchHooks, UnsupportedModule
from nicehooks.hooktrees import (
    AtLayers,
    AttentionHooks,
    AutoencoderHooks,
    ConditionalHooks,
    FwdBwdHooks,
    HookCollection,
    Hooks,
    MLPHooks,
    NormalizationHooks,
    ResidualStreamHooks,
    ResidualStreamTorsoHooks,
    TransformerHooks,
    WrapperHooks,
    grad_hook_wrapper,
)


def add(number: float, x: Any, **_: Any) -> Any:
    return x + number


def double(x: Any, **_: Any) -> Any:
    return x * 2


# --- laws: order, and whose gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("fwd", "bwd", "fwd2"), ("fwd2", "bwd", "fwd"), ("bwd", "fwd2", "fwd")])
def test_fwd_then_bwd_then_fwd2_in_whatever_order_they_are_appended(order: tuple[str, ...]) -> None:
    events: list[str] = []
    hooks: dict[str, Callable[..., Any]] = {
        "fwd": lambda x: events.append("fwd") or x * 3,
        "bwd": lambda g: events.append(f"bwd {g.item():g}") or g + 1,
        "fwd2": lambda x: events.append("fwd2") or x * 5,
    }
    place = FwdBwdHooks()
    for name in order:
        getattr(place, f"append_{name}")(hooks[name])
    x = torch.tensor(2.0, requires_grad=True)
    y = place(x)
    (y * 7).backward()
    assert events == ["fwd", "fwd2", "bwd 35"]  # 7 · 5: of the value that fwd2 was given
    assert (y.item(), x.grad.item()) == (30.0, 108.0)  # (35 + 1) · 3


def test_gradient_hooks_run_from_the_last_to_the_first() -> None:
    place, seen = FwdBwdHooks(), []
    place.append_bwd(lambda g: seen.append("first") or g + 1).append_bwd(lambda g: seen.append("last") or g * 10)
    x = torch.tensor(2.0, requires_grad=True)
    place(x).backward()
    assert seen == ["last", "first"] and x.grad.item() == 11.0


@pytest.mark.parametrize("world", WORLDS)
def test_a_gradient_hook_leaves_the_value_in_every_world(world: str) -> None:
    x = torch.randn(3, 4)
    hook = grad_hook_wrapper(lambda gradient: None)
    found, expected = WORLDS[world](lambda x: hook(x * 2).sin(), x), WORLDS[world](lambda x: (x * 2).sin(), x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def cube(hook: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (hook(x * 1) ** 3).sum()


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "backward": lambda f, x: torch.autograd.grad(f(x), x)[0],
    "grad": lambda f, x: grad(f)(x),
    "vmap(grad)": lambda f, x: vmap(grad(f))(x),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
    "backward of vmap": lambda f, x: torch.autograd.grad(vmap(f)(x).sum(), x)[0],
    "jacrev": lambda f, x: jacrev(f)(x),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_gradient_hook_acts_in_every_kind_of_derivative(derivative: str) -> None:
    seen: list[torch.Size] = []
    tripled = grad_hook_wrapper(lambda gradient: seen.append(gradient.shape) or gradient * 3)
    x = torch.randn(2, 4, requires_grad=True)
    found = DERIVATIVES[derivative](partial(cube, tripled), x)
    assert torch.allclose(found, 9 * x**2)
    assert len(seen) == 1 and seen[0][-1] == 4


def test_a_gradient_hook_leaves_tangents() -> None:
    tripled = grad_hook_wrapper(lambda gradient: gradient * 3)
    x = torch.randn(4)
    assert torch.allclose(jvp(partial(cube, tripled), (x,), (torch.ones(4),))[1], (3 * x**2).sum())


def test_a_gradient_hook_acts_in_second_derivatives() -> None:
    """What it does to a gradient is differentiated, too."""
    squared = grad_hook_wrapper(lambda gradient: gradient**2)
    x = torch.randn(4, requires_grad=True)
    (first,) = torch.autograd.grad(squared(x * 1).sum() * 1 + (x**2).sum(), x, create_graph=True)
    assert torch.allclose(first, 1 + 2 * x)
    y = torch.tensor(2.0, requires_grad=True)
    z = squared(y) * y.detach()
    assert torch.autograd.grad(z, y)[0].item() == 4.0
    assert torch.allclose(torch.autograd.grad(first.sum(), x)[0], torch.full((4,), 2.0))


def test_a_gradient_hook_stands_before_an_in_place_layer() -> None:
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    tripled = grad_hook_wrapper(lambda gradient: gradient * 3)
    nn.functional.relu(tripled(x * 1), inplace=True).sum().backward()
    assert x.grad.tolist() == [0.0, 3.0]


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(2, dtype=torch.long)], ids=["frozen", "whole"])
def test_a_value_without_gradient_is_made_differentiable_if_it_can_be(value: Tensor) -> None:
    seen: list[Tensor] = []
    out = grad_hook_wrapper(seen.append)(value)
    assert torch.equal(out, value)
    assert out.requires_grad == value.is_floating_point()
    if out.requires_grad:
        (out * 3).sum().backward()
        assert seen[0].tolist() == [3.0, 3.0]


def test_a_gradient_hook_that_returns_none_leaves_the_gradient() -> None:
    x = torch.ones(2, requires_grad=True)
    FwdBwdHooks().append_bwd(lambda gradient: None)(x * 3).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_a_gradient_is_assigned_to() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    grad_hook_wrapper(lambda gradient: torch.arange(3))(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 2.0]] * 2
    with pytest.raises(TreeMismatch, match="does not broadcast"):
        grad_hook_wrapper(lambda gradient: torch.ones(5))(x).sum().backward()


def test_what_is_no_tensor_has_no_gradient() -> None:
    with pytest.raises(TreeMismatch, match="has no gradient that a hook could see"):
        grad_hook_wrapper(abs)([1, 2])


# --- lists of hooks ---------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_with_all_arguments() -> None:
    seen: list[Any] = []
    hooks = Hooks().append(lambda x, *args, **kwargs: seen.append((x, args, kwargs)) or x + 1).append(double)
    assert hooks.bind(layer=3)(1) == 4
    assert hooks.unbind(["layer"]).bind(b=2)(1, a=1) == 4
    assert seen == [(1, (), {"layer": 3}), (1, (), {"a": 1, "b": 2})]
    assert Hooks()(5) == 5 and Hooks().is_empty() and not hooks.is_empty()


def test_a_hook_that_returns_none_leaves_the_value() -> None:
    assert Hooks().append(lambda x: None).append(double)(4) == 8


def test_every_method_returns_what_it_was_called_on() -> None:
    for hooks in (Hooks(), WrapperHooks(lambda hook: hook), ConditionalHooks(lambda x: True), AtLayers(1)):
        assert hooks.append(abs) is hooks
        assert hooks.append_all(abs) is hooks
        assert hooks.bind(a=1) is hooks
        assert hooks.unbind(["a"]) is hooks
    place, tree = FwdBwdHooks(), TransformerHooks()
    assert place.append_fwd(abs) is place.append_bwd(abs) is place.append_fwd2(abs) is place
    assert tree.append_all(abs) is tree.append_to_path("mlp.pre_act.fwd", abs) is tree.bind(a=1) is tree.unbind(["a"])


def test_a_keyword_is_bound_once() -> None:
    hooks = Hooks().append(double).bind(layer=1)
    with pytest.raises(HooksMisuse, match="keyword 'layer' is bound to Hooks already, as 1") as caught:
        hooks.bind(other=2, layer=2)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, NiceHooksError)
    assert hooks.bound_kwargs == {"layer": 1}
    with pytest.raises(HooksMisuse, match="keyword 'layer' is bound to Hooks already"):
        hooks(1, layer=2)
    with pytest.raises(HooksMisuse, match="'head' is not bound to Hooks; the keywords that are: layer"):
        hooks.unbind(["layer", "head"])
    assert hooks.bound_kwargs == {"layer": 1}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hooks().append(3), r"Hooks.append\(hook\) takes a function of the value, not int"),
        (lambda: grad_hook_wrapper(3), r"grad_hook_wrapper\(hook\) takes a function of a gradient, not int"),
        (lambda: FwdBwdHooks().append_bwd(None), "WrapperHooks.append"),
        (lambda: WrapperHooks(3), r"WrapperHooks\(wrapper\) takes a function"),
        (lambda: WrapperHooks(lambda hook: 3).append(abs), "made int of a hook"),
        (lambda: ConditionalHooks(3), r"ConditionalHooks\(condition\) takes a function"),
        (lambda: AtLayers("12"), r"AtLayers\(layers\) takes the numbers of layers"),
        (lambda: AtLayers(True), r"AtLayers\(layers\) takes the numbers of layers"),
        (lambda: HookCollection().add_subhooks("a", abs), "takes Hooks or a HookCollection"),
        (lambda: AutoencoderHooks(3, abs), r"AutoencoderHooks\(encode=…\) takes a function, not int"),
        (lambda: AutoencoderHooks(abs, 3), r"AutoencoderHooks\(decode=…\) takes a function, not int"),
    ],
)
def test_what_is_no_function_is_refused_at_once(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        make()


def test_wrapped_hooks_are_wrapped_when_they_are_appended() -> None:
    hooks = WrapperHooks(lambda hook: lambda x: hook(hook(x))).append(double).append(partial(add, 1))
    assert hooks(1) == 6


def test_a_condition_sees_what_a_hook_sees() -> None:
    hooks = ConditionalHooks(lambda x, *, layer, scale=1: x * scale > layer).append(lambda x, **_: -x)
    assert (hooks(3, layer=2), hooks(3, layer=3), hooks.bind(layer=3, scale=2)(3)) == (-3, 3, -3)


def test_at_layers() -> None:
    hooks = AtLayers(range(1, 3)).append(double)
    assert [hooks(1, layer=layer) for layer in range(4)] == [1, 2, 2, 1]
    assert hooks.at_layers == [1, 2] and AtLayers(3).at_layers == [3]
    assert AtLayers(3).append(double).bind(layer=3)(1) == 2
    with pytest.raises(HooksMisuse, match=r"AtLayers\(\[1, 2\]\) was called without layer="):
        hooks(1)


def test_hooks_are_hooks() -> None:
    inner = AtLayers(1).append(double)
    place = FwdBwdHooks().append_fwd(inner).append_fwd(FwdBwdHooks().append_fwd(double))
    assert (place(1, layer=1), place(1, layer=0)) == (4, 2)
    gradients = FwdBwdHooks().append_bwd(AtLayers(1).append(double))
    x = torch.tensor(1.0, requires_grad=True)
    (gradients(x, layer=1) + gradients(x, layer=0)).backward()
    assert x.grad.item() == 3.0


# --- trees ------------------------------------------------------------------------------------------------------------

NAMES = {
    MLPHooks: ["pre_act", "post_act"],
    NormalizationHooks: ["post_mean_subtraction", "scale", "post_scale"],
    AttentionHooks: ["q", "k", "v", "qk_logits", "qk_softmax_denominator", "qk_probs", "v_out"],
    ResidualStreamTorsoHooks: [
        *("post_ln_attn", "ln_attn", "delta_attn", "post_attn"),
        *("post_ln_mlp", "ln_mlp", "delta_mlp", "post_mlp"),
    ],
    ResidualStreamHooks: ["post_emb", "torso", "ln_f", "post_ln_f"],
    TransformerHooks: ["mlp", "attn", "resid", "logits"],
    FwdBwdHooks: ["fwd", "bwd", "fwd2"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_each_collection_has_its_places(kind: type[HookCollection]) -> None:
    assert sorted(kind().all_hooks) == sorted(NAMES[kind])
    assert set(NAMES[kind]) <= set(dir(kind()))


def ends(node: Any, path: str = "") -> list[str]:
    if isinstance(node, FwdBwdHooks):
        return [path]
    return [end for name, child in node.all_hooks.items() for end in ends(child, f"{path}.{name}".lstrip("."))]


def test_the_places_that_can_be_bound_are_those_of_the_tree() -> None:
    assert sorted(ends(TransformerHooks())) == sorted(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_a_path_and_attributes_lead_to_the_same_place(place: str) -> None:
    tree: Any = TransformerHooks()
    tree.append_to_path(f"{place}.fwd2", double)
    node = tree
    for name in place.split("."):
        node = getattr(node, name)
    assert node is tree.at(place)
    assert node(4) == 8
    assert not tree.is_empty() and not node.is_empty()
    assert [end for end in PLACES if not tree.at(end).is_empty()] == [place]


def test_append_all_reaches_every_list() -> None:
    tree, calls = TransformerHooks(), []
    tree.append_all(lambda x: calls.append(1))
    assert not any(getattr(tree.at(place), name).is_empty() for place in PLACES for name in ("fwd", "bwd", "fwd2"))
    x = torch.ones(1, requires_grad=True)
    tree.attn.q(x).sum().backward()
    assert len(calls) == 3


def test_append_all_does_not_swallow_errors() -> None:
    class Strict(Hooks):
        def append(self, hook: Any) -> Any:
            raise AttributeError("a fault in append itself")

    with pytest.raises(AttributeError, match="a fault in append itself"):
        HookCollection().add_subhooks("strict", Strict()).append_all(abs)


def test_binding_binds_all_or_nothing() -> None:
    tree: Any = TransformerHooks().bind(a=1)
    assert tree.attn.q.fwd.bound_kwargs == tree.logits.bwd.bound_kwargs == {"a": 1}
    tree.logits.bind(b=1)
    with pytest.raises(HooksMisuse, match="keyword 'b'"):
        tree.bind(c=1, b=2)
    assert tree.attn.q.fwd.bound_kwargs == {"a": 1}
    with pytest.raises(HooksMisuse, match="'b' is not bound"):
        tree.unbind(["a", "b"])
    assert tree.attn.q.fwd.bound_kwargs == {"a": 1}
    assert tree.unbind("a").attn.q.fwd.bound_kwargs == {}


def test_a_list_that_hangs_in_two_places_is_bound_once() -> None:
    shared = Hooks().append(double)
    tree = HookCollection().add_subhooks("left", shared).add_subhooks("right", shared)
    assert tree.bind(a=1).left.bound_kwargs == {"a": 1}
    assert tree.unbind(["a"]).right.bound_kwargs == {}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("mpl.pre_act.fwd", r"TransformerHooks has no 'mpl' \(in 'mpl.pre_act.fwd'\); it has: mlp, attn, resid, logits."
         r" Did you mean 'mlp'\?"),
        ("mlp.pre.fwd", r"MLPHooks has no 'pre' \(in 'mlp.pre.fwd'\); it has: pre_act, post_act."),
        ("mlp.pre_act", r"'mlp.pre_act' is a FwdBwdHooks, not a list of hooks. Say to which one, of "
         r"\['mlp.pre_act.fwd', 'mlp.pre_act.bwd', 'mlp.pre_act.fwd2'\]"),
        ("logits.fwd.more", "there is nothing below 'logits.fwd', which is a list of hooks"),
        ("", "TransformerHooks has no ''; it has"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_says_what_there_is(path: str, says: str) -> None:
    with pytest.raises(NoSuchHooks, match=says):
        TransformerHooks().append_to_path(path, abs)


def test_a_name_that_is_not_there_is_an_attribute_error_with_the_names_that_are() -> None:
    tree = TransformerHooks()
    with pytest.raises(NoSuchHooks, match=r"MLPHooks has no 'post'; it has: pre_act, post_act\.") as caught:
        tree.mlp.post.append_fwd(abs)
    assert isinstance(caught.value, AttributeError) and isinstance(caught.value, LookupError)
    assert not hasattr(tree, "nothing") and getattr(tree, "nothing", 3) == 3


@pytest.mark.parametrize("name", ["bind", "all_hooks", "a.b", "is_empty", ""])
def test_a_name_that_could_not_be_read_is_refused(name: str) -> None:
    with pytest.raises(HooksMisuse, match="cannot be a place in a HookCollection"):
        HookCollection().add_subhooks(name, Hooks())


def test_subhooks_take_the_place_of_what_was_there() -> None:
    tree: Any = MLPHooks().append_to_path("pre_act.fwd", double)
    assert tree.add_subhooks("pre_act", FwdBwdHooks()).is_empty()
    assert list(tree.all_hooks) == ["pre_act", "post_act"]


def test_a_tree_shows_itself() -> None:
    tree: Any = ResidualStreamHooks()
    tree.post_emb.append_fwd(AtLayers([1]).append(abs)).append_bwd(abs).fwd.bind(layer=1)
    tree.all_hooks = {name: tree.all_hooks[name] for name in ("post_emb", "ln_f")}
    tree.ln_f.all_hooks.clear()
    assert repr(tree) == (
        "ResidualStreamHooks\n"
        "    post_emb\n"
        "        post_emb.fwd {'layer': 1}\n"
        "            AtLayers([1])\n"
        "                <built-in function abs>\n"
        "        post_emb.bwd\n"
        "            grad_hook_wrapper(<built-in function abs>)\n"
        "        post_emb.fwd2\n"
        "    ln_f"
    )
    assert repr(Hooks().append(abs).bind(a=1)) == "Hooks {'a': 1}\n    <built-in function abs>"


# --- copies -----------------------------------------------------------------------------------------------------------


class Named(HookCollection):
    """A collection that takes arguments, and has more attributes than a collection has."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name_of_it = name
        self.size = size
        self.add_subhooks("leaf", FwdBwdHooks())


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, x: Any, **_: Any) -> None:
        self.seen.append(x)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_hooks_of_its_own(way: str) -> None:
    tree: Any = TransformerHooks()
    tree.mlp.pre_act.append_fwd(AtLayers(1).append(double)).append_bwd(double).bind(layer=1)
    tree.add_subhooks("own", Named("n", 3))
    new = COPIES[way](tree)
    new.mlp.pre_act.append_fwd(double)
    new.logits.append_fwd(double)
    assert (tree.mlp.pre_act(1.0 * torch.ones(())).item(), new.mlp.pre_act(torch.ones(())).item()) == (2, 4)
    assert tree.logits.is_empty()
    assert (type(new.own), new.own.name_of_it, new.own.size) == (Named, "n", 3)
    assert new.mlp.pre_act.bwd.bound_kwargs == {"layer": 1}
    assert repr(new.own) == repr(tree.own)


def test_two_names_of_one_list_stay_one_in_a_copy() -> None:
    shared = Hooks()
    tree = copy.deepcopy(HookCollection().add_subhooks("a", shared).add_subhooks("b", shared))
    assert tree.a is tree.b is not shared


def test_a_copy_of_a_hook_with_a_state_has_a_state_of_its_own() -> None:
    recorder = Recorder()
    tree: Any = MLPHooks().append_to_path("pre_act.fwd", recorder)
    copy.deepcopy(tree).pre_act(1)
    assert recorder.seen == []


# --- norms ------------------------------------------------------------------------------------------------------------


def norms() -> dict[str, tuple[nn.Module, NormFormula]]:
    return {
        "LayerNorm": (nn.LayerNorm(6, eps=1e-3), NormFormula(1e-3, True, 0.0)),
        "without bias": (nn.LayerNorm(6, bias=False), NormFormula(1e-5, True, 0.0)),
        "without weights": (nn.LayerNorm(6, elementwise_affine=False), NormFormula(1e-5, True, 0.0)),
        "a class of its own": (OwnNorm(6), NormFormula(1e-5, True, 0.0)),
        "RMSNorm": (nn.RMSNorm(6), NormFormula(None, False, 0.0)),
        "Llama": (LlamaRMSNorm(6, eps=1e-4), NormFormula(1e-4, False, 0.0)),
        "Gemma": (GemmaRMSNorm(6), NormFormula(1e-6, False, 1.0)),
    }


@pytest.mark.parametrize("name", norms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_in_its_steps_equals_the_norm(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, formula = norms()[name]
    for parameter in norm.to(dtype).parameters():
        nn.init.normal_(parameter)
    assert formula_of(norm) == formula
    x = torch.randn(2, 3, 6).to(dtype) * 2 + 1
    wide = x.float() if dtype == torch.bfloat16 else x
    wide = wide - wide.mean(-1, keepdim=True) if formula.centred else wide
    found = formula.finished(norm, wide / formula.scale_of(wide), dtype)
    assert found.dtype == dtype
    assert torch.allclose(found, norm(x), atol=0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    "other", [nn.Identity(), nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.LayerNorm((2, 6)), nn.Dropout()]
)
def test_what_is_no_norm_over_the_last_dimension_is_refused(other: nn.Module) -> None:
    with pytest.raises(UnsupportedModule, match=f"{type(other).__name__} is no normalization whose steps are known"):
        formula_of(other)


# --- autoencoders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def coder() -> tuple[nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 8), nn.Linear(8, 4), torch.randn(3, 4, requires_grad=True)


def test_an_autoencoder_reconstructs(coder: Any) -> None:
    encode, decode, x = coder
    assert torch.equal(AutoencoderHooks(encode, decode)(x), decode(encode(x)))
    assert torch.allclose(AutoencoderHooks(encode, decode, add_error=True)(x), x, atol=1e-6)


@pytest.mark.parametrize("add_error", [False, True])
def test_the_hooks_of_an_autoencoder_see_their_values(coder: Any, add_error: bool) -> None:
    encode, decode, x = coder
    hooks: Any = AutoencoderHooks(encode, decode, add_error)
    seen: dict[str, Any] = {}
    for name in ("latents", "reconstruction", "error"):
        hooks.append_to_path(f"{name}.fwd", lambda value, layer, name=name: seen.update({name: (layer, value)}))
    hooks(x, layer=5)
    assert {name: layer for name, (layer, _) in seen.items()} == {"latents": 5, "reconstruction": 5, "error": 5}
    assert torch.equal(seen["latents"][1], encode(x))
    assert torch.equal(seen["reconstruction"][1], decode(encode(x)))
    assert torch.equal(seen["error"][1], x - decode(encode(x)))


def test_hooks_on_latents_change_the_reconstruction_and_not_the_error(coder: Any) -> None:
    encode, decode, x = coder
    hooks: Any = AutoencoderHooks(encode, decode, add_error=True)
    hooks.latents.append_fwd(double)
    error = x - decode(encode(x))
    assert torch.allclose(hooks(x), decode(2 * encode(x)) + error, atol=1e-6)
    hooks.error.append_fwd(lambda value: value * 0)
    assert torch.allclose(hooks(x), decode(2 * encode(x)), atol=1e-6)
    hooks.reconstruction.append_fwd(double)
    assert torch.allclose(hooks(x), 2 * decode(2 * encode(x)), atol=1e-6)


def test_without_add_error_the_error_is_of_the_hooked_reconstruction_and_has_no_effect(coder: Any) -> None:
    encode, decode, x = coder
    hooks: Any = AutoencoderHooks(encode, decode)
    seen: list[Tensor] = []
    hooks.reconstruction.append_fwd(double)
    hooks.error.append_fwd(lambda value: seen.append(value)).append_fwd(lambda value: value * 100)
    assert torch.equal(hooks(x), 2 * decode(encode(x)))
    assert torch.equal(seen[0], x - 2 * decode(encode(x)))


def test_gradients_split_between_reconstruction_and_error(coder: Any) -> None:
    """The gradient at the latents is that through the reconstruction; all together the value is what it was."""
    encode, decode, x = coder
    hooks: Any = AutoencoderHooks(encode, decode, add_error=True)
    seen: dict[str, Tensor] = {}
    for name in ("latents", "reconstruction", "error"):
        hooks.append_to_path(f"{name}.bwd", lambda gradient, name=name: seen.update({name: gradient}))
    weights = torch.randn(3, 4)
    (hooks(x) * weights).sum().backward()
    assert torch.allclose(seen["reconstruction"], weights) and torch.allclose(seen["error"], weights)
    assert torch.allclose(seen["latents"], weights @ decode.weight, atol=1e-6)
    assert torch.allclose(x.grad, weights, atol=1e-5)
    x.grad = None
    hooks.error.append_bwd(lambda gradient: gradient * 0)
    (hooks(x) * weights).sum().backward()
    assert torch.allclose(x.grad, weights @ decode.weight @ encode.weight, atol=1e-5)


def test_latents_that_a_hook_has_kept_are_those_of_the_reconstruction(coder: Any) -> None:
    encode, decode, x = coder
    hooks: Any = AutoencoderHooks(encode, decode, add_error=True)
    kept: list[Tensor] = []
    hooks.latents.append_fwd(kept.append)
    (gradient,) = torch.autograd.grad(hooks(x).sum(), kept[0])
    assert torch.allclose(gradient, decode.weight.sum(0).expand(3, 8), atol=1e-6)


class Subtractions(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "sub" in func.__name__
        return func(*args, **(kwargs or {}))


def test_an_error_that_nobody_looks_at_costs_nothing(coder: Any) -> None:
    encode, decode, x = coder
    with Subtractions() as subtractions:
        AutoencoderHooks(encode, decode)(x)
    assert subtractions.count == 0
    decoded: list[int] = []
    AutoencoderHooks(encode, lambda latents: decoded.append(1) or decode(latents))(x)
    AutoencoderHooks(encode, lambda latents: decoded.append(2) or decode(latents), add_error=True)(x)
    assert decoded == [1, 2, 2]


def test_a_copy_of_an_autoencoder_shares_the_autoencoder(coder: Any) -> None:
    encode, decode, x = coder
    tree: Any = MLPHooks()
    tree.post_act.append_fwd(AutoencoderHooks(encode, decode, add_error=True))
    tree.add_subhooks("again", AutoencoderHooks(encode.forward, decode))
    new = copy.deepcopy(tree)
    (inner,) = new.post_act.fwd._hooks
    assert inner.encode is encode and inner.decode is decode and inner.add_error
    assert new.again.encode is tree.again.encode
    inner.latents.append_fwd(double)
    assert torch.allclose(tree.post_act(x), x, atol=1e-6)
    assert not torch.allclose(new.post_act(x), x, atol=1e-6)
    (unpickled,) = pickle.loads(pickle.dumps(MLPHooks().append_to_path("pre_act.fwd", inner))).pre_act.fwd._hooks
    assert torch.allclose(unpickled(x), inner(x))


def test_an_autoencoder_acts_under_transforms(coder: Any) -> None:
    encode, decode, x = coder
    hooks: Any = AutoencoderHooks(encode, decode, add_error=True)
    hooks.latents.append_fwd(double).append_bwd(lambda gradient: gradient * 3)
    x = x.detach()
    found = vmap(grad(lambda row: hooks(row).sin().sum()))(x)
    rows = torch.stack([grad(lambda row: hooks(row).sin().sum())(row) for row in x])
    assert torch.allclose(found, rows, atol=1e-5)


@pytest.mark.parametrize(
    ("encode", "decode", "says"),
    [
        (lambda x: (x, "info"), lambda x: x, "encode made .* of the value, not a tensor of latents"),
        (lambda x: x, lambda x: x[..., :1], r"decode made Tensor\[3, 1\].* of the latents of Tensor\[3, 4\]"),
        (lambda x: x, lambda x: None, "decode made None"),
    ],
)
def test_what_comes_out_of_an_autoencoder_has_to_fit(encode: Any, decode: Any, says: str, coder: Any) -> None:
    for add_error in (False, True):
        with pytest.raises(TreeMismatch, match=says):
            AutoencoderHooks(encode, decode, add_error)(coder[2])


def test_the_places_in_the_torso_have_the_order_of_transformer_debugger() -> None:
    assert list(TransformerHooks().resid.torso.all_hooks) == [
        "post_ln_attn",
        "ln_attn",
        "delta_attn",
        "post_attn",
        "ln_mlp",
        "post_ln_mlp",
        "delta_mlp",
        "post_mlp",
    ]
