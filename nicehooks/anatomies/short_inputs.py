"""A short input for a model: what it is run on once, to see where its parts are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.offloaded import device_of_run

BATCH, FEW_POSITIONS = 2, 7
"""Small, and no sizes that a model is likely to have itself."""

Inputs = dict[str, Any]


def short_inputs(run: nn.Module) -> Iterator[Inputs]:
    """Inputs that `run` might take, the likeliest first."""
    names = forward_parameters(run)
    config: Any = getattr(run, "config", None)
    options: Inputs = {"use_cache": False} if "use_cache" in names and config is not None else {}
    for made in _main_inputs(run, names, config):
        yield {**made, **options}
        if options:
            yield made


def forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters that the forward of `module` names."""
    try:
        signature = inspect.signature(type(module).forward)
    except (TypeError, ValueError):
        return {}
    named = list(signature.parameters.items())[1:]
    return {name: one for name, one in named if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}


def _main_inputs(run: nn.Module, names: Mapping[str, Any], config: Any) -> Iterator[Inputs]:
    if "input_ids" in names:
        for ids in _token_ids(run, config):
            decoder = {"decoder_input_ids": ids[:, :-2]} if "decoder_input_ids" in names else {}
            yield {"input_ids": ids, **decoder}
    if "input_features" in names and config is not None:
        frames = 2 * getattr(config, "max_source_positions", 50)
        features = _random_input(run, BATCH, getattr(config, "num_mel_bins", 80), frames)
        decoder = {"decoder_input_ids": next(_token_ids(run, config))} if "decoder_input_ids" in names else {}
        yield {"input_features": features, **decoder}
    if "pixel_values" in names and config is not None:
        yield from _pictures(run, config)
    if "grid_thw" in names and config is not None and hasattr(config, "patch_size"):
        yield from _patches(run, names, config)
    for name in ("input_values", "inputs_embeds", "hidden_states"):
        if name in names and config is not None:
            yield {name: _random_input(run, BATCH, FEW_POSITIONS, _width(config))}
    yield from _unnamed(run, names)


def _pictures(run: nn.Module, config: Any) -> Iterator[Inputs]:
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    for given in (getattr(vision, "image_size", None), 32, 64, 224):
        if given is not None:
            high, wide = given if isinstance(given, list | tuple) else (given, given)
            yield {"pixel_values": _random_input(run, BATCH, channels, high, wide)}


def _patches(run: nn.Module, names: Mapping[str, Any], config: Any) -> Iterator[Inputs]:
    """A picture of four times six patches, for a model that is given patches, flat or not, and their grid."""
    device, channels, side = _place_of_input(run)[0], getattr(config, "in_channels", 3), config.patch_size
    grid: Inputs = {"grid_thw": torch.tensor([[1, 4, 6]], device=device)}
    if "merge_sizes" in names:
        grid["merge_sizes"] = torch.tensor([2], device=device)
    frames = getattr(config, "temporal_patch_size", 1)
    for shape in ((channels * frames * side**2,), (channels, side, side)):
        yield {next(iter(names)): _random_input(run, 24, *shape), **grid}


def _unnamed(run: nn.Module, names: Mapping[str, inspect.Parameter]) -> Iterator[Inputs]:
    """For a model that says nothing of itself: tokens for its first embedding, or a sequence of its first width."""
    first = next(iter(names), None)
    if first is None or sum(one.default is one.empty for one in names.values()) > 1:
        return
    embedding = next((one for one in run.modules() if isinstance(one, nn.Embedding)), None)
    if embedding is not None:
        yield {first: _ids_below(run, embedding.num_embeddings, set())}
    for module in run.modules():
        width = getattr(module, "in_features", None) or getattr(module, "normalized_shape", None)
        width = width[-1] if isinstance(width, tuple | list) and width else width
        if isinstance(width, int):
            yield {first: _random_input(run, BATCH, FEW_POSITIONS, width)}
            return


def _token_ids(run: nn.Module, config: Any) -> Iterator[Tensor]:
    texts = [config, getattr(config, "text_config", None), getattr(config, "decoder", None)]
    special = {value for one in texts if one is not None for value in _special_tokens(one)}
    ids = _ids_below(run, _vocabulary(run, config), special)
    yield ids
    books = next((n for one in texts if isinstance(n := getattr(one, "num_codebooks", None), int)), None)
    if books is not None:  # each example is a row per code book
        yield ids.repeat_interleave(books, 0)


def _special_tokens(config: Any) -> list[int]:
    try:
        named = vars(config).items()
    except TypeError:
        return []
    return [value for name, value in named if name.endswith(("token_id", "token_index")) and isinstance(value, int)]


def _vocabulary(run: Any, config: Any) -> int:
    try:
        return run.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError, TypeError):
        sizes = [getattr(one, "vocab_size", None) for one in (config, getattr(config, "text_config", None))]
        found = [one.num_embeddings for one in run.modules() if isinstance(one, nn.Embedding)]
        return next((size for size in (*sizes, *found) if isinstance(size, int)), 2)


def _ids_below(run: nn.Module, vocabulary: int, special: set[int]) -> Tensor:
    usual = [token for token in range(vocabulary) if token not in special] or [0]
    step = max(len(usual) // (BATCH * FEW_POSITIONS), 1)
    chosen = [usual[(3 + index * step) % len(usual)] for index in range(BATCH * FEW_POSITIONS)]
    return torch.tensor(chosen, device=_place_of_input(run)[0]).reshape(BATCH, FEW_POSITIONS)


def _random_input(run: nn.Module, *shape: int) -> Tensor:
    device, dtype = _place_of_input(run)
    generator = torch.Generator().manual_seed(0)  # one of its own: the model's random numbers stay as they are
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _width(config: Any) -> int:
    names = ("hidden_size", "d_model", "n_embd")
    return next((size for name in names if isinstance(size := getattr(config, name, None), int)), 1)


def _place_of_input(run: nn.Module) -> tuple[torch.device, torch.dtype]:
    found = next((one for one in run.parameters() if one.is_floating_point()), None)
    if found is None:
        return torch.device("cpu"), torch.float32
    return device_of_run(run) or found.device, found.dtype
