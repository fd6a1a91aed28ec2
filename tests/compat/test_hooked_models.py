"""hooked: hooks and caches on any model as it is."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch._dynamo
from gallery.toy import MLP, inputs
from point_hooks import double, look, records, zero
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from worlds import same, state

from nicehooks import (
    SiteNotFound,
    StaleActivation,
    UnsupportedModule,
    ablate,
    capture,
)
from nicehooks.hookpoints import HookedMethods, hooked


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=11)
    return GPT2LMHeadModel(config).eval()


IDS = torch.tensor([[1, 2, 3, 4]])


def test_hooked_shows_every_module_and_parameter(gpt2):
    view = hooked(gpt2)
    assert "transformer.h.0.mlp" in view.hook_dict and "transformer.h.0.mlp.c_fc@weight" in view.hook_dict
    assert "transformer.h" not in view.hook_dict and "transformer.h" in view.mod_dict
    assert isinstance(view, HookedMethods) and not isinstance(view, nn.Module)
    assert repr(view) == f"hooked(GPT2LMHeadModel: {len(view.hook_dict)} hook points)"
    assert view.hook_dict["transformer.h.1.mlp"].layer() == 1
    assert same(view(IDS).logits, gpt2(IDS).logits)


def test_hooked_caches_by_name(gpt2):
    before = state(gpt2)
    out, cache = hooked(gpt2).run_with_cache(IDS, names_filter=lambda name: name.endswith("mlp"))
    assert list(cache) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    with capture(gpt2, "transformer.h.*.mlp") as acts:
        logits = gpt2(IDS).logits
    assert all(same(cache[name], acts[name]) for name in acts) and same(out.logits, logits)
    assert [entry[:4] for entry in state(gpt2)] == [entry[:4] for entry in before]


def test_hooked_caches_everything_but_parameters_by_default(gpt2):
    _, cache = hooked(gpt2).run_with_cache(IDS)
    with capture(gpt2) as acts:
        gpt2(IDS)
    assert [name for name in cache if name in acts] == list(acts)
    assert sorted(set(cache) - set(acts)) == sorted(hooked(gpt2).canonical.paths)
    assert isinstance(cache["transformer.h.0.attn"], tuple)


def test_hooked_caches_and_changes_parameters(gpt2):
    weight = "transformer.h.0.mlp.c_fc@weight"
    clean = gpt2(IDS).logits
    _, cache = hooked(gpt2).run_with_cache(IDS, names_filter=weight)
    assert cache[weight] is gpt2.transformer.h[0].mlp.c_fc.weight
    place = hooked(gpt2).hook_dict[weight]
    place.add_hook(lambda value, hook: value * 0)
    assert place.has_hooks("fwd") and not hooked(gpt2).hook_dict["transformer.h.0.mlp.c_fc"].has_hooks()
    assert not same(gpt2(IDS).logits, clean)
    hooked(gpt2).reset_hooks()
    assert same(gpt2(IDS).logits, clean)
    with pytest.raises(UnsupportedModule, match="is a parameter, which has no gradient of one call"):
        place.add_hook(look, dir="bwd")


def test_hooked_sees_hooks_on_parametrized_weights():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    place = hooked(model).hook_dict["@weight"]
    place.add_hook(zero)
    assert place.has_hooks() and not (model(torch.ones(3)) - model.bias).any()
    place.remove_hooks()
    assert not place.has_hooks() and (model(torch.ones(3)) - model.bias).any()


def test_hooked_hands_tuples_to_hooks(gpt2):
    clean = gpt2(IDS).logits

    def without_attention(value, hook):
        assert isinstance(value, tuple)
        return (value[0] * 0, *value[1:])

    out = hooked(gpt2).run_with_hooks(IDS, fwd_hooks=[("transformer.h.0.attn", without_attention)]).logits
    with ablate(gpt2, "transformer.h.0.attn[0]"):
        assert same(out, gpt2(IDS).logits)
    assert not same(out, clean)


def test_hooked_gradients_of_parts(gpt2):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = gpt2

        def forward(self, ids):
            return self.model(ids, labels=ids).loss

    _, cache = hooked(Loss()).run_with_cache(
        IDS, names_filter=["model.transformer.h.0.attn", "model.transformer.h.0.mlp"], incl_bwd=True
    )
    assert sorted(cache) == [
        "model.transformer.h.0.attn",
        "model.transformer.h.0.attn[0]_grad",
        "model.transformer.h.0.mlp",
        "model.transformer.h.0.mlp_grad",
    ]
    assert cache["model.transformer.h.0.attn[0]_grad"].shape == (1, 4, 16)


def test_hooked_views_share_hooks_and_contexts(gpt2):
    hooked(gpt2).add_hook("transformer.h.0.mlp", lambda value, hook: hook.ctx.update(seen=value.shape))
    gpt2(IDS)
    assert hooked(gpt2).hook_dict["transformer.h.0.mlp"].ctx == {"seen": (1, 4, 16)}
    assert [r.name for r in records(hooked(gpt2))] == ["transformer.h.0.mlp"]
    hooked(gpt2).reset_hooks()
    assert hooked(gpt2).list_hooks() == {} and hooked(gpt2).hook_dict["transformer.h.0.mlp"].ctx == {}
    assert "forward" not in vars(gpt2)


def test_hooked_works_under_generate_compile_and_vmap(gpt2, fresh_dynamo):
    count = []
    with hooked(gpt2).hooks(fwd_hooks=[("transformer.h.0", lambda value, hook: count.append(1))]):
        gpt2.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(count) == 3
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4)
    run = torch.compile(model, fullgraph=True, backend="eager")
    with hooked(model).hooks(fwd_hooks=[("0", double)]):
        assert torch.allclose(run(x), model(x)) and torch.allclose(torch.vmap(model)(x), model(x), atol=1e-6)
        assert torch.allclose(run(x), (model[0](x)).tanh())


def test_hooked_around_a_compiled_model(model, clean, fresh_dynamo):
    run = torch.compile(model, fullgraph=True, backend="eager")
    out = hooked(run).run_with_hooks(inputs(), fwd_hooks=[(MLP, zero)])
    assert torch.allclose(out, model.run_with_hooks(inputs(), fwd_hooks=[(MLP, zero)]), atol=1e-6)
    hooked(run).add_hook(MLP, zero)
    assert torch.allclose(run(inputs()), out, atol=1e-6) and [r.hook for r in records(model)] == [zero]
    hooked(run).reset_hooks()
    assert torch.allclose(run(inputs()), clean, atol=1e-6) and "__nicehooks__" not in vars(model)


def test_hooked_reaches_what_a_fused_encoder_would_skip():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        _, cache = hooked(encoder).run_with_cache(torch.randn(2, 3, 8), names_filter="layers.0.linear1")
    assert cache["layers.0.linear1"].shape == (2, 3, 16)


def test_a_cached_value_that_is_overwritten_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    _, cache = hooked(model).run_with_cache(torch.ones(2, 4), names_filter="0")
    with pytest.raises(StaleActivation, match="'0'"):
        cache["0"]


def test_hooked_takes_a_module():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not function"):
        hooked(double)


def test_a_place_whose_model_is_gone_says_so():
    place = hooked(nn.Sequential(nn.ReLU())).hook_dict["0"]
    gc.collect()
    with pytest.raises(SiteNotFound, match="the model of the hook point '0' no longer exists"):
        place.add_hook(look)


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(scripted)
    with pytest.raises(UnsupportedModule, match="TorchScript"):
        hooked(model).run_with_cache(torch.ones(2), names_filter="0")
