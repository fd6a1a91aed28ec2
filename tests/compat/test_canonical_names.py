"""The names of TransformerLens on unmodified models: which there are, what stands there; short names of caches."""

from __future__ import annotations

import copy
import pickle

import optree
import pytest
import torch
from gallery.every_architecture import tiny
from gallery.toy import inputs, toy
from point_hooks import records
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from nicehooks import NotCaptured, SiteNotFound, UnsupportedModule, ablate, anatomy, capture
from nicehooks.hookpoints import LensCache, get_act_name, hooked

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=50)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)),
    "bert": lambda: BertModel(BertConfig(**SIZES, intermediate_size=24)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=24)),
}
PARTS = {
    "blocks.1.hook_resid_pre": "resid_pre",
    "blocks.1.hook_resid_post": "resid_post",
    "blocks.1.hook_attn_out": "attn_out",
    "blocks.1.hook_mlp_out": "mlp_out",
    "blocks.1.attn.hook_q": "q",
    "blocks.1.attn.hook_k": "k",
    "blocks.1.attn.hook_v": "v",
    "blocks.1.attn.hook_z": "z",
    "blocks.1.attn.hook_attn_scores": "scores",
    "blocks.1.attn.hook_pattern": "pattern",
    "blocks.1.mlp.hook_pre": "mlp_pre",
    "blocks.1.mlp.hook_post": "mlp_post",
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return MODELS["gpt2"]().eval()


def test_every_name_is_the_part_of_the_anatomy(model):
    parts = anatomy(model)
    _, cache = hooked(model).run_with_cache(IDS, names_filter=list(PARTS))
    with capture(model, *(getattr(parts, what)[1] for what in PARTS.values())) as acts:
        model(IDS)
    assert sorted(cache) == sorted(PARTS)
    assert all(torch.equal(cache[name], acts[getattr(parts, what)[1]]) for name, what in PARTS.items())


def test_shapes_are_those_of_transformer_lens(model):
    parts = anatomy(model)
    _, cache = hooked(model).run_with_cache(IDS)
    for layer in (0, 1, -1):
        assert cache["q", layer].shape == cache["z", layer].shape == (2, 4, 4, 4)
        assert cache["k", layer].shape == cache["v", layer].shape == (2, 4, parts.n_kv_heads, 4)
        assert cache["pattern", layer].shape == cache["attn_scores", layer].shape == (2, 4, 4, 4)
        assert cache["resid_post", layer].shape == cache["embed"].shape == (2, 4, 16)
        assert torch.allclose(cache["pattern", layer].sum(-1), torch.ones(2, 4, 4), atol=1e-5)
    assert cache["resid_pre", -1] is cache["blocks.1.hook_resid_pre"]


def test_the_norms_and_positions(gpt2):
    _, cache = hooked(gpt2).run_with_cache(IDS)
    body = gpt2.transformer
    assert torch.equal(cache["normalized"], cache["transformer.ln_f"])
    assert torch.equal(cache["normalized", 1, "ln1"], body.h[1].ln_1(cache["resid_pre", 1]))
    assert torch.equal(cache["normalized", 1, "ln2"], body.h[1].ln_2(cache["resid_mid", 1]))
    assert torch.equal(cache["embed"] + cache["pos_embed"], cache["resid_pre", 0])


def test_a_name_that_the_model_lacks_says_why():
    llama = hooked(MODELS["llama"]())
    with pytest.raises(SiteNotFound, match=r"'ln_final.hook_normalized': .* multiplies by its gain"):
        llama.run_with_cache(IDS, names_filter="ln_final.hook_normalized")
    with pytest.raises(SiteNotFound, match="both read resid_pre"):
        hooked(MODELS["gpt_neox"]()).add_hook("blocks.0.hook_resid_mid", print)
    with pytest.raises(SiteNotFound, match=r"nearest names: blocks.0.hook_resid_pre"):
        llama.add_hook("blocks.0.hook_resid_prf", print)


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "JambaForCausalLM", "PhimoeForCausalLM"])
def test_layers_that_differ_have_the_names_of_what_they_have(name):
    """Of a mixture behind a dense layer, of attention among mixers, of mixtures with a LayerNorm."""
    model = tiny(name)
    parts, view = anatomy(model), hooked(model)
    _, cache = view.run_with_cache(IDS)
    for hook, what in PARTS.items():
        for layer in range(parts.n_layers):
            called = hook.replace("blocks.1.", f"blocks.{layer}.")
            assert (called in cache) == (not parts.lacks(what) and layer in parts[what].layers), called
    assert ("blocks.1.ln2.hook_normalized" in cache) == (name == "PhimoeForCausalLM")
    with ablate(model, parts.z[1].head(2)):
        expected = model(IDS).logits
    changed = view.run_with_hooks(IDS, fwd_hooks=[("blocks.1.attn.hook_z", without_third_head)]).logits
    assert torch.equal(changed, expected)


