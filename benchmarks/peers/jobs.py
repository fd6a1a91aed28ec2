"""The jobs that every peer does, on the same weights and inputs, and what the answer to each must be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

Way = Callable[[], Any]
Ways = Mapping[str, Mapping[str, Way]]
"""For each job the ways to do it, by the call that a reader would look up; the quickest comes first."""

BLOCKS, ALL, PATCH, STEER = "blocks", "all modules", "patch", "steer"
GRADIENTS, ATTRIBUTION, SWEEP = "gradients", "attribution", "sweep"
JOBS = {
    BLOCKS: "the outputs of all blocks, captured: enter, one call, leave",
    ALL: "what every module returns (or all that the peer has a name for), captured: enter, one call, leave",
    PATCH: "the last position of the output of the block in the middle replaced by that of another run",
    STEER: "a vector added there at every position while 8 tokens are generated; over the same generation, bare",
    GRADIENTS: "of a logit difference with respect to the outputs of all blocks",
    ATTRIBUTION: "an estimate of each patch of layers × positions: the change of the value times that gradient, summed",
    SWEEP: "such patches made, each alone, and a logit difference for each",
}
NEW = 8  # tokens that are generated


@dataclass(frozen=True)
class Model:
    """One of the models that the jobs are done on.

    Attributes:
        title: what the page calls it.
        what: what it is, in a sentence.
        blocks: where its blocks are.
        layers: how many there are.
        every: a sweep takes each so-manieth layer.
        rounds: how often a way has its turn, at most.
        seconds: for one way in all of its rounds, about.
    """

    title: str
    what: str
    blocks: str
    layers: int
    every: int
    rounds: int
    seconds: float

    @property
    def names(self) -> list[str]:
        """The paths of the blocks."""
        return [f"{self.blocks}.{layer}" for layer in range(self.layers)]


MODELS = {
    "small": Model(
        "A small GPT-2",
        "12 layers of width 64, 4 heads and 1000 tokens, random weights, 16 positions: so small that what the "
        "libraries do is seen beside what the model does. The sweep has 12 × 16 cells",
        "transformer.h",
        layers=12,
        every=1,
        rounds=100,
        seconds=6.0,
    ),
    "gpt2": Model(
        "GPT-2-small's shape",
        "12 layers of width 768, 12 heads and 50257 tokens, random weights, 16 positions. The sweep has 6 × 16 cells, "
        "of every second layer",
        "transformer.h",
        layers=12,
        every=2,
        rounds=8,
        seconds=3.0,
    ),
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        "30 layers of width 576, 9 heads with 3 of keys and values, 49152 tokens, its trained weights, a prompt of 14 "
        "tokens beside one with another name. The sweep has 6 × 14 cells, of every fifth layer",
        "model.layers",
        layers=30,
        every=5,
        rounds=8,
        seconds=3.0,
    ),
}
GPT2: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 12, "n_embd": 64, "n_head": 4, "n_positions": 64, "vocab_size": 1000},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 64, "vocab_size": 50257},
}
SPREAD = {"small": 0.15, "gpt2": 0.06}
"""The weights are larger than those of a new model, so that a patch changes the logits far beyond rounding."""
PROMPT = "When Mary and John went to the store, {} gave a drink to"


# --- what is made once ------------------------------------------------------------------------------------------------


def make(key: str, folder: Path) -> None:
    """Saves a model with a tokenizer, and beside them the inputs and the answers, as `facts.pt`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.safetensors").exists():
        _save_shipped(folder) if key == "smollm2" else _save_random(key, folder)
    torch.save(_facts(key, folder), folder / "facts.pt")


def _save_random(key: str, folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(**GPT2[key], bos_token_id=0, eos_token_id=0, initializer_range=SPREAD[key])
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = WordLevel({f"w{number}": number for number in range(config.vocab_size)}, unk_token="w0")
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)


def _save_shipped(folder: Path) -> None:
    """What `load_default` keeps is a folder that transformers loads."""
    from nicehooks import load_default

    kept = folder.parent / "kept"
    load_default(cache=kept)
    next(kept.iterdir()).rename(folder)


def _inputs(key: str, folder: Path) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The inputs, those of the other run, `[1, pos]` each, and the two tokens whose logits are compared."""
    if key != "smollm2":
        ids = torch.arange(16)[None] * 7 + 3
        return ids, (ids + 1) % 1000, (1, 2)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids, other = (tokenizer(PROMPT.format(name), return_tensors="pt").input_ids for name in ("Mary", "John"))
    return ids, other, (tokenizer(" Mary").input_ids[0], tokenizer(" John").input_ids[0])


def load(folder: Path) -> Any:
    """The model, from disk; it generates as many tokens as it is asked for."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


