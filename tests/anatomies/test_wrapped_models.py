"""A model that is quantised, adapted, compiled or wrapped has the anatomy of the plain one, and its parts hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from bodies import body
from by_hooks import one_thread
from gallery.adapters import WithAdapter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nicehooks import anatomy, capture, direct_logit_attribution, head_results

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

PARTS = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def adapted(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj", "o_proj", "down_proj")) and isinstance(module, nn.Linear):
            outer, _, last = name.rpartition(".")
            setattr(model.get_submodule(outer), last, WithAdapter(module))
    return model


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def holds(model: Any) -> None:
    """The sums, the heads and the attribution."""
    parts = anatomy(model)
    ends = parts.resid_pre[0], parts.resid_post, parts.final_norm
    with torch.no_grad(), capture(model, parts.attn_out, parts.mlp_out, parts.z, *ends) as cache:
        logits = model(input_ids=IDS).logits
    with torch.no_grad():
        terms = direct_logit_attribution(model, cache, 7, against=5)
        results = head_results(model, cache, 1)
    assert torch.allclose(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5], atol=1e-4)
    assert results.shape == (2, 5, parts.n_heads, parts.d_model)


def same_anatomy(model: Any, plain: Any) -> None:
    own, other = anatomy(model), anatomy(plain)
    assert own.sizes == other.sizes
    for part in PARTS:
        assert list(getattr(own, part)) == list(getattr(other, part)), part
    assert (own.embed, own.final_norm, own.logits) == (other.embed, other.final_norm, other.logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [adapted, quantised])
def test_other_linear_layers_are_no_other_anatomy(change: Any) -> None:
    plain = copy.deepcopy(body("llama"))
    model = change(copy.deepcopy(plain))
    same_anatomy(model, plain)
    if change is adapted:  # rounding to eight bits makes a projection no linear one
        holds(model)


@pytest.mark.usefixtures("group")
def test_data_parallel_models_have_the_anatomy_of_the_model_in_them() -> None:
    plain = copy.deepcopy(body("llama")).requires_grad_(True)
    model = DistributedDataParallel(plain)
    same_anatomy(model, plain)
    holds(model)


@pytest.mark.slow
def test_compiled_models_have_the_anatomy_of_the_model_in_them() -> None:
    plain = copy.deepcopy(body("llama"))
    model = torch.compile(plain, backend="eager")
    same_anatomy(model, plain)
    holds(model)
    torch._dynamo.reset()
