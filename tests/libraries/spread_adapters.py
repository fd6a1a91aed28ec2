"""Adapters and quantised weights in models that are spread over processes; `test_spread` runs it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from process_groups import near
from spread_checks import check_values, check_weight, seen
from spread_models import IDS, assert_same, line, llama, llama_plan
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from nicehooks import ablate, describe, patch, steer

LAYER = "base_model.model.model.layers.0"
QUERY = f"{LAYER}.self_attn.q_proj"


@functools.cache
def adapted() -> Any:
    """A small Llama with adapters that do something, on queries, values and one projection of the MLP."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(llama()), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.get_input_embeddings().requires_grad_(True)  # of which the checks compare the gradient
    return model


def sharded_adapters() -> None:
    """FSDP2, in which most of what there is in a shard is frozen."""
    spread = copy.deepcopy(adapted())
    for block in spread.base_model.model.model.layers:
        fully_shard(block, mesh=line("dp"))
    fully_shard(spread, mesh=line("dp"))
    check_values(adapted(), spread, LAYER, heads=4)
    check_values(adapted(), spread, f"{QUERY}.lora_A.default")
    for at in (f"{QUERY}.lora_B.default@weight", f"{QUERY}.base_layer@weight"):
        check_weight(adapted(), spread, at)
    assert_same(adapted(), spread, lambda m: ablate(m, "**.lora_B.default"), "without the adapters")
    assert not describe(spread)


def adapters_beside_parallel_layers() -> None:
    """Tensor parallelism of the MLP, adapters on the attention: what PEFT knows to do."""
    model = get_peft_model(
        copy.deepcopy(llama()), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    model.get_input_embeddings().requires_grad_(True)
    spread = copy.deepcopy(model)
    for block in spread.base_model.model.model.layers:
        parallelize_module(block.mlp, line(), mlp_plan())
    check_values(model, spread, f"{LAYER}.mlp.gate_proj")
    check_values(model, spread, f"{QUERY}.lora_A.default")
    check_weight(model, spread, f"{LAYER}.mlp.down_proj@weight")
    assert_same(model, spread, lambda m: ablate(m, "**.lora_B.default"), "without the adapters")


def mlp_plan() -> dict[str, Any]:
    """Of the plan for a whole model, what is in an MLP."""
    plan = llama_plan()
    return {name.rpartition("mlp.")[2]: style for name, style in plan.items() if ".mlp." in name}


def adapters_side_by_side() -> None:
    spread = DistributedDataParallel(copy.deepcopy(adapted()))
    check_values(adapted(), spread.module, f"{QUERY}.lora_A.default")
    with ablate(spread, "module.**.lora_B.default"), ablate(adapted(), "**.lora_B.default"):
        assert near(spread(IDS).logits, adapted()(IDS).logits)


def quantised_side_by_side() -> None:
    """Quantised by torchao: numbers of a weight are seen dequantised, in each copy."""
    model = copy.deepcopy(llama())
    quantize_(model.model.layers[0].mlp, Int8WeightOnlyConfig())
    spread = DistributedDataParallel(copy.deepcopy(model), init_sync=False)  # which torchao's tensors cannot go through
    at = "model.layers.0.mlp.down_proj"
    check_values(model, spread.module, at)
    check_values(model, spread.module, "model.layers.1", heads=4)
    clean = model(IDS).logits
    with patch(spread, f"module.{at}@weight", 0.5), patch(model, f"{at}@weight", 0.5):
        assert near(spread(IDS).logits, model(IDS).logits)
    with steer(spread, f"module.{at}@weight", torch.ones(22)), steer(model, f"{at}@weight", torch.ones(22)):
        assert near(spread(IDS).logits, model(IDS).logits)
    assert near(spread(IDS).logits, clean) and not describe(spread)


def quantised_and_sharded() -> None:
    """What is quantised stays outside of the shards of FSDP2, which split plain numbers."""
    model = copy.deepcopy(llama())
    quantize_(model.model.layers[0].mlp, Int8WeightOnlyConfig())
    spread = copy.deepcopy(model)
    quantised = set(spread.model.layers[0].mlp.parameters())
    for block in spread.model.layers:
        fully_shard(block, mesh=line("dp"), ignored_params=quantised & set(block.parameters()))
    fully_shard(spread, mesh=line("dp"), ignored_params=quantised)
    at = "model.layers.0.mlp.down_proj"
    check_values(model, spread, at)
    assert near(seen(spread, f"{at}@weight").dequantize(), seen(model, f"{at}@weight").dequantize())
    assert_same(model, spread, lambda m: patch(m, f"{at}@weight", 0.5), "a quantised weight")
    check_weight(model, spread, "model.layers.1.mlp.gate_proj@weight")