# --- what a peer gets -------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The model and the inputs.

    Attributes:
        of: which model.
        folder: where it is saved.
        model: a copy of it, for the peer alone.
        ids: the inputs, `[1, pos]`.
        clean: what the blocks return in another run, `[1, pos, width]` each.
        direction: what is added in steering, `[width]`.
        tokens: the two whose logits are compared.
    """

    of: Model
    folder: Path
    model: Any
    ids: Tensor
    clean: list[Tensor]
    direction: Tensor
    tokens: tuple[int, int]

    @property
    def names(self) -> list[str]:
        """The paths of the blocks."""
        return self.of.names

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return self.of.layers

    @property
    def positions(self) -> int:
        """How many positions the inputs have."""
        return self.ids.shape[1]

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return len(self.direction)

    @property
    def patched(self) -> int:
        """The layer of which one position is patched, the last, and to which the vector is added."""
        return self.layers // 2

    @property
    def swept(self) -> list[int]:
        """The layers of the grid of a sweep."""
        return list(range(0, self.layers, self.of.every))

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Layer and position of each cell of that grid."""
        return [(layer, position) for layer in self.swept for position in range(self.positions)]

    @property
    def rows(self) -> Tensor:
        """The inputs once for each cell of the grid, for those who put all patches into one batch."""
        return self.ids.expand(len(self.cells), -1)

    def metric(self, logits: Tensor) -> Tensor:
        """The difference of two logits, for each example of the batch."""
        return logits[:, -1, self.tokens[0]] - logits[:, -1, self.tokens[1]]

    @property
    def generation(self) -> dict[str, Any]:
        """How `generate` is to be called."""
        return {"attention_mask": torch.ones_like(self.ids), "max_new_tokens": NEW, "do_sample": False}

    def as_grid(self, values: Tensor | Iterable[Tensor]) -> Tensor:
        """The cells of a sweep, `[layers, positions]`."""
        flat = values if isinstance(values, Tensor) else torch.cat(list(values))
        return flat.view(len(self.swept), self.positions)

    def estimates(self, values: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
        """The change of each value times its gradient, `[layers, positions]`."""
        rows = [
            ((new - value) * gradient).sum(-1)[0]
            for new, value, gradient in zip(self.clean, values, gradients, strict=True)
        ]
        return torch.stack(rows).detach()


def job_of(key: str, folder: Path, model: Any, facts: Mapping[str, Any]) -> Job:
    """The job of one peer."""
    return Job(MODELS[key], folder, model, facts["ids"], facts["clean"], facts["direction"], facts["tokens"])


@dataclass(frozen=True)
class Changing:
    """A change and a capture as a peer does them: a vector added to the block in the middle, the next one's output.

    Attributes:
        module: what is called, and compiled.
        run: `run(call, ids, vector)` has the logits and the value; it calls `call` in the place of the module where one
            is given.
        examples: the logits of three examples, each with an intervention of its own.
        by: how those were done.
    """

    module: Any
    run: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    examples: Callable[[Tensor], Tensor] | None = None
    by: str = ""


# --- what must come out -----------------------------------------------------------------------------------------------


def off(job: str, expected: Any, answer: Any) -> float:
    """How far an answer is from what it must be, at most, in parts of the largest number that there is."""
    if job == ALL:  # whatever else there is, the outputs of the blocks are among it
        return max(min(apart(block, value) for value in answer) for block in expected)
    if job == STEER:  # tokens are the same or not
        return 0.0 if torch.equal(expected, answer) else float("inf")
    if isinstance(expected, Tensor):
        return apart(expected, answer)
    return max(apart(*pair) for pair in zip(expected, answer, strict=True))


def apart(expected: Tensor, value: Any) -> float:
    """The largest difference, in parts of the largest number."""
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return float("inf")
    return float((value.detach() - expected).abs().max() / expected.abs().max())


def _facts(key: str, folder: Path) -> dict[str, Any]:
    """The inputs, and the answers by raw hooks, each in the plainest way that there is."""
    model: Any = load(folder)
    ids, other, tokens = _inputs(key, folder)
    names = MODELS[key].names
    with torch.no_grad():
        clean, own = (_hooked(model, given, names)[1] for given in (other, ids))
    middle = len(names) // 2
    direction = 2 * (clean[middle] - own[middle])[0, -1]
    job = Job(MODELS[key], folder, model, ids, clean, direction, tokens)
    inputs = {"ids": ids, "clean": clean, "direction": direction, "tokens": tokens}
    return {**inputs, "answers": _answers(job)}


def _answers(job: Job) -> dict[str, Any]:
    with torch.enable_grad():
        logits, blocks = _hooked(job.model, job.ids, job.names)
        gradients = list(torch.autograd.grad(job.metric(logits).sum(), blocks))
    blocks = [block.detach() for block in blocks]
    patched = _patched(job, job.patched, job.positions - 1)
    plain, steered = job.model.generate(job.ids, **job.generation), _steered(job)
    assert apart(logits.detach(), patched) > 0.01, "a patch that changes nothing would hide what does nothing"
    assert not torch.equal(plain, steered), "and so would a vector that changes nothing"
    return {
        "logits": logits.detach(),
        BLOCKS: blocks,
        ALL: blocks,
        PATCH: patched,
        STEER: steered,
        GRADIENTS: gradients,
        ATTRIBUTION: job.estimates(blocks, gradients),
        SWEEP: job.as_grid(job.metric(_patched(job, *cell)) for cell in job.cells),
    }


def _hooked(model: Any, ids: Tensor, names: Iterable[str]) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    handles = [model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[-1])) for name in names]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def _patched(job: Job, layer: int, position: int) -> Tensor:
    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, position] = job.clean[layer][:, position]
        return output

    handle = job.model.get_submodule(job.names[layer]).register_forward_hook(hook)
    with torch.no_grad():
        logits = job.model(job.ids).logits
    handle.remove()
    return logits


def _steered(job: Job) -> Tensor:
    module = job.model.get_submodule(job.names[job.patched])
    handle = module.register_forward_hook(lambda *call: call[-1] + job.direction)
    tokens = job.model.generate(job.ids, **job.generation)
    handle.remove()
    return cast(Tensor, tokens)


# --- what stays behind ------------------------------------------------------------------------------------------------


def marks(model: nn.Module) -> dict[str, Any]:
    """What a peer could leave on a model, for each module: its class, its attributes, its hooks."""
    return {
        name: (type(module).__qualname__, sorted(vars(module)), _hooks_of(module))
        for name, module in model.named_modules()
    }


def _hooks_of(module: nn.Module) -> int:
    return sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value)


if __name__ == "__main__":  # by run.py, in the environment of this checkout
    make(sys.argv[1], Path(sys.argv[2]))