def without_third_head(value, hook):
    heads = torch.arange(value.shape[2])
    return value * (heads != 2)[:, None]


def test_a_part_that_other_layers_have_is_lacking_with_their_numbers():
    view = hooked(tiny("JambaForCausalLM"))
    with pytest.raises(SiteNotFound, match=r"'blocks.0.attn.hook_z': z\[0\]: layer 0 has none; .* have one: 1\."):
        view.add_hook("blocks.0.attn.hook_z", print)


def test_hooks_change_the_model_at_these_names(gpt2):
    parts = anatomy(gpt2)
    zero_head = lambda z, hook: torch.cat([z[:, :, :1] * 0, z[:, :, 1:]], 2)  # noqa: E731
    out = hooked(gpt2).run_with_hooks(IDS, fwd_hooks=[(lambda name: name.endswith("hook_z"), zero_head)]).logits
    with ablate(gpt2, parts.z[0].head(0), parts.z[1].head(0)):
        assert torch.allclose(out, gpt2(IDS).logits, atol=1e-6)
    assert not torch.allclose(out, gpt2(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["hook_z", "hook_q", "hook_resid_pre", "hook_resid_post"])
def test_gradients_at_these_names(gpt2, name):
    full = get_act_name(name.removeprefix("hook_"), 1)
    seen = {}
    loss = hooked(gpt2).run_with_hooks(IDS, bwd_hooks=[(full, lambda grad, hook: seen.update({hook.name: grad}))])
    loss.logits.square().sum().backward()
    _, cache = hooked(gpt2).run_with_cache(IDS, names_filter=full)
    assert list(seen) == [full] and seen[full].shape == cache[full].shape and seen[full].any()


def test_a_gradient_inside_a_module_is_refused(gpt2):
    with pytest.raises(UnsupportedModule, match="is the value of a call inside a module, whose gradient is no place"):
        hooked(gpt2).run_with_hooks(IDS, bwd_hooks=[("blocks.0.attn.hook_pattern", lambda grad, hook: None)])


def test_parts_and_paths_are_names_too(gpt2):
    parts, seen = anatomy(gpt2), []
    note = lambda value, hook: seen.append((hook.name, tuple(value.shape)))  # noqa: E731
    names = ["resid_post", parts.z[1], "transformer.h.*[:, -1]", "embed", parts.mlp_out]
    hooked(gpt2).run_with_hooks(IDS, fwd_hooks=[(name, note) for name in names])
    assert sorted(seen) == [
        ("transformer.h.0", (2, 4, 16)),
        ("transformer.h.0.mlp", (2, 4, 16)),
        ("transformer.h.0[:, -1]", (2, 16)),
        ("transformer.h.1", (2, 4, 16)),
        ("transformer.h.1.attn.c_proj@input[0]/4", (2, 4, 4, 4)),
        ("transformer.h.1.mlp", (2, 4, 16)),
        ("transformer.h.1[:, -1]", (2, 16)),
        ("transformer.wte", (2, 4, 16)),
    ]
    _, cache = hooked(gpt2).run_with_cache(IDS, names_filter=[parts.z[0], "resid_post"], pos_slice=-1)
    assert cache[parts.z[0]].shape == (2, 1, 4, 4) and cache["transformer.h.0"].shape == (2, 1, 16)


def test_hooks_at_a_path_are_seen_and_removed_through_every_view(gpt2):
    clean = gpt2(IDS).logits
    hooked(gpt2).add_hook("transformer.h.0[:, -1]", lambda value, hook: value * 0)
    hooked(gpt2).add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 2)
    assert [record.name for record in records(hooked(gpt2))] == ["blocks.0.hook_mlp_out", "transformer.h.0[:, -1]"]
    assert not torch.equal(gpt2(IDS).logits, clean)
    hooked(gpt2).reset_hooks()
    assert hooked(gpt2).list_hooks() == {} and torch.equal(gpt2(IDS).logits, clean)


