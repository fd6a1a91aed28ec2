"""Spread models as libraries make them, and what goes wrong with them; `test_sharded` runs it in each process."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_groups import near
from spread_checks import check_values, check_weight, mean_square, seen
from spread_models import IDS, OTHER_IDS, assert_same, gpt2, line, llama, parallel_gpt2, parallel_llama, run, sharded
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from nicehooks import (
    ActivationCache,
    ContextMisuse,
    TreeMismatch,
    ablate,
    capture,
    describe,
    edit,
    grad_at,
    patch,
    splice,
    steer,
)

GATE = "model.layers.0.mlp.gate_proj"


def shared_folder() -> Path:
    """A folder that every process of the group has the name of."""
    name = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(name)
    return Path(str(name[0]))


# --- layouts ----------------------------------------------------------------------------------------------------------


def layouts() -> None:
    """What a capture gives, and in which form."""
    model, spread = llama(), parallel_llama(line())
    local, whole = seen(spread, GATE), seen(spread, GATE, layout="full")
    assert isinstance(local, DTensor) and local.placements == (Shard(2),) and near(local, whole)
    where = [GATE, f"{GATE}@weight", f"{GATE}@grad", "model.layers.0.mlp.down_proj"]
    with capture(spread, *where, layout="full") as ours, capture(model, *where) as theirs:
        run(spread)
        run(model)
    assert all(type(value) in (Tensor, nn.Parameter) for value in ours.values())
    assert list(ours) == list(theirs) and all(near(ours[key], theirs[key]) for key in theirs)
    assert isinstance(seen(spread, f"{GATE}[:, -1]"), DTensor)
    assert near(seen(spread, f"{GATE}[:, -1]", layout="full"), seen(model, f"{GATE}[:, -1]"))
    assert near(seen(spread, f"{GATE}/2[:, :, 1]", layout="full"), seen(model, f"{GATE}/2[:, :, 1]"))


def options() -> None:
    """`keep`, `map`, `to`, `detach` and `clone` see the whole."""
    spread = parallel_llama(line())
    with torch.no_grad(), capture(spread, GATE, layout="full", keep="all") as acts:
        spread(IDS)
        spread(OTHER_IDS)
    assert [type(value) for value in acts[GATE]] == [Tensor, Tensor]
    assert near(acts[GATE][1], seen(llama(), GATE)) and not near(acts[GATE][0], acts[GATE][1])
    shapes = seen(spread, GATE, layout="full", map=lambda value: value.shape)
    assert tuple(shapes) == (2, 8, 22)
    assert seen(spread, GATE, layout="full", to=torch.float64).dtype == torch.float64
    assert seen(spread, GATE, to=torch.float64).dtype == torch.float64
    v = torch.linspace(-1, 1, 22)
    mixed = seen(spread, GATE, map=lambda value: (value * v).sum(-1))
    assert isinstance(mixed, DTensor) and near(mixed, (seen(llama(), GATE) * v).sum(-1))
    with capture(spread, GATE, layout="full", detach=True, clone=True) as acts:
        spread(OTHER_IDS)
    assert not acts[GATE].requires_grad and near(acts[GATE], seen(llama(), GATE))
    looked_up = parallel_gpt2(line())
    for more in ({}, {"clone": True}, {"to": torch.float64}, {"layout": "full"}):
        assert near(seen(looked_up, "transformer.wte", **more), seen(gpt2(), "transformer.wte"))
    assert near(looked_up(IDS).logits, gpt2()(IDS).logits)


def whole_caches() -> None:
    """The code of one process: captured, changed, and patched back, on every rank."""
    for model, spread in ((llama(), parallel_llama(line())), (llama(), sharded(copy.deepcopy(llama()), line("dp")))):
        where = [GATE, "model.layers.1.mlp.down_proj", f"{GATE}@weight"]

        def job(m: Any, where: list[str] = where) -> ActivationCache:
            with torch.no_grad(), capture(m, *where, layout="full") as acts:
                m(OTHER_IDS)
            return acts.map(lambda value: value * 0.5 + 0.1)

        made = {id(one): job(one) for one in (model, spread)}
        for at in where:
            assert_same(model, spread, lambda m, at=at, made=made: patch(m, {at: made[id(m)][at].detach()}), at)


def misfits() -> None:
    """A shard where the whole is asked for is refused, and the whole where there are local tensors."""
    spread, count = parallel_llama(line()), dist.get_world_size()
    mine = seen(spread, GATE).to_local()
    for at, value in ((GATE, mine), (f"{GATE}[:, -1]", mine[:, -1]), (GATE, torch.ones(7))):
        for context in (patch(spread, at, value), edit(spread, at, lambda _, value=value: value)):
            with pytest.raises(TreeMismatch, match=r"does not broadcast to .*a DTensor, of which this process holds"):
                with context:
                    spread(IDS)
    with pytest.raises(TreeMismatch, match=r"holds .*a plain tensor is taken as the whole value"):
        with patch(spread, f"{GATE}@weight", torch.ones(22 // count, 16)):
            spread(IDS)
    with pytest.raises(TreeMismatch, match="cannot be added"):
        with steer(spread, GATE, torch.ones(7)):
            spread(IDS)
    assert not describe(spread) and near(spread(IDS).logits, llama()(IDS).logits)
    value = seen(spread, GATE)  # a DTensor for a plain tensor is the whole of it
    with torch.no_grad(), patch(llama(), GATE, value):
        expected = llama()(IDS).logits
    with torch.no_grad(), patch(spread, GATE, value.redistribute(placements=[Replicate()])):
        assert near(spread(IDS).logits, expected)
    assert not describe(spread)
    assert near(spread(IDS).logits, llama()(IDS).logits)


def local_values() -> None:
    """Where a layer gives out plain shards, what is patched is one. Uneven ones torch itself does not take."""
    local = parallel_llama(line(), local=True)
    if 22 % dist.get_world_size():
        with pytest.raises(RuntimeError, match="must have same reduction dim"):
            local(IDS)
        return
    place = "model.layers.0.mlp.act_fn"
    here = seen(local, place)
    assert type(here) is Tensor and here.shape[-1] < 22
    with pytest.raises(TreeMismatch, match="does not broadcast"), patch(local, place, torch.ones(22)):
        local(IDS)
    with torch.no_grad(), patch(local, place, here):  # what stands there on this process, and so the shard
        kept = local(IDS).logits
    with torch.no_grad(), patch(llama(), place, seen(llama(), place)):
        assert near(kept, llama()(IDS).logits)
    assert not describe(local)


def one_rank_alone() -> None:
    """Plain values need no message: one rank that patches alone changes its own shard, and nobody waits for it."""
    spread = parallel_llama(line())
    with torch.no_grad():
        if dist.get_rank() == 0:
            with patch(spread, f"{GATE}[:, -1]", 3.0):
                logits = spread(IDS).logits
        else:
            logits = spread(IDS).logits
        assert not near(logits, llama()(IDS).logits)
        assert near(spread(IDS).logits, llama()(IDS).logits)


def nested() -> None:
    """Contexts within contexts, in the order of entry; gradients through what was patched."""
    model, spread = llama(), parallel_llama(line())
    v = torch.linspace(-1, 1, 22, requires_grad=True)
    found: list[Any] = []
    for one in (model, spread):
        with (
            ablate(one, f"{GATE}[:, 0]"),
            steer(one, GATE, v),
            patch(one, f"{GATE}@weight[1]", 0.5),
            capture(one, GATE, layout="full") as acts,
        ):
            logits, gradient = run(one)
        found += [logits, gradient, acts[GATE], v.grad]
        v.grad = None
    assert all(map(near, found[:4], found[4:]))
    autoencoder = nn.Linear(22, 22)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            dist.broadcast(parameter, 0)
    assert_same(model, spread, lambda m: splice(m, GATE, autoencoder), "splice")


def mapped() -> None:
    """Under vmap the plain model does; of DTensors torch itself says no, and nothing stays behind."""
    spread = parallel_llama(line())
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, AssertionError)), patch(spread, GATE, 1.0):
        torch.vmap(lambda ids: spread(ids).logits)(IDS[:, None])
    assert not describe(spread)
    with torch.no_grad():
        assert near(spread(IDS).logits, llama()(IDS).logits)


def _fails(value: Tensor) -> Tensor:
    raise KeyError("of mine")


def raising() -> None:
    """An error on every rank inside of a context: the model is as it was."""
    spread = sharded(copy.deepcopy(llama()), line("dp"))

    for at in (GATE, f"{GATE}@weight", "lm_head@weight"):
        with pytest.raises(KeyError, match="of mine"), edit(spread, at, _fails):
            spread(IDS)
        assert not describe(spread)
        spread.reshard()
        for block in spread.model.layers:
            block.reshard()
    assert near(spread(IDS).logits, llama()(IDS).logits)


def one_rank_raises(layout: str, error: type[Exception], says: str) -> None:
    """The others wait for as long as the timeout of the group lasts; then they say so, and leave their contexts."""
    spread, folder = parallel_llama(line()), shared_folder()
    begun = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(error, match=says), capture(spread, GATE, layout=layout):
            spread(IDS)
        (folder / "over").touch()
    else:
        with pytest.raises(KeyError, match="of mine"), edit(spread, GATE, _fails):
            spread(IDS)
        while not (folder / "over").exists() and time.monotonic() < begun + 50:
            time.sleep(0.05)
        assert (folder / "over").exists()
    assert not describe(spread) and time.monotonic() < begun + 50


def raising_before_a_gather() -> None:
    one_rank_raises("full", ContextMisuse, r"float32 is spread over processes, and they did not all come")


def raising_before_a_message_of_the_model() -> None:
    one_rank_raises("local", RuntimeError, "(?i)timed? ?out|closed")


# --- libraries --------------------------------------------------------------------------------------------------------


def transformers_plan() -> None:
    """`from_pretrained(…, tp_plan="auto")`: values are plain, whole or local; weights are DTensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shared_folder()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 22, "vocab_size": 33, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2)
    if dist.get_rank() == 0:
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    spread = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    assert isinstance(spread.get_submodule(GATE).weight, DTensor)
    check_values(model, spread, "model.layers.0", heads=4)
    check_values(model, spread, "model.layers.0.mlp.down_proj", heads=4)
    check_weight(model, spread, f"{GATE}@weight")
    check_weight(model, spread, "model.layers.0.mlp.down_proj@weight")
    inside = seen(spread, GATE, layout="full")  # nothing says that it is a shard
    shape = (2, 8, 22)
    whole = DTensor.from_local(inside, line(), [Shard(2)], run_check=False, shape=shape, stride=(176, 22, 1))
    assert near(whole, seen(model, GATE))


