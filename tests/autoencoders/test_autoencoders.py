"""Autoencoders: the files of SAELens give what SAELens computes; spliced in, their latents are captured and steered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gallery.architectures import gpt2, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nicehooks import UnsupportedModule, capture, load_sae, patch, splice, steer, transcoder
from nicehooks.autoencoders.autoencoder import Autoencoder, Encoder
from nicehooks.autoencoders.sae_files import NEEDED
from nicehooks.caches.arguments import BadArgument
from nicehooks.errors import FileFault, FileMissing, SiteNotFound, TreeMismatch

FILES = sorted((Path(__file__).parent / "sae_lens").iterdir())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FILES, ids=lambda folder: folder.name)
def test_a_file_of_sae_lens_gives_what_sae_lens_computes(folder: Path) -> None:
    """To 1e-5: `make_sae_lens_files.py` says how the files came about."""
    sae, expected = load_sae(folder), load_file(folder / "expected.safetensors")
    assert not sae.training
    torch.testing.assert_close(sae.encode(expected["x"]), expected["latents"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(expected["x"]), expected["out"], atol=1e-5, rtol=1e-5)
    with capture(sae, "latents") as acts:
        sae(expected["x"])
    torch.testing.assert_close(acts["latents"], expected["latents"], atol=1e-5, rtol=1e-5)
    assert (expected["latents"] != 0).any() and (expected["latents"] == 0).any()


def test_there_are_files_of_every_architecture() -> None:
    found = {json.loads((folder / "cfg.json").read_text()).get("architecture") for folder in FILES}
    assert found - {None} == set(NEEDED)


def test_a_dtype_that_is_asked_for() -> None:
    sae = load_sae(FILES[0], dtype=torch.float64)
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float64}
    assert sae.config["d_in"] == 6


def folder_with(tmp_path: Path, config: object, weights: dict[str, Tensor]) -> Path:
    (tmp_path / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(weights, tmp_path / "sae_weights.safetensors")
    return tmp_path


def test_folders_that_hold_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match=r"holds no autoencoder: there is no file 'cfg.json' in it"):
        load_sae(tmp_path)
    one = {"W_enc": torch.ones(2, 3)}
    with pytest.raises(
        FileFault, match=r"is none of a gated autoencoder: it has no W_dec, b_dec, b_gate, b_mag, r_mag\."
    ):
        load_sae(folder_with(tmp_path, {"architecture": "gated"}, one))
    with pytest.raises(
        UnsupportedModule, match=r"has the architecture 'temporal', which load_sae does not know.\n  It knows st"
    ):
        load_sae(folder_with(tmp_path, {"architecture": "temporal"}, one))
    with pytest.raises(FileFault, match="cannot be read"):
        load_sae(folder_with(tmp_path, "{", one))
    with pytest.raises(FileFault, match="is no description of an autoencoder"):
        load_sae(folder_with(tmp_path, [1], one))


def whole(kind: str = "standard") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `cfg.json` and the weights of an autoencoder of width 4 with 6 latents are."""
    weights = {"W_enc": torch.randn(4, 6), "W_dec": torch.randn(6, 4), "b_dec": torch.randn(4)}
    weights |= {"W_skip": torch.randn(4, 4)} if "skip" in kind else {}
    weights |= {"threshold": torch.rand(6)} if "jumprelu" in kind else {}
    biases = ["b_gate", "b_mag", "r_mag"] if kind == "gated" else ["b_enc"]
    weights |= {name: torch.randn(6) for name in biases}
    return {"architecture": kind, "d_in": 4, "d_sae": 6, **({"k": 2} if kind == "topk" else {})}, weights


@pytest.mark.parametrize("kind", list(NEEDED))
def test_weights_that_do_not_fit_each_other(kind: str, tmp_path: Path) -> None:
    """Each in every other shape: also one that torch would spread, or that only shows when it is used."""
    config, weights = whole(kind)
    assert load_sae(folder_with(tmp_path, config, weights))(torch.randn(3, 4)).shape == (3, 4)
    for name, right in weights.items():
        others = [right[:1], right[None], right[..., :-1], torch.tensor(1.0), right.long(), right.new_zeros(7)]
        for other in [*others, *([right.T] if right.ndim == 2 and right.shape[0] != right.shape[1] else [])]:
            folder = folder_with(tmp_path, config, {**weights, name: other.contiguous().clone()})
            with pytest.raises(FileFault, match=r"sae_weights.safetensors' does not fit: \w+ is \["):
                load_sae(folder)
    for name in ("d_in", "d_sae"):
        with pytest.raises(FileFault, match="does not fit"):
            load_sae(folder_with(tmp_path, {**config, name: 5}, weights))


@pytest.mark.parametrize("k", [None, "2", 0, -1, 2.5, True])
def test_a_number_of_latents_that_is_none(k: Any, tmp_path: Path) -> None:
    config, weights = whole("topk")
    old = {"d_in": 4, "activation_fn_str": "topk"}
    for said in ({**config, "k": k}, {**old, "activation_fn_kwargs": {"k": k}}, {**old, "activation_fn_kwargs": None}):
        with pytest.raises(FileFault, match="a topk autoencoder has a whole number k"):
            load_sae(folder_with(tmp_path, said, weights))


