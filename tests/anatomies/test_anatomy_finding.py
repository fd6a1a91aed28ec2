"""A part is a path, and the transformer is found wherever it is in a model, or the error says how to describe it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from bodies import LAYER, MAKERS, SIZES, body, padded
from by_hooks import one_thread
from gallery.architectures import t5
from gallery.decoders import InsideOthers, Own
from torch import nn

from nicehooks import (
    ActivationCache,
    ModulePath,
    SiteNotFound,
    UnsupportedModule,
    ablate,
    anatomy,
    capture,
    captured,
    edit,
    grad_at,
    patch,
    register_anatomy,
    select,
    steer,
)
from nicehooks.anatomies.anatomy import FAMILIES, GPT2, Family, Lacks, Part, Parts

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)


# --- a part is a path -------------------------------------------------------------------------------------------------


def test_a_part_goes_wherever_a_path_goes() -> None:
    model, run = body("gpt2"), padded(body("gpt2"))
    z = anatomy(model).z[LAYER]
    text = "transformer.h.1.attn.c_proj@input[0]/4"
    assert isinstance(z, ModulePath) and str(z) == text and z == text and z == ModulePath.parse(text)
    assert [str(site) for site in select(model, z)] == [text]
    _, acts = captured(model, z)(**run)
    assert list(acts) == [text] and acts[z] is acts[text] and z in acts and acts.get(z) is acts[z]
    assert dict(acts)[z] is acts[z]  # a plain dict by text knows it, too
    half = acts[z.head(1)]
    with patch(model, {z.head(1): half * 2, z.head(2): 0.0}), capture(model, z.head([1, 2])) as acts:
        model(**run)
    assert torch.equal(acts[z.head([1, 2])], torch.stack([half * 2, half * 0], 2))
    with edit(model, z, torch.zeros_like), steer(model, z.head(0), torch.ones(8)), capture(model, z) as acts:
        model(**run)
    assert torch.equal(acts[z], torch.tensor([1.0, 0, 0, 0])[:, None].expand(2, 7, 4, 8))


def test_a_sequence_of_parts_goes_wherever_several_paths_go() -> None:
    model, run = body("gpt2"), padded(body("gpt2"))
    post = anatomy(model).resid_post
    with capture(model, post) as acts:
        model(**run)
    assert list(acts) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"] == list(post)
    assert acts.stack(post).shape == (3, 2, 7, 32)
    assert list(acts.select(post[1:])) == list(post[1:]) == list(post[-2:])
    assert isinstance(post[1:], Parts) and isinstance(post[1], Part)
    with ablate(model, post[1:]), capture(model, post) as acts:
        model(**run)
    assert [value.any().item() for value in acts.values()] == [True, False, False]
    _, grads = grad_at(model, post, lambda output: output.logits.sum())(**run)
    assert list(grads) == list(post)
    with capture(model, anatomy(model).pattern.head(2)[:2]) as acts:
        model(**run)
    assert [value.shape for value in acts.values()] == [(2, 7, 7)] * 2


def test_subscripts_lengthen_a_part() -> None:
    parts = anatomy(body("gpt2"))
    assert str(parts.resid_post[2][:, -1]) == "transformer.h.2[:, -1]"
    assert str(parts.pattern[0].head(3)[:, -1]).endswith("pattern[:, 3][:, -1]")
    assert str(parts.z[0].head(-1)) == "transformer.h.0.attn.c_proj@input[0]/4[:, :, -1]"
    assert parts.z[0].head(slice(0, 2)).what == "z[0].head(slice(0, 2, None))"
    with pytest.raises(TypeError):
        iter(parts.z[0])  # type: ignore[call-overload]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_are_the_same_parts(duplicate: Any) -> None:
    z = anatomy(body("llama")).z
    again = duplicate(z)
    assert again == z and type(again) is Parts and again.what == "z"
    assert again[1].head(3) == z[1].head(3) and hash(again[1]) == hash(z[1]) and repr(again[1]) == repr(z[1])
    assert again[1] != z[0] and again[1] != 3


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda parts: parts.z[3], "z[3]: there are 3 layers, 0 … 2."),
        (lambda parts: parts.k[0].head(2), "k[0] has 2 heads, 0 … 1, and no head 2."),
        (lambda parts: parts.z[0].head([0, 4]), "z[0] has 4 heads, 0 … 3, and no head 4."),
        (lambda parts: parts.z[0].head(-5), "z[0] has 4 heads, 0 … 3, and no head -5."),
        (lambda parts: parts.name("attn", 3), "LlamaForCausalLM has 3 layers, 0 … 2, and no layer 3."),
        (
            lambda parts: parts.mlp_out[0].head(1),
            "mlp_out[0] is not split into heads (q, k, v, scores, pattern and z are).\n"
            "  A part of it has its head taken before other subscripts: z[3].head(5)[:, -1]",
        ),
        (
            lambda parts: parts.z[:, -1],
            "z[:, -1]: the first subscript of z is the layer, a number or a slice; those of the value come after it:\n"
            "    z[0][:, -1]",
        ),
    ],
)
def test_what_is_not_there_says_what_is(ask: Any, says: str) -> None:
    with pytest.raises(SiteNotFound) as raised:
        ask(anatomy(body("llama")))
    assert str(raised.value) == says


def test_an_unknown_part_says_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no 'values'; its parts are embed, resid_pre, .*, final_norm, logits\."):
        _ = anatomy(body("llama")).values
    assert not hasattr(anatomy(body("llama")), "values")
    assert {"resid_pre", "logits", "name"} <= set(dir(anatomy(body("llama"))))
    assert repr(anatomy(body("llama"))) == (
        "Anatomy of LlamaForCausalLM at 'model': n_layers=3, n_heads=4, n_kv_heads=2, d_head=8, d_model=32"
    )


# --- where the transformer is -----------------------------------------------------------------------------------------


def logits_of(model: nn.Module) -> str:
    return str(anatomy(model).logits)


@pytest.mark.parametrize(
    ("family", "base", "block"),
    [
        ("gpt2", "transformer", "transformer.h.1"),
        ("gpt_neox", "gpt_neox", "gpt_neox.layers.1"),
        ("llama", "model", "model.layers.1"),
        ("bert", "bert", "bert.encoder.layer.1"),
        ("opt", "model.decoder", "model.decoder.layers.1"),
    ],
)
def test_the_bare_model_and_the_model_with_a_head_have_the_same_parts(family: str, base: str, block: str) -> None:
    model = body(family)
    whole, bare = anatomy(model), anatomy(model.get_submodule(base))
    assert (whole.base, whole.name("block", 1)) == (base, block)
    assert (bare.base, bare.name("block", 1)) == ("", block.removeprefix(f"{base}."))
    assert [f"{base}.{part}" for part in bare.z] == list(whole.z)
    inputs = padded(model)
    with capture(model, whole.pattern, whole.mlp_out) as acts, capture(model.get_submodule(base), bare.pattern) as own:
        model(**inputs)
    for first, second in zip(whole.pattern, bare.pattern, strict=True):
        assert torch.equal(acts[first], own[second])
    with pytest.raises(
        UnsupportedModule, match=r"has no unembedding, .*: take the model with a language modelling head"
    ):
        _ = bare.logits


@pytest.mark.parametrize(
    ("kind", "config", "settings"),
    [
        ("GPT2ForSequenceClassification", "GPT2Config", {}),
        ("GPTNeoXForSequenceClassification", "GPTNeoXConfig", {}),
        ("LlamaForSequenceClassification", "LlamaConfig", {}),
        ("BertForSequenceClassification", "BertConfig", {}),
        ("BertForTokenClassification", "BertConfig", {}),
        ("OPTForSequenceClassification", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)
def test_classifiers(kind: str, config: str, settings: dict[str, Any]) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **settings}, num_labels=3)).eval()
    parts = anatomy(model)
    with capture(model, parts.pattern, parts.z, parts.resid_post, parts.logits) as acts:
        output = model(**padded(model))
    assert logits_of(model) in ("['logits']", "classifier")
    assert torch.equal(acts[parts.logits], output.logits) and acts.stack(parts.z).shape == (3, 2, 7, 4, 8)
    with patch(model, parts.logits, 7.0):
        assert (model(**padded(model)).logits == 7).all()


def test_inside_another_model() -> None:
    model = InsideOthers(body("llama"))
    parts = anatomy(model)
    assert str(parts.z[0]) == r"parts.lm\/0.model.layers.0.self_attn.o_proj@input[0]/4"
    assert str(parts.logits) == r"parts.lm\/0.lm_head"
    assert parts.module("attn", 1) is body("llama").model.layers[1].self_attn
    with ablate(model, parts.z[0].head(1)), capture(model, parts.z[0], parts.pattern, parts.logits) as acts:
        output = model(**padded(model))
    assert acts[parts.logits] is output.logits and not acts[parts.z[0].head(1)].any()
    assert str(anatomy(model, at="parts.lm/0").z[0]) == str(parts.z[0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_inside_transparent_wrappers(family: str) -> None:
    model = body(family)
    plain = anatomy(model)
    wrapped = nn.DataParallel(model, device_ids=[])
    assert list(anatomy(wrapped).resid_post) == list(plain.resid_post)
    with capture(wrapped, anatomy(wrapped).resid_post, anatomy(wrapped).pattern[0]) as acts:
        wrapped(**padded(model))
    assert set(acts) == {*plain.resid_post, plain.pattern[0]}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_inside_torch_compile(family: str) -> None:
    model = body(family)
    compiled: Any = torch.compile(model, backend="eager")
    parts = anatomy(compiled)
    assert list(parts.z) == list(anatomy(model).z)
    inputs = padded(model)
    for change, where in [(parts.z[1].head(2), [parts.resid_post]), (False, [parts.resid_mid[1], parts.pattern[1]])]:
        with ablate(model, change), capture(model, where) as expected:
            model(**inputs)
        with ablate(compiled, change), capture(compiled, where) as acts:
            compiled(**inputs)
        assert list(acts) and all(torch.allclose(acts[key], expected[key], atol=1e-4) for key in expected)
    torch._dynamo.reset()


def test_several_transformers() -> None:
    both = nn.ModuleDict({"draft": body("gpt2"), "main": body("llama")})
    with pytest.raises(UnsupportedModule) as raised:
        anatomy(both)
    assert str(raised.value) == (
        "ModuleDict has 2 transformers in it: 'draft', 'main'. Say which:\n    anatomy(model, at=\"draft\")"
    )
    assert str(anatomy(both, at="main").logits) == "main.lm_head"
    with pytest.raises(SiteNotFound, match=r"ModuleDict has no module 'third'\."):
        anatomy(both, at="third")


def test_one_transformer_under_two_names_is_one() -> None:
    model = nn.ModuleDict({"a": body("gpt2"), "b": body("gpt2")})
    assert str(anatomy(model).resid_post[0]) == "a.transformer.h.0"


def test_nothing_is_left_at_the_model() -> None:
    model = MAKERS["gpt2"]("sdpa")
    before = [dict(vars(module)) for module in model.modules()]
    anatomy(model).z.head(1)
    assert [dict(vars(module)) for module in model.modules()] == before


# --- what is lacking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "what", "says"),
    [
        (
            "gpt_neox_parallel",
            "resid_mid",
            "GPTNeoXForCausalLM has no resid_mid: attention and MLP both read resid_pre, and one addition brings both "
            "to resid_post (use_parallel_residual): there is no residual stream between them.",
        ),
        (
            "bert",
            "final_norm",
            "BertForMaskedLM has no final_norm: each layer ends with a norm of its own, so there is none after the "
            "last one.",
        ),
    ],
)
def test_a_lacking_part_says_why_when_it_is_asked_for(family: str, what: str, says: str) -> None:
    parts = anatomy(body(family))
    with pytest.raises(UnsupportedModule) as raised:
        getattr(parts, what)
    assert str(raised.value) == says


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: nn.Linear(2, 2),
            "a short forward showed no layers in it, numbered modules that each map [batch, pos, d_model] to the same "
            "shape.",
        ),
        (
            lambda: nn.Bilinear(2, 2, 2),
            "the parts of Bilinear are found in a short forward, and it did not run on any input of ours:\n"
            "    what it reads is not known\n"
            "  Give it one, as the model is called with it:\n"
            '    anatomy(model, inputs={"input_ids": ids})',
        ),
    ],
)
def test_an_unknown_model_says_how_to_describe_it(make: Any, why: str) -> None:
    model = make()
    kind = type(model).__name__
    with pytest.raises(UnsupportedModule) as raised:
        anatomy(model)
    assert str(raised.value) == (
        f"no anatomy of {kind} is known: {why}\n"
        "  To describe it, name its modules, and the paths of parts that are elsewhere than in a Llama:\n"
        "    from nicehooks.anatomies.anatomy import Family, register_anatomy\n"
        f'    register_anatomy({kind}, Family(blocks="layers", attn="self_attn", …, parts={{"z": "…"}}))'
    )


@pytest.mark.usefixtures("registry")
def test_a_known_type_with_other_modules_says_what_was_looked_for() -> None:
    register_anatomy("gpt2", GPT2)
    model = nn.Identity()
    model.config = transformers.GPT2Config()
    with pytest.raises(UnsupportedModule, match=re.escape("its table looks for the layers in 'h', which is not there")):
        anatomy(model)


# --- one's own --------------------------------------------------------------------------------------------------------


OWN = Family(
    blocks="blocks",
    attn="attn",
    attn_proj="out",
    mlp_act="mlp",
    unembed=("head",),
    n_heads=2,
    d_model=8,
    parts={
        "q": "attn.qkv/3[:, :, 0]/{n_heads}",
        "k": "attn.qkv/3[:, :, 1]/{n_heads}",
        "v": "attn.qkv/3[:, :, 2]/{n_heads}",
        "attn_out": "out",
        "mlp_post": Lacks("its MLP is one layer"),
        "sum_of_values": "attn@matmul#1()",
    },
)


@pytest.fixture
def registry() -> Iterator[None]:
    """The tables as they were, after the test."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.usefixtures("registry")
