"""What is done to spread models in each process of a group; `test_sharded` runs it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import torch
from process_groups import near
from spread_models import (
    OTHER_IDS,
    Make,
    assert_clean,
    assert_same,
    gpt2,
    grid,
    line,
    llama,
    llama_plan,
    parallel_gpt2,
    parallel_llama,
    run,
    sharded,
)
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from nicehooks import ActivationCache, ablate, capture, describe, edit, grad_at, patch, steer


def mean_square(output: Any) -> Tensor:
    return output.logits.square().mean()


def seen(model: Any, where: str, **options: Any) -> Any:
    with torch.no_grad(), capture(model, where, **options) as acts:
        model(OTHER_IDS)
    return acts[where]


def every_change(at: str, new: Tensor, shard: Any, spread: Any, heads: int) -> dict[str, Make]:
    """Changes of a value `[batch, pos, d]` at `at`; `new` is another one, `shard` the same as `spread` gives it."""
    d = new.shape[-1]
    v, basis = torch.linspace(-1, 1, d), torch.eye(d)[:, :2]
    split = torch.linspace(0, 2, d // heads)
    return {
        "patch": lambda m: patch(m, at, new),
        "patch with what the model gives": lambda m: patch(m, at, shard if m is spread else new),
        "patch row": lambda m: patch(m, at, v),
        "patch last position": lambda m: patch(m, f"{at}[:, -1]", new[:, -1]),
        "patch one number": lambda m: patch(m, f"{at}[1, 3, 2]", 2.0),
        "patch some channels": lambda m: patch(m, f"{at}[:, :, 1:4]", v[1:4]),
        "patch a list of positions": lambda m: patch(m, f"{at}[:, [0, 2]]", v),
        "patch several": lambda m: patch(m, {f"{at}[:, 1]": v, f"{at}[:, 4]": v * 2, f"{at}[:, 5, 3]": 1.0}),
        "patch a head": lambda m: patch(m, f"{at}/{heads}[:, :, 1]", new.unflatten(-1, (heads, -1))[:, :, 1]),
        "patch within a subspace": lambda m: patch(m, at, new, subspace=basis),
        "steer": lambda m: steer(m, at, v, 2.0),
        "steer last position": lambda m: steer(m, f"{at}[:, -1]", v),
        "steer every head": lambda m: steer(m, f"{at}/{heads}[:, :, *]", split),
        "ablate": lambda m: ablate(m, at),
        "ablate to a mean": lambda m: ablate(m, at, value=ActivationCache({at: new.mean((0, 1))})),
        "ablate a position": lambda m: ablate(m, f"{at}[:, 2]", value=v),
        "edit": lambda m: edit(m, at, lambda _: new * 2),
        "edit with plain tensors": lambda m: edit(m, at, lambda value: value * v + 1),
        "edit a part with plain tensors": lambda m: edit(m, f"{at}[:, -1]", lambda value: value * v + 1),
        "patch the gradient": lambda m: patch(m, f"{at}@grad", new * 0.1),
        "ablate the gradient of a position": lambda m: ablate(m, f"{at}@grad[:, 1]"),
        "steer the gradient": lambda m: steer(m, f"{at}@grad[:, -1]", v),
    }


def check_values(model: Any, spread: Any, at: str, heads: int = 2, leave_out: str = "") -> None:
    new, whole = seen(model, at), seen(spread, at, layout="full")
    assert type(whole) is Tensor and near(whole, new)
    for what, make in every_change(at, new, seen(spread, at), spread, heads).items():
        if what != leave_out:
            assert_same(model, spread, make, f"{at}: {what}")
    with capture(model, f"{at}@grad") as theirs:
        run(model)
    with capture(spread, f"{at}@grad", layout="full") as ours:
        run(spread)
    assert type(ours[f"{at}@grad"]) is Tensor and near(ours[f"{at}@grad"], theirs[f"{at}@grad"])
    (_, found), (_, expected) = (grad_at(one, at, mean_square)(OTHER_IDS) for one in (spread, model))
    assert near(found[at], expected[at])
    assert not describe(spread)


def check_weight(model: Any, spread: Any, at: str) -> None:
    new = torch.randn(seen(model, at).shape, generator=torch.Generator().manual_seed(3))
    v, whole = torch.linspace(-1, 1, new.shape[-1]), seen(spread, at, layout="full").detach()
    assert not isinstance(whole, DTensor) and near(whole, seen(model, at))

    def both(m: Any) -> Any:
        stack = contextlib.ExitStack()
        stack.enter_context(patch(m, at, new))
        stack.enter_context(steer(m, at, v))
        return stack

    makers: dict[str, Make] = {
        "patch": lambda m: patch(m, at, new),
        "patch with the gathered one": lambda m: patch(m, at, whole * 2 + 1),
        "patch row": lambda m: patch(m, f"{at}[1]", 0.5),
        "patch a list of rows": lambda m: patch(m, f"{at}[[0, 2]]", 2.0),
        "steer": lambda m: steer(m, at, v, 0.5),
        "ablate": lambda m: ablate(m, at),
        "edit": lambda m: edit(m, at, lambda weight: weight * v + 1),
        "edit to a plain tensor": lambda m: edit(m, at, lambda _: new * 2),
        "two": both,
    }
    if new.ndim > 1:
        makers["patch column"] = lambda m: patch(m, f"{at}[:, 1]", 0.5)
        makers["patch half"] = lambda m: patch(m, f"{at}/2[..., 1, :]", 0.5)
    for what, make in makers.items():
        assert_same(model, spread, make, f"{at}: {what}")
    (_, found), (_, expected) = (grad_at(one, at, mean_square)(OTHER_IDS) for one in (spread, model))
    assert near(found[at], expected[at])
    assert not describe(spread)
    assert_clean(model, spread)


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def columns() -> None:
    """A DTensor that is split in its last dimension, unevenly by four processes."""
    spread = parallel_llama(line())
    assert isinstance(seen(spread, "model.layers.0.mlp.gate_proj"), DTensor)
    check_values(llama(), spread, "model.layers.0.mlp.gate_proj")


def rows() -> None:
    """Sums that are yet to be made, as the layer gives them."""
    check_values(llama(), parallel_llama(line()), "model.layers.0.mlp.down_proj")


def more_columns() -> None:
    spread = parallel_llama(line())
    check_values(llama(), spread, "model.layers.1.mlp.act_fn")
    check_values(llama(), spread, "model.layers.1.self_attn.q_proj", heads=4)
    check_values(llama(), spread, "model.layers.0")
    check_values(llama(), spread, "lm_head", heads=3)


def embedding() -> None:
    """What each process looked up, which torch can sum up only once."""
    check_values(gpt2(), parallel_gpt2(line()), "transformer.wte", heads=4)


def sequence() -> None:
    """A DTensor that is split by positions."""
    check_values(gpt2(), parallel_gpt2(line()), "transformer.ln_f", heads=4)


def weights() -> None:
    spread = parallel_llama(line())
    check_weight(llama(), spread, "model.layers.0.mlp.gate_proj@weight")
    check_weight(llama(), spread, "model.layers.0.mlp.down_proj@weight")


def more_weights() -> None:
    for at in ("lm_head@weight", "model.layers.1.self_attn.q_proj@weight", "model.embed_tokens@weight"):
        check_weight(llama(), parallel_llama(line()), at)
    for at in ("transformer.wte@weight", "transformer.ln_f@weight"):
        check_weight(gpt2(), parallel_gpt2(line()), at)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------

SHARDED = "model.layers.0.mlp.gate_proj@weight"
ROOT = "lm_head@weight"


def fully_sharded() -> None:
    """Weights of a block, which are whole only while it runs, and those of the root, changed from the root."""
    spread = sharded(copy.deepcopy(llama()), line("dp"))
    assert isinstance(seen(spread, SHARDED), DTensor)
    check_weight(llama(), spread, SHARDED)
    check_weight(llama(), spread, ROOT)


def fully_sharded_values() -> None:
    with warnings.catch_warnings():  # a head of the output of a block is written into a view, about which FSDP2 warns
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        check_values(llama(), sharded(copy.deepcopy(llama()), line("dp")), "model.layers.0")
        check_values(gpt2(), sharded(copy.deepcopy(gpt2()), line("dp")), "transformer.h.0.mlp")


def fully_sharded_gpt2() -> None:
    spread = sharded(copy.deepcopy(gpt2()), line("dp"))
    for at in ("transformer.h.0.mlp.c_proj@weight", "transformer.wte@weight", "transformer.ln_f@weight"):
        check_weight(gpt2(), spread, at)


def two_dimensions() -> None:
    """Replicas of shards."""
    spread = sharded(copy.deepcopy(llama()), grid("replicas", "shards"))
    check_weight(llama(), spread, SHARDED)
    check_weight(llama(), spread, ROOT)


def offloaded() -> None:
    spread = sharded(copy.deepcopy(llama()), line("dp"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    check_weight(llama(), spread, SHARDED)
    check_weight(llama(), spread, ROOT)


def shards_of_columns() -> None:
    """FSDP2 around tensor parallelism: weights that are split twice."""
    mesh = grid("dp", "tp")
    spread = sharded(parallel_llama(mesh["tp"]), mesh["dp"])
    for at in (SHARDED, "model.layers.0.mlp.down_proj@weight"):
        check_weight(llama(), spread, at)
    check_values(llama(), spread, "model.layers.0.mlp.gate_proj")


def short_dtypes() -> None:
    """A weight that is changed is the one that the module computes with, in its dtype."""
    half = copy.deepcopy(llama()).to(torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    spread = sharded(copy.deepcopy(llama()), line("dp"), mp_policy=policy)
    new = torch.randn(22, 16, generator=torch.Generator().manual_seed(0))
    makers: list[Make] = [
        lambda m: patch(m, SHARDED, new),
        lambda m: patch(m, f"{ROOT}[1]", new[0]),
        lambda m: steer(m, "model.layers.0", new[0], 2.0),
    ]
    for make in makers:
        with make(half):
            expected, _ = run(half)
        with make(spread):
            found, _ = run(spread)
        assert found.dtype == torch.bfloat16 and near(found, expected)
        assert not near(expected, run(half)[0])
    assert seen(spread, SHARDED, layout="full").dtype == torch.float32  # the shards, as an optimizer has them


# --- before and after -------------------------------------------------------------------------------------------------


def entered_before() -> None:
    """What is entered, or attached, before the model is spread acts as what is entered after it."""
    v = torch.linspace(-1, 1, 22)
    changes: dict[str, Tensor] = {
        SHARDED: v[:16],
        "model.embed_tokens@weight[3]": v[:16],
        "model.layers.0": v[:16],
        "model.layers.0.mlp.gate_proj[:, -1]": v,
        f"{ROOT}[3]": v[:16],
    }
    ways = [lambda m: sharded(m, line("dp")), lambda m: parallelize_module(m, line(), llama_plan())]
    for spread_out in ways:
        for at, value in changes.items():
            with patch(llama(), at, value):
                expected = run(llama())
            model = copy.deepcopy(llama())
            with patch(model, at, value):
                spread_out(model)
                assert all(map(near, run(model), expected)), at
            assert_clean(llama(), model)
            model = copy.deepcopy(llama())
            handle = patch(model, at, value).attach()
            spread_out(model)
            assert all(map(near, run(model), expected)), at
            handle.remove()
            assert_clean(llama(), model)
