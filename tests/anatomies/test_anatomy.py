"""The parts of every family: their values are what their names say, and edits of them reach what they should."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from bodies import BODIES, LAYER, MAKERS, body, padded
from by_hooks import one_thread
from gallery.architectures import VOCABULARY
from torch import Tensor

from nicehooks import (
    ActivationCache,
    SiteNotReached,
    UnsupportedModule,
    ablate,
    anatomy,
    capture,
    edit,
    fused_attention_as_steps,
    patch,
)
from nicehooks.anatomies.anatomy import Anatomy
from nicehooks.anatomies.tables import PARTS

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

each_body = pytest.mark.parametrize(("family", "attention"), BODIES)

SINGLE = ("embed", "final_norm", "logits")
EVERY = (*PARTS, *SINGLE)


def lacking(family: str) -> set[str]:
    """The parts that a family does not have."""
    if family == "gpt_neox_parallel":
        return {"resid_mid"}
    return {"final_norm"} if family in ("bert", "opt_post_norm") else set()


def site(parts: Anatomy, what: str) -> Any:
    """A part of the layer that tests look at, or a single one."""
    part = getattr(parts, what)
    return part if what in SINGLE else part[LAYER]


@functools.cache
def seen(family: str, attention: str) -> ActivationCache:
    """Every part of every layer, in a run on a batch with padding."""
    model = body(family, attention)
    parts = anatomy(model)
    with capture(model, *[getattr(parts, what) for what in EVERY if what not in lacking(family)]) as acts:
        model(**padded(model))
    return acts


def value(family: str, attention: str, what: str, layer: int = LAYER) -> Tensor:
    part = getattr(anatomy(body(family, attention)), what)
    return seen(family, attention)[part if what in SINGLE else part[layer]]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def tilted(old: Tensor) -> Tensor:
    """Another value, which no norm maps to the same."""
    return old * torch.linspace(0.5, 1.5, old.shape[-1])


# --- what the values are ----------------------------------------------------------------------------------------------


@each_body
def test_shapes(family: str, attention: str) -> None:
    model = body(family, attention)
    parts = anatomy(model)
    batch, pos, heads, kv, width = 2, 7, 4, 2 if model.config.model_type in GROUPED else 4, 32
    embedded = 24 if family in ("opt_projected", "opt_post_norm") else width
    stream = dict.fromkeys(("resid_pre", "attn_in", "attn_out", "resid_mid", "resid_post"), (batch, pos, width))
    split = {
        "q": (batch, pos, heads, 8),
        "k": (batch, pos, kv, 8),
        "v": (batch, pos, kv, 8),
        "z": (batch, pos, heads, 8),
    }
    maps = dict.fromkeys(("scores", "pattern"), (batch, heads, pos, pos))
    stream |= dict.fromkeys(("mlp_in", "mlp_out"), (batch, pos, width))
    mlp = dict.fromkeys(("mlp_pre", "mlp_post"), (batch, pos, 48))
    ends = {"embed": (batch, pos, embedded), "final_norm": (batch, pos, width), "logits": (batch, pos, VOCABULARY)}
    expected = {**stream, **split, **maps, **mlp, **ends}
    assert set(expected) == set(EVERY)
    shapes = {what: tuple(value(family, attention, what).shape) for what in EVERY if what not in lacking(family)}
    assert shapes == {what: shape for what, shape in expected.items() if what not in lacking(family)}
    assert (parts.n_layers, parts.n_heads, parts.n_kv_heads, parts.d_head, parts.d_model) == (3, heads, kv, 8, width)


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@each_body
def test_pattern_is_the_softmax_of_the_masked_scores(family: str, attention: str) -> None:
    pattern, scores = value(family, attention, "pattern"), value(family, attention, "scores")
    looking = slice(2, None)  # in the second example, positions 0 and 1 are padding and see nothing
    assert close(pattern[:, :, looking], scores[:, :, looking].softmax(-1))
    assert close(pattern[:, :, looking].sum(-1), torch.ones(2, 4, 5))
    assert not pattern[1, :, looking, :2].any()
    if family != "bert":
        assert not pattern[0].triu(1).any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "opt"])
def test_scores_are_products_of_queries_and_keys_where_nothing_is_rotated(family: str, attention: str) -> None:
    q, k = value(family, attention, "q"), value(family, attention, "k")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    assert close(value(family, attention, "scores")[0, :, -1], scores[0, :, -1])  # the last position sees everything


@each_body
def test_attention_is_what_pattern_values_and_projection_make_of_it(family: str, attention: str) -> None:
    parts = anatomy(body(family, attention))
    v = value(family, attention, "v").repeat_interleave(parts.n_heads // parts.n_kv_heads, 2)
    z = torch.einsum("bhqk,bkhd->bqhd", value(family, attention, "pattern"), v)
    assert close(z, value(family, attention, "z"))
    out = parts.module("attn_proj", LAYER)(z.flatten(-2))
    if parts.has("attn_post_norm", LAYER):
        out = parts.module("attn_post_norm", LAYER)(out)
    assert close(out, value(family, attention, "attn_out"))


@each_body
def test_the_stream_is_the_sum_of_what_branches_add_to_it(family: str, attention: str) -> None:
    read = functools.partial(value, family, attention)
    post_norm = anatomy(body(family, attention)).family.post_norm
    middle = read("resid_pre") + read("attn_out")
    if "resid_mid" not in lacking(family):
        assert close(middle, read("resid_mid"))
    if post_norm:
        middle = read("mlp_in")
    assert close(middle + read("mlp_out"), read("resid_post"))


@each_body
def test_norms_lead_from_the_stream_to_the_branches_and_to_the_end(family: str, attention: str) -> None:
    parts, read = anatomy(body(family, attention)), functools.partial(value, family, attention)
    if parts.family.post_norm:
        assert torch.equal(read("attn_in"), read("resid_pre"))
        mlp_in = parts.module("attn_norm", LAYER)(read("resid_mid"))
        after = parts.module("mlp_norm", LAYER)(read("resid_post"))
    else:
        assert close(read("attn_in"), parts.module("attn_norm", LAYER)(read("resid_pre")))
        before = read("resid_pre" if "resid_mid" in lacking(family) else "resid_mid")
        mlp_in, after = parts.module("mlp_norm", LAYER)(before), read("resid_post")
        assert close(read("final_norm"), parts.module("final_norm")(read("resid_post", parts.n_layers - 1)))
    assert close(read("mlp_in"), mlp_in)
    assert close(read("resid_pre", LAYER + 1), after)


@each_body
def test_neurons_lead_from_mlp_in_to_mlp_out(family: str, attention: str) -> None:
    parts, read = anatomy(body(family, attention)), functools.partial(value, family, attention)
    assert close(read("mlp_pre"), parts.module("mlp_act", LAYER)(read("mlp_in")))
    out = parts.module("mlp_proj", LAYER)(read("mlp_post"))
    assert close(
        read("mlp_out"), parts.module("mlp_post_norm", LAYER)(out) if parts.has("mlp_post_norm", LAYER) else out
    )


@each_body
def test_logits_are_those_of_the_model(family: str, attention: str) -> None:
    model = body(family, attention)
    assert close(value(family, attention, "logits"), model(**padded(model)).logits)


# --- what edits do ----------------------------------------------------------------------------------------------------


@each_body
@pytest.mark.parametrize("what", EVERY)
def test_an_edit_of_any_part_changes_what_comes_later_and_nothing_before(
    family: str, attention: str, what: str
) -> None:
    model = body(family, attention)
    parts, clean = anatomy(model), seen(family, attention)
    if what in lacking(family):
        with pytest.raises(UnsupportedModule, match=f"no {what}"):
            getattr(parts, what)
        return
    with edit(model, site(parts, what), tilted), capture(model, parts.resid_post) as acts:
        logits = model(**padded(model)).logits
    assert not close(logits, value(family, attention, "logits"))
    changed = [not close(acts[part], clean[part]) for part in parts.resid_post]
    assert changed == ([True] * 3 if what == "embed" else [False] * 3 if what in SINGLE else [False, True, True])


def changed_heads(family: str, attention: str, what: str, index: int, into: str) -> list[int]:
    """The heads of `into` that differ when head `index` of `what` is changed in the same layer."""
    model = body(family, attention)
    parts = anatomy(model)
    part = getattr(parts, into)[LAYER]
    with edit(model, site(parts, what).head(index), tilted), capture(model, part) as acts:
        model(**padded(model))
    before, after = seen(family, attention)[part], acts[part]
    pairs = zip(before.unbind(part.head_dim), after.unbind(part.head_dim), strict=True)
    return [index for index, pair in enumerate(pairs) if not close(*pair)]


@each_body
def test_a_head_is_that_head_alone(family: str, attention: str) -> None:
    heads = functools.partial(changed_heads, family, attention)
    assert heads("q", 2, into="pattern") == [2]
    assert heads("scores", 2, into="pattern") == [2]
    assert heads("pattern", 2, into="z") == [2]
    assert heads("z", 2, into="z") == [2]
    assert heads("q", -1, into="q") == [3]


@each_body
def test_a_head_of_keys_and_values_is_that_of_its_group(family: str, attention: str) -> None:
    parts, heads = anatomy(body(family, attention)), functools.partial(changed_heads, family, attention)
    group = [2, 3] if parts.n_kv_heads == 2 else [1]
    assert heads("k", 1, into="pattern") == group
    assert heads("v", 1, into="z") == group
    assert heads("v", 1, into="pattern") == []


@each_body
def test_an_ablated_head_reads_zero(family: str, attention: str) -> None:
    model = body(family, attention)
    parts = anatomy(model)
    with ablate(model, parts.z[LAYER].head(3)), capture(model, parts.z[LAYER], parts.attn_out[LAYER]) as acts:
        model(**padded(model))
    clean = value(family, attention, "z")
    assert not acts[parts.z[LAYER].head(3)].any()
    assert close(acts[parts.z[LAYER]][:, :, :3], clean[:, :, :3])


@each_body
def test_a_patched_pattern_is_what_the_values_are_weighted_with(family: str, attention: str) -> None:
    """Each position of head 1 is made to look at itself."""
    model = body(family, attention)
    parts = anatomy(model)
    with patch(model, parts.pattern[LAYER].head(1), torch.eye(7)), capture(model, parts.z[LAYER]) as acts:
        model(**padded(model))
    own = value(family, attention, "v")[:, :, 0 if parts.n_kv_heads == 2 else 1]
    assert close(acts[parts.z[LAYER].head(1)], own)


@each_body
def test_a_patch_of_the_stream_goes_on_in_the_stream(family: str, attention: str) -> None:
    model = body(family, attention)
    parts = anatomy(model)
    if "resid_mid" in lacking(family):
        return
    with (
        patch(model, parts.resid_mid[LAYER], 0.0),
        capture(model, parts.resid_post, parts.mlp_in, parts.mlp_out) as acts,
    ):
        model(**padded(model))
    post, out = acts[parts.resid_post[LAYER]], acts[parts.mlp_out[LAYER]]
    assert close(post, out + acts[parts.mlp_in[LAYER]] if parts.family.post_norm else out)


@each_body
def test_patching_a_clean_run_with_itself_changes_nothing(family: str, attention: str) -> None:
    model = body(family, attention)
    parts = anatomy(model)
    patches = {site(parts, what): value(family, attention, what) for what in EVERY if what not in lacking(family)}
    with patch(model, patches):
        assert close(model(**padded(model)).logits, value(family, attention, "logits"))


# --- attention implementations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in MAKERS if (family, "sdpa") in BODIES])
def test_eager_and_fused_attention_show_the_same(family: str) -> None:
    """Where a position sees anything: what a padded one sees is up to the implementation."""
    eager, fused = seen(family, "eager"), seen(family, "sdpa")
    parts = anatomy(body(family, "eager")), anatomy(body(family, "sdpa"))
    assert "softmax" in parts[0].pattern[0].port.name and "scaled_dot" in parts[1].pattern[0].port.name
    for first, second in zip(parts[0].pattern, parts[1].pattern, strict=True):
        assert torch.allclose(eager[first][0], fused[second][0], atol=1e-4)


def test_the_implementation_counts_at_the_time_a_part_is_asked_for() -> None:
    model = MAKERS["llama"]("sdpa").eval()
    parts = anatomy(model)
    assert str(parts.pattern[0]) == "model.layers.0.self_attn@scaled_dot_product_attention().pattern"
    model.set_attn_implementation("eager")
    assert str(parts.pattern[0]) == "model.layers.0.self_attn@softmax()"
    assert str(parts.scores[0]) == "model.layers.0.self_attn@softmax().input[0]"
    with capture(model, parts.pattern[0]) as acts:
        model(**padded(model))
    assert acts[parts.pattern[0]].shape == (2, 4, 7, 7)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged_attention"])
@pytest.mark.parametrize("what", ["pattern", "scores"])
def test_other_kernels_are_refused_by_name(implementation: str, what: str) -> None:
    model = MAKERS["llama"]("eager").eval()
    model.config._attn_implementation_internal = implementation
    with pytest.raises(UnsupportedModule) as raised:
        getattr(anatomy(model), what)
    assert str(raised.value) == (
        f"LlamaForCausalLM has no {what} under attention implementation '{implementation}': one kernel computes "
        "attention, and scores and pattern are never there.\n"
        '    model.set_attn_implementation("eager")  '
        "# 'eager' or 'sdpa' or 'flex_attention' show it; then ask for the part again"
    )
    assert str(anatomy(model).z[0]) == "model.layers.0.self_attn.o_proj@input[0]/4"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_attention_as_steps_shows_the_same_parts(family: str, attention: str) -> None:
    model = body(family, attention)
    parts = anatomy(model)
    with fused_attention_as_steps(), capture(model, parts.pattern, parts.scores[LAYER], parts.z) as acts:
        model(**padded(model))
    assert close(acts[parts.pattern[LAYER]], value(family, attention, "pattern"))
    assert close(acts[parts.scores[LAYER]], value(family, attention, "scores"))
    with fused_attention_as_steps(), ablate(model, parts.pattern[LAYER].head(0)), capture(model, parts.z) as acts:
        model(**padded(model))
    assert not acts[parts.z[LAYER].head(0)].any() and acts[parts.z[LAYER].head(1)].any()


def test_a_part_from_before_the_switch_is_not_reached() -> None:
    model = MAKERS["gpt2"]("eager").eval()
    pattern = anatomy(model).pattern[0]
    model.set_attn_implementation("sdpa")
    with pytest.raises(SiteNotReached, match="softmax"):
        with capture(model, pattern):
            model(**padded(model))


@pytest.mark.parametrize(("what", "eager"), [("scores", "@softmax().input[0]"), ("pattern", "@softmax()")])
def test_a_step_of_fused_attention_that_is_eager_by_now_says_where_it_is(what: str, eager: str) -> None:
    model = MAKERS["llama"]("sdpa").eval()
    part = getattr(anatomy(model), what)[0][:, 1]
    model.set_attn_implementation("eager")
    now = getattr(anatomy(model), what)[0][:, 1]
    assert eager in str(now)
    with pytest.raises(SiteNotReached) as raised:
        with capture(model, part):
            model(**padded(model))
    assert f"If the model runs eager attention by now (set_attn_implementation), the path is {str(now)!r}." in str(
        raised.value
    )
