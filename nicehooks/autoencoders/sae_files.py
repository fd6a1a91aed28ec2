"""`load_sae`: an autoencoder from the directory in which SAELens keeps one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nicehooks.autoencoders.autoencoder import Autoencoder, Encoder, GatedEncoder
from nicehooks.caches import files
from nicehooks.caches.arguments import BadArgument
from nicehooks.errors import FileFault, FileMissing, UnsupportedModule

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

NEEDED = {
    "standard": ["b_enc"],
    "topk": ["b_enc"],
    "jumprelu": ["b_enc", "threshold"],
    "gated": ["b_gate", "b_mag", "r_mag"],
    "transcoder": ["b_enc"],
    "skip_transcoder": ["b_enc", "W_skip"],
    "jumprelu_transcoder": ["b_enc", "threshold"],
    "jumprelu_skip_transcoder": ["b_enc", "threshold", "W_skip"],
}
"""The architectures, and what each has besides `W_enc`, `W_dec` and `b_dec`."""

WEIGHT_SHAPES = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "W_skip": ("d_out", "d_in"),
    **dict.fromkeys(["b_enc", "threshold", "b_gate", "b_mag", "r_mag"], ("d_sae",)),
}
"""What the dimensions of each are."""

KNOWN_NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")
"""The last two are in the weights already: the module itself does nothing."""


def load_sae(directory: Any, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Autoencoder:
    """Loads a sparse autoencoder, or a transcoder, that SAELens has saved; SAELens is not needed.

        sae = load_sae("sae/blocks.8.hook_resid_pre")
        with splice(model, "transformer.h.7", sae, error=True), capture(sae, "latents") as acts:
            model(ids)

    >>> import torch
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> Path("sae").mkdir()
    >>> _ = Path("sae/cfg.json").write_text('{"architecture": "standard", "d_in": 4, "d_sae": 16}')
    >>> weights = {"W_enc": torch.randn(4, 16), "b_enc": torch.zeros(16)}
    >>> weights |= {"W_dec": torch.randn(16, 4), "b_dec": torch.zeros(4)}
    >>> save_file(weights, "sae/sae_weights.safetensors")
    >>> load_sae("sae").encode(torch.randn(3, 4)).shape
    torch.Size([3, 16])

    Standard, gated, jump-ReLU and top-k autoencoders, and transcoders with and without a skip connection; files of old
    versions, too.

    Args:
        directory: what holds `cfg.json` and `sae_weights.safetensors`.
        device: where it goes.
        dtype: of its weights; as they are saved where it is left out.

    Returns:
        A module in evaluation mode, whose attribute `config` is what `cfg.json` says.

    Raises:
        FileMissing: one of the two files is not there.
        FileFault: one of them is damaged, or they do not belong together.
        UnsupportedModule: an architecture that this library does not know, or an activation function, or a scaling.
        BadArgument: there is no such device, or `dtype` is not one of floating numbers.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise BadArgument(f"load_sae(…, dtype={dtype!r}): it is one of floating numbers, torch.bfloat16, say")
    folder = Path(str(directory))
    config = _config(folder)
    kind = config.get("architecture", "standard")
    if not isinstance(kind, str) or kind not in NEEDED:
        raise UnsupportedModule(UNKNOWN.format(file=str(folder / CONFIG), kind=kind, known=", ".join(NEEDED)))
    weights = files.read(folder / WEIGHTS)
    missing = [name for name in ("W_enc", "W_dec", "b_dec", *NEEDED[kind]) if name not in weights]
    if missing:
        raise FileFault(f"{str(folder / WEIGHTS)!r} is none of a {kind} autoencoder: it has no {', '.join(missing)}.")
    _check_config(kind, config, folder)
    _check_weights(kind, config, weights, folder)
    sae = _built(kind, config, weights, folder)
    vars(sae)["config"] = config
    try:
        return sae.to(device=device, dtype=dtype or next(sae.parameters()).dtype).eval()
    except (RuntimeError, AssertionError) as error:  # torch's own, where there is no such device
        raise BadArgument(f"load_sae(…, device={device!r}): {error}") from None


def _check_config(kind: str, config: dict[str, Any], folder: Path) -> None:
    """Raises where `cfg.json` asks for something that would be done otherwise here."""
    file, chosen = str(folder / CONFIG), _activation_of(config)
    if kind in ("standard", "transcoder", "skip_transcoder") and chosen not in (None, "relu"):
        raise UnsupportedModule(f"{file!r} has the activation function {chosen!r}, which load_sae does not know.")
    if kind == "topk" and not (type(config.get("k")) is int and config["k"] > 0):
        raise FileFault(f"{file!r} is damaged: a topk autoencoder has a whole number k, and not {config.get('k')!r}.")
    if not isinstance(config.get("apply_b_dec_to_input", True), bool):
        raise FileFault(f"{file!r} is damaged: apply_b_dec_to_input is {config['apply_b_dec_to_input']!r}.")


