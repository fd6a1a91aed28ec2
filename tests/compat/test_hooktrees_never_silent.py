"""What a tree of hooks that is bound to a model says where its hooks would do nothing."""

from __future__ import annotations

import pytest
import torch
from gallery.families import IDS, MODELS, small
from gallery.plain import Odd
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
)
from tree_hooks import logits_of, tree_of

from nicehooks import NotCalledWarning, SiteNotReached, UnsupportedModule, capture
from nicehooks.errors import HooksMisuse
from nicehooks.hooktrees import AtLayers, FwdBwdHooks, Hooks, TransformerHooks, grad_hook_wrapper


def test_a_gradient_that_does_not_come_is_an_error_on_leaving() -> None:
    model, calls, losses = small(), [], []
    tree = tree_of(["mlp.post_act"], lambda _: lambda gradient, layer: calls.append(layer), "bwd")
    says = r"gradient hooks at 'mlp.post_act' were never called: no gradient came by"
    with pytest.raises(SiteNotReached, match=says):
        with tree.on(model):
            losses.append(logits_of(model).sum())
    losses[0].backward()  # outside: the hooks do nothing any more
    model.zero_grad()
    assert calls == []


def test_a_gradient_in_some_layers_is_enough() -> None:
    model, calls = small(), []
    tree = tree_of(["resid.torso.post_mlp"], lambda _: lambda gradient, layer: calls.append(layer), "bwd")
    with tree.on(model), capture(model, "transformer.h.0") as acts:
        logits_of(model)
        acts["transformer.h.0"].sum().backward()
    model.zero_grad()
    assert calls == [0]


def test_a_model_that_is_not_called_warns() -> None:
    with pytest.warns(NotCalledWarning, match=r"hooks.on\(model\) was left, but the model was not called in it"):
        with tree_of(["logits"], lambda _: abs).on(small()):
            pass


def test_a_place_that_no_layer_reaches_is_an_error_on_leaving() -> None:
    model = small()
    with pytest.raises(SiteNotReached, match=r"hooks at 'logits': 'lm_head' was never reached"):
        with tree_of(["logits", "mlp.post_act"], lambda _: lambda value, **_: None).on(model):
            model.transformer(IDS)


def test_hooks_that_come_too_late_are_an_error_on_leaving() -> None:
    tree = tree_of(["logits"], lambda _: lambda value: None)
    with pytest.raises(HooksMisuse, match=r"hooks were appended at 'mlp.post_act' inside hooks.on\(model\)"):
        with tree.on(small()):
            tree.mlp.post_act.append_fwd(abs)
            logits_of(small())
    seen: list[Tensor] = []
    early = tree_of(["logits"], lambda _: lambda value: None)
    with early.on(small()):
        early.logits.append_fwd(seen.append)  # where there are hooks already, one more acts at once
        logits_of(small())
    assert len(seen) == 1


def test_hooks_in_no_place_of_a_transformer_are_an_error_on_entry() -> None:
    tree = TransformerHooks()
    tree.resid.torso.add_subhooks("post_everything", FwdBwdHooks().append_fwd(abs))
    with pytest.raises(HooksMisuse, match=r"'resid.torso.post_everything' has hooks, but is no place in a transformer"):
        tree.on(small()).__enter__()


def test_a_layer_that_is_bound_by_hand_is_an_error_on_entry() -> None:
    tree = tree_of(["mlp.post_act"], lambda _: lambda value, layer: None).bind(layer=3)
    with pytest.raises(HooksMisuse, match=r"keyword 'layer' is bound to Hooks already, as 3"):
        tree.on(small()).__enter__()
    with tree.unbind(["layer"]).on(small()):
        logits_of(small())


@pytest.mark.parametrize(
    "tree",
    [
        TransformerHooks().append_to_path("mlp.pre_act.fwd", AtLayers([0, 7]).append(torch.relu)),
        TransformerHooks().append_to_path("mlp.pre_act.bwd", AtLayers([0, 7]).append(torch.relu)),
        TransformerHooks().append_to_path("mlp.pre_act.fwd", Hooks().append(AtLayers([0, 7]).append(torch.relu))),
        TransformerHooks().append_to_path("mlp.pre_act.fwd", FwdBwdHooks().append_fwd2(AtLayers([0, 7]))),
    ],
)
def test_layers_that_the_model_does_not_have_are_an_error_on_entry(tree: TransformerHooks) -> None:
    with pytest.raises(HooksMisuse) as raised:
        with tree.on(small()):
            pass
    assert str(raised.value).startswith(
        "AtLayers([0, 7]) at 'mlp.pre_act': the model has 2 layers, 0 … 1, and no layer 7: the hooks would never act"
    )
    with pytest.raises(HooksMisuse, match=r"no layer -1: .*\n  .* the last is AtLayers\(1\)\."):
        with TransformerHooks().append_to_path("attn.q.fwd", AtLayers(-1).append(torch.relu)).on(small()):
            pass


def test_at_layers_at_a_place_without_layers_says_so() -> None:
    with pytest.raises(HooksMisuse, match=r"AtLayers\(\[1\]\) was called without layer="):
        with tree_of(["resid.ln_f.scale"], lambda _: AtLayers(1).append(abs)).on(small()):
            logits_of(small())


def test_a_model_without_a_head_has_no_logits() -> None:
    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30)).eval()
    with pytest.raises(UnsupportedModule, match="hooks cannot be at 'logits': GPT2Model has no unembedding"):
        TransformerHooks.for_model(model).logits.append_fwd(abs)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"hooks.on\(model, …\) takes a torch.nn.Module as model, not str"):
        TransformerHooks().on("gpt2")


def test_a_model_of_no_known_family_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="no anatomy of Linear is known"):
        tree_of(["logits"], lambda _: abs).on(nn.Linear(2, 2)).__enter__()


def test_a_norm_of_an_unknown_kind_is_refused() -> None:
    model = MODELS["gpt2"][0]().eval()
    model.transformer.ln_f = Odd()
    with pytest.raises(
        UnsupportedModule, match=r"'resid.ln_f.scale': GPT2LMHeadModel has no final_norm: a short forward showed none"
    ):
        tree_of(["resid.ln_f.scale"], lambda _: abs).on(model).__enter__()
    with pytest.raises(UnsupportedModule, match="has no final_norm: no norm reads what its last layer gives"):
        tree_of(["resid.post_ln_f"], lambda _: lambda value: None).on(model).__enter__()


def test_a_value_that_does_not_fit_is_named_with_its_place() -> None:
    for place in ("attn.qk_softmax_denominator", "resid.torso.ln_mlp.scale", "mlp.pre_act"):
        with pytest.raises(TypeError, match=r"hooks.on at 'transformer.h.0.*does not broadcast"):
            with tree_of([place], lambda _: lambda value, layer: torch.ones(7, 3)).on(small()):
                logits_of(small())


def test_one_gradient_can_be_asked_for_in_the_middle_of_fwd() -> None:
    model, seen = small(), []
    tree = TransformerHooks()
    place = tree.resid.post_ln_f
    place.append_fwd(grad_hook_wrapper(lambda gradient: seen.append(gradient))).append_fwd(lambda value: value * 3)
    assert isinstance(place.fwd, Hooks)
    with tree.on(model):
        logits_of(model).sum().backward()
    model.zero_grad()
    assert torch.allclose(seen[0], 3 * model.lm_head.weight.sum(0).expand(2, 5, 16), atol=1e-4)