def test_a_second_name_of_a_site_that_is_not_reached_is_part_of_its_wildcard(gpt2):
    names = ["hook_embed", "transformer.wte", "transformer.ln_f"]  # the first two are one site
    embedded = gpt2.transformer.wte(IDS)
    _, cache = hooked(gpt2).run_with_cache(inputs_embeds=embedded, names_filter=lambda name: name in names)
    assert list(cache) == ["transformer.ln_f"]


def test_a_model_without_an_anatomy_has_modules_and_paths():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 4)
    view = hooked(model)
    assert view.canonical is None and list(view.run_with_cache(x)[1]) == ["0", "1", ""]
    assert list(view.run_with_cache(x, names_filter="1@input[0]")[1]) == ["1@input[0]"]


# --- short names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("mlp_post", 2), "blocks.2.mlp.hook_post"),
        (("embed",), "hook_embed"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("normalized",), "ln_final.hook_normalized"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("attn", 1), "blocks.1.attn.hook_pattern"),
        (("resid_mid", 3), "blocks.3.hook_resid_mid"),
        (("blocks.0.hook_mlp_out",), "blocks.0.hook_mlp_out"),
    ],
)
def test_short_names_are_read_as_there(short, full):
    assert get_act_name(*short) == full


def test_short_names_of_a_model_with_hook_points_of_its_own():
    _, cache = toy().run_with_cache(inputs())
    assert type(cache) is LensCache
    assert cache["resid_post", -1] is cache["blocks.1.hook_resid_post"] and cache["z", 0].shape == (3, 5, 2, 4)
    _, cache = toy().run_with_cache(inputs(), names_filter="blocks.0.hook_resid_post")
    assert ("resid_post", 0) in cache and ("resid_post", -1) not in cache
    with pytest.raises(NotCaptured, match=r"\('resid_post', -1\) is not in this cache"):
        cache["resid_post", -1]


KEPT = {
    "arithmetic": lambda cache: cache * 1,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "detach": lambda cache: cache.detach(),
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache.detach())),
    "optree": lambda cache: optree.tree_map(torch.Tensor.detach, cache),
    "pytree": lambda cache: torch.utils._pytree.tree_map(torch.Tensor.detach, cache),
}


@pytest.mark.parametrize("how", KEPT)
def test_what_comes_of_a_cache_knows_short_names_too(how):
    _, cache = toy().run_with_cache(inputs(), detach=True)
    made = KEPT[how](cache)
    assert type(made) is LensCache and torch.equal(made["z", -1], cache["z", 1])


def test_a_cache_that_leaves_vmap_knows_short_names():
    model = toy()
    caches = torch.vmap(lambda x: model.run_with_cache(x)[1])(inputs())
    assert torch.allclose(caches["resid_post", -1], model.run_with_cache(inputs())[1]["resid_post", 1], atol=1e-6)