def _check_weights(kind: str, config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Raises where the weights do not fit each other, or the sizes that `cfg.json` says."""
    file = str(folder / WEIGHTS)
    if bool((weights.get("scaling_factor", torch.ones(1)) != 1).any()):
        raise UnsupportedModule(f"{file!r} has a scaling_factor, which load_sae does not know.")
    sizes = {name: config[name] for name in ("d_in", "d_sae", "d_out") if config.get(name) is not None}
    if not kind.endswith("transcoder"):
        sizes["d_out"] = sizes.get("d_in", weights["W_enc"].shape[0] if weights["W_enc"].ndim else None)
    for name in ("W_enc", "W_dec", "b_dec", *NEEDED[kind]):
        found = tuple(weights[name].shape)
        wanted = tuple(sizes.setdefault(dim, size) for dim, size in zip(WEIGHT_SHAPES[name], found, strict=False))
        if found != wanted or len(found) != len(WEIGHT_SHAPES[name]) or not weights[name].is_floating_point():
            shown = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in WEIGHT_SHAPES[name])
            kind_of = str(weights[name].dtype)[6:]
            raise FileFault(f"{file!r} does not fit: {name} is {list(found)} {kind_of}, and should be [{shown}].")


def _built(kind: str, config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> Autoencoder:
    norm = _norm(config, folder)
    scale = _scale(kind, config, weights["W_dec"])
    encoder = _encoder(kind, config, weights, scale)
    transcodes = kind.endswith("transcoder")
    return Autoencoder(
        encoder,
        weights["W_dec"] / scale[:, None],
        weights["b_dec"],
        centred=bool(config.get("apply_b_dec_to_input", True)) and not transcodes,
        norm=norm,
        W_skip=weights.get("W_skip") if "skip" in kind else None,
        heads=config.get("reshape_activations") == "hook_z",
    )


def _encoder(kind: str, config: dict[str, Any], weights: dict[str, Tensor], scale: Tensor) -> Encoder | GatedEncoder:
    if kind == "gated":
        return GatedEncoder(weights["W_enc"], weights["b_gate"], weights["b_mag"], weights["r_mag"])
    threshold = weights["threshold"] if "jumprelu" in kind else None
    return Encoder(
        weights["W_enc"] * scale, weights["b_enc"] * scale, threshold, config["k"] if kind == "topk" else None
    )


def _scale(kind: str, config: dict[str, Any], decoder: Tensor) -> Tensor:
    """By how much each latent is scaled: by the length of its direction, where that decides which are the largest."""
    by_length = kind == "topk" and config.get("rescale_acts_by_decoder_norm")
    return decoder.norm(dim=-1) if by_length else torch.ones_like(decoder[:, 0])


def _norm(config: dict[str, Any], folder: Path) -> str:
    norm = config.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm
    if norm not in KNOWN_NORMS:
        raise UnsupportedModule(
            f"{str(folder / CONFIG)!r} has normalize_activations {norm!r}, which is not known here."
        )
    return norm


def _activation_of(config: dict[str, Any]) -> Any:
    """The activation function, which older files have under another name."""
    return config.get("activation_fn", config.get("activation_fn_str"))


def _config(folder: Path) -> dict[str, Any]:
    """What `cfg.json` says, in the words of today."""
    try:
        found = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise FileMissing(f"{str(folder)!r} holds no autoencoder: there is no file {CONFIG!r} in it.") from None
    except (OSError, ValueError) as error:
        raise FileFault(f"{str(folder / CONFIG)!r} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise FileFault(f"{str(folder / CONFIG)!r} is no description of an autoencoder.")
    if _activation_of(found) == "topk":  # before version 6 the architecture was "standard" then
        found = {**found, "architecture": "topk", "k": (found.get("activation_fn_kwargs") or {}).get("k")}
    if "reshape_activations" not in found and "hook_z" in str(found.get("hook_name", found.get("hook_point", ""))):
        found = {**found, "reshape_activations": "hook_z"}
    return found


UNKNOWN = """\
{file!r} has the architecture {kind!r}, which load_sae does not know.
  It knows {known}."""