@pytest.mark.parametrize(
    ("config", "more", "says"),
    [
        ({"activation_fn": "gelu"}, {}, "has the activation function 'gelu'"),
        ({"activation_fn_str": "tanh-relu"}, {}, "has the activation function 'tanh-relu'"),
        ({"architecture": ["standard"]}, {}, "has the architecture"),
        ({}, {"scaling_factor": torch.full((6,), 2.0)}, "has a scaling_factor"),
    ],
)
def test_what_would_be_computed_otherwise(config: Any, more: Any, says: str, tmp_path: Path) -> None:
    said, weights = whole()
    with pytest.raises(UnsupportedModule, match=says):
        load_sae(folder_with(tmp_path, {**said, **config}, {**weights, **more}))
    load_sae(folder_with(tmp_path, {**said, "activation_fn": "relu"}, {**weights, "scaling_factor": torch.ones(6)}))
    with pytest.raises(FileFault, match="apply_b_dec_to_input is 'false'"):
        load_sae(folder_with(tmp_path, {**said, "apply_b_dec_to_input": "false"}, weights))


@pytest.mark.parametrize("given", [{"dtype": "float16"}, {"dtype": torch.int8}, {"device": "nope"}])
def test_where_and_as_what_it_cannot_be(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadArgument):
        load_sae(folder_with(tmp_path, *whole()), **given)


# --- spliced in -------------------------------------------------------------------------------------------------------


def autoencoder(width: int = 32, latents: int = 64) -> Autoencoder:
    decoder = torch.randn(latents, width) / width**0.5
    return Autoencoder(Encoder(decoder.T.clone(), torch.zeros(latents), k=8), decoder, torch.zeros(width)).eval()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt2().eval()


def test_with_its_error_it_changes_nothing_until_a_latent_is_steered(model: nn.Module) -> None:
    sae, ids = autoencoder(), tokens(0)
    clean = model(ids).logits
    with splice(model, "transformer.h.1", sae, error=True), capture(sae, "latents") as acts:
        torch.testing.assert_close(model(ids).logits, clean, atol=1e-5, rtol=1e-5)
    assert acts["latents"].shape == (*ids.shape, 64)
    assert ((acts["latents"] > 0).sum(-1) <= 8).all()
    direction = sae.decoder.weight[5].detach()
    with steer(model, "transformer.h.1", direction, scale=4.0):
        wanted = model(ids).logits
    with splice(model, "transformer.h.1", sae, error=True), steer(sae, "latents[..., 5]", torch.tensor(4.0)):
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_without_its_error_a_patched_latent_is_decoded(model: nn.Module) -> None:
    sae, ids = autoencoder(), tokens(0)
    with splice(model, "transformer.h.1", sae), patch(sae, "latents", 0.0), capture(model, "transformer.h.1") as acts:
        model(ids)
    torch.testing.assert_close(acts["transformer.h.1"], sae.decoder.bias.expand(*ids.shape, 32))


@pytest.mark.parametrize("error", [False, True])
def test_a_transcoder_does_the_work_of_an_mlp(model: nn.Module, error: bool) -> None:
    instead, ids = autoencoder(), tokens(0)
    clean = model(ids).logits
    with (
        transcoder(model, "transformer.h.1.mlp", instead, error=error),
        capture(model, "transformer.h.1.mlp", "transformer.h.1.mlp@input[0]") as acts,
    ):
        logits = model(ids).logits
    if error:
        torch.testing.assert_close(logits, clean, atol=1e-5, rtol=1e-5)
        with (
            transcoder(model, "transformer.h.1.mlp", instead, error=True),
            steer(instead, "latents[..., 5]", torch.tensor(4.0)),
        ):
            steered = model(ids).logits
        with steer(model, "transformer.h.1.mlp", instead.decoder.weight[5].detach(), scale=4.0):
            torch.testing.assert_close(steered, model(ids).logits, atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(acts["transformer.h.1.mlp"], instead(acts["transformer.h.1.mlp@input[0]"]))
    torch.testing.assert_close(model(ids).logits, clean)


def test_a_transcoder_from_elsewhere_and_as_a_handle(model: nn.Module) -> None:
    ids, instead = tokens(0), nn.Identity()
    handle = transcoder(model, "transformer.h.1.mlp", instead, source="transformer.h.0").attach()
    with capture(model, "transformer.h.0", "transformer.h.1.mlp") as acts:
        model(ids)
    assert torch.equal(acts["transformer.h.0"], acts["transformer.h.1.mlp"])
    handle.remove()
    before = vars(model.transformer.h[1].mlp).keys()
    assert "forward" not in before


@pytest.mark.parametrize("error", [False, True])
def test_whole_numbers_do_not_take_the_place_of_values(error: bool, model: nn.Module) -> None:
    with pytest.raises(TreeMismatch, match=r"\] int64 came out of the module for"):
        with splice(model, "transformer.h.1", lambda value: value.long(), error=error):
            model(tokens(0))
    with pytest.raises(TreeMismatch, match="takes a module or a function, not int"):
        splice(model, "transformer.h.1", 3)


def test_what_a_transcoder_refuses(model: nn.Module) -> None:
    with pytest.raises(SiteNotFound, match="takes one module, and 3 are selected"):
        transcoder(model, "transformer.h.*.mlp", nn.Identity())
    with pytest.raises(TypeError, match="takes a module, not int"):
        transcoder(model, "transformer.h.1.mlp", 3)
    with pytest.raises(TreeMismatch, match="came out of the transcoder for"):
        with transcoder(model, "transformer.h.1.mlp", nn.Linear(32, 3)):
            model(tokens(0))
