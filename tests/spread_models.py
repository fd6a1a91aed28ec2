"""Small transformers spread over the processes of a group, and what is done to them beside the unsharded ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from process_groups import near
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

Make = Callable[[Any], AbstractContextManager[Any]]
IDS = torch.tensor([[3, 1, 31, 1, 5, 9, 20, 6], [2, 17, 1, 28, 2, 8, 1, 12]])
OTHER_IDS = IDS.flip(1)


@functools.cache
def llama() -> Any:
    """Its MLP has 22 channels and its vocabulary 33 tokens: neither is a multiple of four, or of two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 22, "vocab_size": 33}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


@functools.cache
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 33}
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**sizes, **tokens, initializer_range=0.2, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


def line(name: str = "tp") -> DeviceMesh:
    """All processes in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))


def grid(*names: str) -> DeviceMesh:
    """Two processes in the first dimension, the others in the second."""
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names)


def llama_plan(local: bool = False) -> dict[str, Any]:
    """Attention and MLP, columns before rows. The values inside of the MLP are DTensors, unless they are `local`."""
    plan: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for at in ("model.layers.0.", "model.layers.1."):
        for name in ("q_proj", "k_proj", "v_proj"):
            plan[f"{at}self_attn.{name}"] = ColwiseParallel()
        for name in ("gate_proj", "up_proj"):
            plan[f"{at}mlp.{name}"] = ColwiseParallel(use_local_output=local)
        plan[f"{at}self_attn.o_proj"] = plan[f"{at}mlp.down_proj"] = RowwiseParallel()
    return plan


def parallel_llama(mesh: DeviceMesh, local: bool = False) -> Any:
    return parallelize_module(copy.deepcopy(llama()), mesh, llama_plan(local))


def parallel_gpt2(mesh: DeviceMesh) -> Any:
    """The rows of its embedding and the positions of its last norm are spread; linear layers it has but one."""
    split = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=False)
    spread = parallelize_module(copy.deepcopy(gpt2()), mesh, {"transformer.ln_f": split})
    ends = {
        "transformer.wte": RowwiseParallel(input_layouts=Replicate()),
        "transformer.ln_f": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(spread, mesh, ends)


def blocks_of(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def sharded(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    """`model` itself, in FSDP2: each block, and the rest."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


# --- beside the unsharded model ---------------------------------------------------------------------------------------


def plain(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def run(model: Any) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of the embedding."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # as an optimizer finds it: FSDP2 leaves the root whole behind a forward
            module.reshard()
    model.zero_grad()
    logits, embedding = model(IDS).logits, model.get_input_embeddings()
    penalty = plain(embedding.weight.square().sum())  # so that there is a gradient whatever was replaced
    (logits.square().mean() + 0.01 * penalty).backward()
    return logits, plain(embedding.weight.grad).clone()


def assert_same(model: Any, spread: Any, make: Make, what: str) -> None:
    """An intervention, made by `make` for either model, does the same to both: to the logits and the gradients."""
    with make(model):
        logits, gradient = run(model)
    with make(spread):
        ours, our_gradient = run(spread)
    assert near(ours, logits), f"{what}: logits"
    assert near(our_gradient, gradient), f"{what}: gradients"
    clean = run(model)
    assert not (near(logits, clean[0]) and near(gradient, clean[1])), f"{what}: does nothing"


def assert_clean(model: Any, spread: Any) -> None:
    assert all(map(near, run(spread), run(model)))