def test_a_model_of_ones_own() -> None:
    register_anatomy(Own, OWN)
    model = Own()
    parts, x = anatomy(model), torch.randn(3, 4, 8)
    where = [
        parts.z,
        parts.pattern,
        parts.scores,
        parts.v,
        parts.attn_out,
        parts.mlp_out,
        parts.resid_post,
        parts.logits,
    ]
    with capture(model, *where, parts.resid_pre, parts.resid_mid, parts.sum_of_values) as acts:
        logits = model(x)
    assert torch.allclose(acts[parts.pattern[0]] @ acts[parts.v[0]].transpose(1, 2), acts[parts.z[0]].transpose(1, 2))
    assert torch.allclose(acts[parts.resid_pre[1]] + acts[parts.attn_out[1]], acts[parts.resid_mid[1]])
    assert acts[parts.sum_of_values[0]].shape == (3, 2, 4, 4)
    assert acts[parts.logits] is logits
    assert (parts.n_heads, parts.n_kv_heads, parts.d_head, parts.has("embed_norm")) == (2, 2, 4, False)
    with pytest.raises(UnsupportedModule, match=r"^Own has no mlp_post: its MLP is one layer\.$"):
        _ = parts.mlp_post
    with pytest.raises(
        UnsupportedModule, match=r"^Own has no token_embedding: there is no module 'embed_tokens' in it\.$"
    ):
        _ = parts.embed