def pipeline() -> None:
    """Each process has a stage: contexts on it act on what it computes, once for each part of the batch."""
    torch.manual_seed(0)
    rank, count = dist.get_rank(), dist.get_world_size()
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(count)]
    whole = nn.Sequential(*copy.deepcopy(layers))
    stage = PipelineStage(layers[rank], rank, count, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    x, v = torch.randn(4, 6), torch.linspace(-1, 1, 6)
    given = {"args": [x] if rank == 0 else [], "kwargs": {"target": torch.zeros(4, 6)} if rank == count - 1 else {}}
    schedule.step(*given["args"], **given["kwargs"])  # the first one runs each stage once more, to learn shapes
    with steer(layers[rank], "0", v), capture(layers[rank], "1", "1@grad", keep="all") as acts:
        output = schedule.step(*given["args"], **given["kwargs"])
    with steer(whole, [f"{at}.0" for at in range(count)], v), capture(whole, "*.1", "*.1@grad") as theirs:
        expected = whole(x)
        nn.functional.mse_loss(expected, torch.zeros(4, 6)).backward()
    assert len(acts["1"]) == 2 and near(torch.cat(acts["1"]), theirs[f"{rank}.1"])
    assert near(torch.cat(acts["1@grad"]), theirs[f"{rank}.1@grad"] * 2)  # means of halves
    assert rank < count - 1 or near(output, expected)


def data_parallel() -> None:
    spread = DistributedDataParallel(copy.deepcopy(llama()))
    inner = spread.module
    check_values(llama(), inner, "model.layers.0", heads=4)
    with patch(spread, f"module.{GATE}@weight[1]", 0.5), patch(llama(), f"{GATE}@weight[1]", 0.5):
        assert near(spread(IDS).logits, llama()(IDS).logits)
    _, ours = grad_at(spread, f"module.{GATE}", mean_square)(IDS)
    _, theirs = grad_at(llama(), GATE, mean_square)(IDS)
    assert near(ours[f"module.{GATE}"], theirs[GATE])
