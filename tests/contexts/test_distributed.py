"""Models that are spread over processes: DDP, FSDP2, tensor parallelism; and the replicas of DataParallel."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from nicehooks import TreeMismatch, ablate, capture, describe, patch


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def batch(rank: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


def without_first_weight(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[2](model[1](model[0].bias.expand(len(x), 8)))


# --- each by itself, in every process ---------------------------------------------------------------------------------


def ddp() -> None:
    """Each process sees its own part of the batch; gradients are those of this process, before they are averaged."""
    model, x = plain(), batch(dist.get_rank())
    spread, clean = DistributedDataParallel(copy.deepcopy(model)), model(x)
    with capture(spread, "module.0", "module.2@grad") as acts:
        spread(x).sum().backward()
    assert torch.equal(acts["module.0"], model[0](x)) and acts["module.2@grad"].eq(1).all()
    assert spread.module[0].weight.grad is not None
    with ablate(spread, "module.0[:, 0]"):
        assert not torch.equal(spread(x), clean)
    with ablate(spread, "module.0@weight"):
        assert near(spread(x), without_first_weight(model, x))
    assert torch.equal(spread(x), clean) and not describe(spread)


def fsdp2() -> None:
    """Outputs are plain tensors; a weight that is changed is the whole one, as the module computes with it."""
    model, x = plain(), batch(dist.get_rank())
    spread = copy.deepcopy(model)
    for module in (spread[0], spread[2], spread):
        fully_shard(module)
    with capture(spread, "*") as acts:
        assert near(spread(x), model(x))
    assert type(acts["0"]) is Tensor and near(acts["0"], model[0](x))
    with ablate(spread, "0[:, 0]"), capture(spread, "2@grad", "0@grad") as acts:
        spread(x).sum().backward()
    assert acts["2@grad"].eq(1).all() and not acts["0@grad"][:, 0].any() and acts["0@grad"].any()
    assert type(spread[0].weight.grad) is DTensor
    with ablate(spread, "0@weight"):
        assert near(spread(x), without_first_weight(model, x))
    changed = copy.deepcopy(model)
    changed[0].weight.data[1] = 1.0
    with patch(spread, "0@weight[1]", torch.ones(4)):
        assert near(spread(x), changed(x))
    with capture(spread, "0@weight") as acts:
        spread(x)
    assert type(acts["0@weight"]) is DTensor  # the shard, as the model holds it
    assert near(spread(x), model(x)) and not describe(spread)


def tensor_parallel() -> None:
    """Values inside are DTensors or local parts of them, as the modules give them."""
    model, x = plain(), batch(7)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = parallelize_module(copy.deepcopy(model), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with capture(spread, "*") as acts:
        assert near(spread(x), model(x))
    assert type(acts["0"]) is DTensor and near(acts["0"].full_tensor(), model[0](x))
    assert type(acts["1"]) is Tensor and acts["1"].shape == (3, 8 // dist.get_world_size())
    with ablate(spread, "1"):
        assert near(spread(x), model[2].bias.expand(3, 4))
    with ablate(spread, "2[:, 1]"):
        assert not spread(x)[:, 1].any()
    with ablate(spread, "0@weight"):
        assert near(spread(x), without_first_weight(model, x))
    ones = torch.ones(3, 8)
    with patch(spread, "0", distribute_tensor(ones, mesh, acts["0"].placements)):
        assert near(spread(x), model[2](model[1](ones)))
    with patch(spread, "0", torch.ones(8)):
        assert near(spread(x), model[2](model[1](ones)))
    with pytest.raises(TreeMismatch, match=r"patch at '0': Tensor\[7\] float32 does not broadcast to Tensor\[3, 8\]"):
        with patch(spread, "0", torch.ones(7)):
            spread(x)
    assert near(distribute_tensor(ones, mesh, [Replicate()]).full_tensor(), ones)
    assert near(spread(x), model(x)) and not describe(spread)


CASES: dict[str, Callable[[], None]] = {"ddp": ddp, "fsdp2": fsdp2, "tensor_parallel": tensor_parallel}


STORE: Any = getattr(dist, "HashStore")  # noqa: B009  # torch exports it without saying so


@pytest.fixture
def alone() -> Any:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=STORE(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_spread_over_one_process(alone: None, case: str) -> None:
    CASES[case]()


def work(rank: int, file: str) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for case in CASES.values():
        case()
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_model_that_is_spread_over_two_processes(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path / "meeting"),), nprocs=2)


# --- replicas ---------------------------------------------------------------------------------------------------------


def replica_of(module: nn.Module) -> nn.Module:
    """What DataParallel makes for each device: the modules copied flat, each around tensors of that device."""
    copied = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(copied, name, replica_of(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(copied, name, parameter.detach().clone())
    return copied


def test_data_parallel_without_devices_is_the_model_itself() -> None:
    model, x = plain(), batch(0)
    parallel = nn.DataParallel(model)
    with capture(parallel, "module.0") as acts, ablate(parallel, "module.1"):
        assert near(parallel(x), model[2].bias.expand(3, 4))
    assert torch.equal(acts["module.0"], model[0](x))


def test_a_replica_runs_its_own_weights_and_contexts_do_not_reach_its_thread() -> None:
    """Replicas run in threads of their own, where a context does not act: an attached one does."""
    model, x, found = plain(), batch(0), []
    with ablate(model, "0"):
        model(x)
        replica = replica_of(model)
        replica[2].bias = torch.ones(4)
        thread = threading.Thread(target=lambda: found.append(replica(x)))
        thread.start()
        thread.join()
    assert near(found[0], model(x) - model[2].bias + 1)
