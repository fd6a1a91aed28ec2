"""Small random models of real architectures, from configurations; nothing comes over a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 97


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