@pytest.mark.usefixtures("registry")
def test_a_table_may_depend_on_the_config() -> None:
    register_anatomy("t5", lambda config: Family(blocks=f"{'decoder' if config.num_layers == 2 else 'x'}.block"))
    model = t5()
    model.config.num_attention_heads = 4
    assert str(anatomy(model).resid_pre[1]) == "decoder.block.1@input[0]"
    with pytest.raises(UnsupportedModule, match=r"has no q: there is no module 'decoder\.block\.0\.self_attn\.q_proj'"):
        _ = anatomy(model).q


@pytest.mark.usefixtures("registry")
def test_a_size_that_is_not_there_says_which() -> None:
    register_anatomy(Own, Family(blocks="blocks", n_heads="heads", d_model=8))
    with pytest.raises(
        UnsupportedModule, match=r"^the table of Own says that n_heads is config\.heads, which is not there"
    ):
        anatomy(Own())


def test_what_is_registered_is_looked_at() -> None:
    with pytest.raises(UnsupportedModule, match=r"takes a config\.model_type or a class of modules, not 3"):
        register_anatomy(3, OWN)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModule, match="takes a Family, or a function from a config to one, not 'llama'"):
        register_anatomy("x", "llama")  # type: ignore[arg-type]
    assert "x" not in FAMILIES


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("atn_out", "there is no part 'atn_out'. Did you mean 'attn_out'"),
        ("resid_psot", "there is no part 'resid_psot'. Did you mean 'resid_post'"),
        ("final_norms", "there is no part 'final_norms'. Did you mean 'final_norm'?"),
        ("logits", "logits is no part of a layer. Where it is, says the field: Family(unembed=…)."),
    ],
)
def test_a_name_that_is_nearly_that_of_a_part_is_refused(name: str, says: str) -> None:
    with pytest.raises(UnsupportedModule) as raised:
        Family(parts={name: "attn"})
    assert str(raised.value).startswith(f"Family(parts={{{name!r}: …}}): {says}")


def test_a_cache_of_somebody_elses_text_has_parts() -> None:
    acts = ActivationCache({"transformer.h.1": torch.ones(2, 3, 4)})
    assert acts[anatomy(body("gpt2")).resid_post[1][:, -1]].shape == (2, 4)


def test_a_norm_over_nothing_says_no_width() -> None:
    with pytest.raises(UnsupportedModule, match="no anatomy of Sequential is known"):
        anatomy(nn.Sequential(nn.LayerNorm([])))
