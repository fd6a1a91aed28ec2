"""Autoencoders: the files of SAELens give what SAELens computes; spliced in, their latents are captured and steered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gallery.architectures import gpt2, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nicehooks import UnsupportedModule, capture, load_sae, patch, splice, steer, transcoder
from nicehooks.autoencoders.autoencoder import Autoencoder, Encoder
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
    from nicehooks.autoencoders.sae_files import NEEDED

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


def test_what_a_transcoder_refuses(model: nn.Module) -> None:
    with pytest.raises(SiteNotFound, match="takes one module, and 3 are selected"):
        transcoder(model, "transformer.h.*.mlp", nn.Identity())
    with pytest.raises(TypeError, match="takes a module, not int"):
        transcoder(model, "transformer.h.1.mlp", 3)
    with pytest.raises(TreeMismatch, match="came out of the transcoder for"):
        with transcoder(model, "transformer.h.1.mlp", nn.Linear(32, 3)):
            model(tokens(0))
