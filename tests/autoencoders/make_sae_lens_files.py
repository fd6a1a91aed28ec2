"""Makes the files in `sae_lens/`, with SAELens: small autoencoders of each kind, and what SAELens computes with them.

It does not install beside a current TransformerLens, so it is run in an environment of its own, by hand:

    pip install sae-lens
    python tests/autoencoders/make_sae_lens_files.py

The files that are there come from sae-lens 6.54.12.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sae_lens  # pyright: ignore
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "sae_lens"
D_IN, D_SAE, D_OUT = 6, 20, 5

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard_not_centred": ("standard", {"apply_b_dec_to_input": False}),
    "standard_layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard_constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard_expected_average": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 3}),
    "topk_rescaled": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    "topk_many": ("topk", {"k": 18, "normalize_activations": "layer_norm"}),
    "transcoder": ("transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "skip_transcoder": ("skip_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": ("jumprelu_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "heads": ("standard", {"reshape_activations": "hook_z"}),
}


def make(name: str, kind: str, settings: dict[str, Any]) -> None:
    config_class, sae_class = sae_lens.registry.get_sae_class(kind)[1], sae_lens.registry.get_sae_class(kind)[0]
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **settings))
    with torch.no_grad():
        for key, value in sae.named_parameters():
            value.copy_(torch.randn_like(value) * (0.3 if key in ("threshold", "r_mag") else 1.0))
            if key == "threshold":
                value.abs_()
    sae.save_model(HERE / name)
    x = 2 * torch.randn(3, 4, D_IN)
    x = x.unflatten(-1, (2, 3)) if name == "heads" else x
    with torch.no_grad():
        latents, out = sae.encode(x), sae(x)
    save_file(
        {"x": x.contiguous(), "latents": latents.contiguous(), "out": out.contiguous()},
        HERE / name / "expected.safetensors",
    )


def make_old(name: str, of: str, config: dict[str, Any]) -> None:
    """The description that versions before 6 wrote; SAELens reads it, and says what comes out."""
    (HERE / name).mkdir(exist_ok=True)
    save_file(load_file(HERE / of / "sae_weights.safetensors"), HERE / name / "sae_weights.safetensors")
    (HERE / name / "cfg.json").write_text(
        json.dumps({"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", **config})
    )
    sae = sae_lens.SAE.load_from_disk(HERE / name)
    x = 2 * torch.randn(3, 4, D_IN)
    with torch.no_grad():
        save_file({"x": x, "latents": sae.encode(x), "out": sae(x)}, HERE / name / "expected.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, (kind, settings) in KINDS.items():
        make(name, kind, settings)
    make_old(
        "old_standard",
        "standard",
        {"hook_point": "blocks.0.hook_resid_pre", "activation_fn_str": "relu", "normalize_activations": False},
    )
    make_old(
        "old_topk",
        "topk",
        {
            "hook_name": "blocks.0.hook_mlp_out",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 4},
            "apply_b_dec_to_input": False,
        },
    )
