"""One intervention on a Llama that is spread over several processes, as it is written for one.

torchrun --nproc-per-node 2 docs/examples/tensor_parallel.py
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from nicehooks import capture, patch, steer

GATE = "model.layers.0.mlp.gate_proj"


def small_llama() -> LlamaForCausalLM:
    """The same on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 22, "vocab_size": 33, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).eval()


def spread(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The channels of the MLPs, split among all processes."""
    plan = {}
    for name in ("gate_proj", "up_proj"):
        plan[f"model.layers.*.mlp.{name}"] = ColwiseParallel(use_local_output=False)
    plan["model.layers.*.mlp.down_proj"] = RowwiseParallel()
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


@torch.no_grad()
def experiment(model: LlamaForCausalLM) -> torch.Tensor:
    """What is patched from another prompt, and steered; no line of it knows how many processes there are."""
    clean, other = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[2, 7, 1, 8, 2]])
    with capture(model, GATE, layout="full") as acts:
        model(other)
    with patch(model, f"{GATE}[:, -1]", acts[GATE][:, -1]), steer(model, GATE, torch.linspace(-1, 1, 22)):
        return model(clean).logits


def main() -> None:
    """Compares the model that is spread with the whole one."""
    dist.init_process_group("gloo")
    whole = small_llama()
    model = spread(copy.deepcopy(whole))
    with torch.no_grad(), capture(model, GATE) as acts:
        model(torch.tensor([[3, 1, 4, 1, 5]]))
    mine = tuple(acts[GATE].to_local().shape)
    same = torch.allclose(experiment(model), experiment(whole), atol=1e-5)
    lines = [None] * dist.get_world_size()
    dist.all_gather_object(lines, f"rank {dist.get_rank()} has {mine} of {tuple(acts[GATE].shape)}, the same: {same}")
    if dist.get_rank() == 0:
        print(*lines, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
