"""The jobs that every peer does, on the same weights and inputs, and what the answer to each must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, POSITIONS, WIDTH, TOKENS = 12, 16, 64, 1000
NAMES = [f"transformer.h.{layer}" for layer in range(LAYERS)]
GRID = [(layer, position) for layer in range(LAYERS) for position in range(POSITIONS)]
PATCHED = 6  # the layer of which one position is patched, the last

Way = Callable[[], Any]
Ways = Mapping[str, Mapping[str, Way]]
"""For each job the ways to do it, by the call that a reader would look up."""

BLOCKS, ALL, PATCH, GRADIENTS, SWEEP = "12 blocks", "all modules", "patch", "gradients", "sweep"
JOBS = {
    BLOCKS: "the outputs of the 12 blocks, captured: enter, one call, leave",
    ALL: "what every module returns (or all that the peer has a name for), captured: enter, one call, leave",
    PATCH: "one position of the output of block 6 replaced by that of another run",
    GRADIENTS: "of a logit difference with respect to the outputs of the 12 blocks",
    SWEEP: "12 × 16 of such patches, each alone, and a logit difference for each; the quickest way that the peer has",
}


def make(folder: Path) -> None:
    """Saves the model, and a tokenizer for those who will not do without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": 64, "vocab_size": TOKENS}
    # Weights larger than those of a new model, so that a patch changes the logits far beyond rounding.
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.15)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = WordLevel({f"w{number}": number for number in range(TOKENS)}, unk_token="w0")
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)


def load(folder: Path) -> nn.Module:
    """The model, from disk."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder).eval()


def logit_difference(logits: Tensor) -> Tensor:
    """The metric: for each example of the batch."""
    return logits[:, -1, 1] - logits[:, -1, 2]


@dataclass
class Job:
    """What a peer gets.

    Attributes:
        folder: the saved model.
        model: a copy of it, for the peer alone.
        ids: the inputs, `[1, 16]`.
        clean: what the 12 blocks return in another run, `[1, 16, 64]` each.
    """

    folder: Path
    model: nn.Module
    ids: Tensor
    clean: list[Tensor]

    @property
    def rows(self) -> Tensor:
        """The inputs once for each cell of the grid, for those who put all patches into one batch."""
        return self.ids.expand(len(GRID), -1)


@dataclass
class Answers:
    """What must come out, by raw hooks on a copy that no peer has touched."""

    logits: Tensor
    blocks: list[Tensor]
    patched: Tensor
    gradients: list[Tensor]
    grid: Tensor

    def off(self, job: str, answer: Any) -> float:
        """How far an answer is from what it must be, at most, in parts of the largest number that there is."""
        if job == ALL:  # whatever else there is, the outputs of the blocks are among it
            return max(min(apart(block, value) for value in answer) for block in self.blocks)
        expected = {BLOCKS: self.blocks, PATCH: self.patched, GRADIENTS: self.gradients, SWEEP: self.grid}[job]
        if isinstance(expected, Tensor):
            return apart(expected, answer)
        return max(apart(*pair) for pair in zip(expected, answer, strict=True))


def apart(expected: Tensor, value: Any) -> float:
    """The largest difference, in parts of the largest number."""
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return float("inf")
    return float((value.detach() - expected).abs().max() / expected.abs().max())


def clean_blocks(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The outputs of the blocks in another run."""
    return [block.detach() for block in _hooked(model, (ids + 1) % TOKENS)[1]]


def answers(model: nn.Module, ids: Tensor, clean: Sequence[Tensor]) -> Answers:
    """By raw hooks, each thing in the plainest way that there is."""
    with torch.enable_grad():
        logits, blocks = _hooked(model, ids)
        gradients = list(torch.autograd.grad(logit_difference(logits).sum(), blocks))
    grid = torch.zeros(LAYERS, POSITIONS)
    for layer, position in GRID:
        grid[layer, position] = logit_difference(_patched(model, ids, layer, position, clean))[0]
    patched = _patched(model, ids, PATCHED, POSITIONS - 1, clean)
    assert apart(logits.detach(), patched) > 0.01, "a patch that changes nothing would hide what does nothing"
    return Answers(logits.detach(), [block.detach() for block in blocks], patched, gradients, grid)


def _hooked(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    handles = [model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[-1])) for name in NAMES]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def _patched(model: nn.Module, ids: Tensor, layer: int, position: int, clean: Sequence[Tensor]) -> Tensor:
    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, position] = clean[layer][:, position]
        return output

    handle = model.get_submodule(NAMES[layer]).register_forward_hook(hook)
    with torch.no_grad():
        logits = model(ids).logits
    handle.remove()
    return logits


def marks(model: nn.Module) -> dict[str, Any]:
    """What a peer could leave on a model, for each module: its class, its attributes, its hooks."""
    return {
        name: (type(module).__qualname__, sorted(vars(module)), _hooks_of(module))
        for name, module in model.named_modules()
    }


def _hooks_of(module: nn.Module) -> int:
    return sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value)
