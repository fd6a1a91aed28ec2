"""Parts as sequences: subscripts, gradients, heads, gaps; and what is refused, remembered, reported."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import numpy
import pytest
import torch
from bodies import body, padded
from by_hooks import one_thread
from gallery.every_architecture import tiny
from gallery.streams import StreamBlock, StreamModel
from torch import Tensor, nn

from nicehooks import SiteNotFound, UnsupportedModule, ablate, anatomy, capture, patch, select
from nicehooks.anatomies.anatomy import EncoderDecoder, Part, Parts

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)


def test_the_same_subscript_in_every_layer() -> None:
    parts = anatomy(body("llama"))
    last = parts.resid_post.at[:, -1]
    assert list(last) == [f"model.layers.{layer}[:, -1]" for layer in range(3)]
    assert parts["resid_post", 1] == parts.resid_post[1] and parts["z"] == parts.z
    assert parts.resid_post[1:].at[:, -1] == last[1:]


@pytest.mark.parametrize(("index", "shown"), [
    ((slice(None), torch.tensor(2)), "[:, 2]"),
    ((slice(None), torch.tensor([2, 1])), "[:, [2, 1]]"),
    ((slice(None), [torch.tensor(2), torch.tensor(1)]), "[:, [2, 1]]"),
    ((slice(None), numpy.int64(2)), "[:, 2]"),
    ((slice(None), slice(numpy.int64(1), torch.tensor(3))), "[:, 1:3]"),
])  # fmt: skip
def test_indices_out_of_tensors_and_arrays(index: Any, shown: str) -> None:
    parts = anatomy(body("llama"))
    assert (
        parts.resid_post[1][index] == f"model.layers.1{shown}"
        and parts.resid_post.at[index][1] == parts.resid_post[1][index]
    )


def test_a_head_by_a_tensor() -> None:
    parts = anatomy(body("llama"))
    assert parts.z[1].head(torch.tensor(2)) == parts.z[1].head(2)


def test_one_site_per_head() -> None:
    model = body("llama")
    found = select(model, anatomy(model).z.each_head)
    assert len(found) == 3 and str(found[1]) == "model.layers.1.self_attn.o_proj@input[0]/4[:, :, *]"
    with capture(model, anatomy(model).pattern.each_head) as acts:
        model(**padded(model))
    assert len(acts) == 12 and {value.shape for value in acts.values()} == {(2, 7, 7)}
    with pytest.raises(SiteNotFound, match="is not split into heads"):
        _ = anatomy(model).mlp_out.each_head


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_parts(attention: str) -> None:
    """The gradient at a pattern, a head and the stream, against autograd by hand."""
    model = body("llama", attention)
    parts = anatomy(model)
    where = {"pattern": parts.pattern[1], "z": parts.z[1].head(2), "resid_post": parts.resid_post[0]}
    inputs = padded(model)
    for part in where.values():
        with capture(model, part) as acts:
            model(**inputs)
        leaf = acts[part].clone().requires_grad_()
        with patch(model, {part: leaf}):
            (expected,) = torch.autograd.grad(model(**inputs).logits.square().sum(), leaf)
        with capture(model, part.grad) as gradients:
            model(**inputs).logits.square().sum().backward()
        assert torch.allclose(gradients[part.grad], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert list(parts.resid_post.grad) == [f"model.layers.{layer}@grad" for layer in range(3)]


def test_layers_that_lack_a_part_are_numbered_all_the_same() -> None:
    z = Parts([Part.at("h.1", "z[1]"), Part.at("h.3", "z[3]")], "z", ((1, 3), 5))
    assert z[3] == z[-2] == "h.3" and len(z) == 2 and z.layers == (1, 3)
    assert list(z[2:]) == ["h.3"] and z[2:][1] == "h.3"
    assert pickle.loads(pickle.dumps(z))[3] == "h.3"
    with pytest.raises(SiteNotFound, match=r"z\[2\]: layer 2 has none; the layers that have one: 1, 3\."):
        _ = z[2]
    with pytest.raises(SiteNotFound, match=r"z\[5\]: there are 5 layers, 0 … 4\."):
        _ = z[5]


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_and_a_decoder() -> None:
    model = tiny("T5ForConditionalGeneration")
    parts = anatomy(model)
    assert isinstance(parts, EncoderDecoder)
    with pytest.raises(UnsupportedModule, match=r"(?s)has an encoder and a decoder.*anatomy\(model\)\.decoder\.z"):
        _ = parts.z
    ids = torch.arange(3, 10)[None]
    where = [
        parts.encoder.pattern[1],
        parts.decoder.pattern[1],
        parts.decoder.cross_pattern[1],
        parts.decoder.cross_v[1],
    ]
    with capture(model, *where, parts.decoder.cross_z) as acts:
        model(input_ids=ids, decoder_input_ids=ids[:, :4])
    assert [tuple(acts[part].shape[-2:]) for part in where[:3]] == [(7, 7), (4, 4), (4, 7)]
    z = torch.einsum("bhqk,bkhd->bqhd", acts[where[2]], acts[where[3]])
    assert torch.allclose(z, acts[parts.decoder.cross_z[1]], atol=1e-4)


# --- refused, remembered, reported ------------------------------------------------------------------------------------


def test_a_model_of_ones_own_is_found() -> None:
    torch.manual_seed(0)
    model = StreamModel(nn.Identity())
    parts = anatomy(model)
    assert str(parts.z[1]) == "blocks.1.attn@input[0]/2" and str(parts.pattern[0]) == "blocks.0@softmax()"
    assert str(parts.mlp_post[0]) == "blocks.0.mlp.2@input[0]" and parts.n_heads == 2
    assert str(parts.q[0]) == "blocks.0@unflatten#0()"  # no projection: the stream itself, by heads
    with ablate(model, parts.z[0].head(0)), capture(model, parts.attn_out) as acts:
        model(torch.tensor([[1, 2, 3]]))
    assert set(acts) == {"blocks.0.attn", "blocks.1.attn"}


def test_a_stream_that_is_no_sum_is_refused_where_it_is_none() -> None:
    model = StreamModel(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    parts = anatomy(model)
    assert parts.attn_out.layers == (1,) and str(parts.attn_out[1]) == "blocks.1.attn"
    with pytest.raises(SiteNotFound, match=r"attn_out\[0\]: layer 0 has none"):
        _ = parts.attn_out[0]
    rows = {row.part: row for row in parts.report().rows}
    assert "is no sum of what it reads" in rows["attn_out[0]"].path
    assert rows["attn_out[1]"].check == "resid_pre + attn_out + mlp_out = resid_post"


def test_it_is_found_once_and_found_anew_when_the_model_changes() -> None:
    model = StreamModel(nn.Identity())
    runs = runs_of(model)
    anatomy(model)
    assert len(runs) == 2
    anatomy(model)
    assert len(runs) == 2
    model.blocks.append(StreamBlock(nn.Identity()))
    assert anatomy(model).n_layers == 3 and len(runs) == 4


def test_without_the_check_it_runs_once() -> None:
    model = StreamModel(nn.Identity())
    runs = runs_of(model)
    assert anatomy(model, check=False).report().rows[1].check == "" and len(runs) == 1


def runs_of(model: nn.Module) -> list[int]:
    """Grows by one whenever the model runs."""
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def test_nothing_is_kept_or_left() -> None:
    model = StreamModel(nn.Dropout(0.5)).train()
    before, state = [dict(vars(module)) for module in model.modules()], torch.random.get_rng_state()
    anatomy(model)
    after = [dict(vars(module)) for module in model.modules()]
    assert after == before
    assert torch.equal(state, torch.random.get_rng_state())
    alive = weakref.ref(model)
    del model, before, after
    gc.collect()
    assert alive() is None


def test_interventions_that_are_active_do_not_count() -> None:
    model = StreamModel(nn.Identity())
    with ablate(model, "blocks.0.attn", value=7.0):
        parts = anatomy(model)
        model(torch.tensor([[1, 2]]))
    assert str(parts.attn_out[0]) == "blocks.0.attn"


def test_a_model_that_takes_something_else_is_given_it() -> None:
    class Other(StreamModel):
        def forward(self, ids: Tensor, scale: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(ids) * scale

    model = Other(nn.Identity())
    with pytest.raises(UnsupportedModule, match=r"(?s)did not run on any input of ours.*inputs="):
        anatomy(model)
    assert anatomy(model, inputs={"ids": torch.tensor([[3, 1, 4, 1, 5]] * 2), "scale": 2.0}).n_layers == 2
    assert anatomy(model).n_layers == 2  # remembered


def test_attention_of_torch_itself() -> None:
    """Every head of `nn.TransformerEncoder`: seen, and patched."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False),
        torch.randn(2, 5, 8),
    )
    path = "layers.0.self_attn@scaled_dot_product_attention().pattern"
    expected = model(x)
    with capture(model, path) as acts:
        output = model(x)
    assert torch.allclose(output, expected, atol=1e-6) and acts[path].shape == (2, 2, 5, 5)
    _, own = model.layers[0].self_attn(x, x, x, average_attn_weights=False)
    assert torch.allclose(acts[path], own, atol=1e-6)
    with patch(model, {f"{path}[:, 1]": 0.2}):
        changed = model(x)
    assert not torch.allclose(changed, expected, atol=1e-3)
