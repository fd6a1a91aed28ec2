"""A model that is quantised, adapted, offloaded, compiled or wrapped has the plain anatomy, and its parts hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from bodies import body
from by_hooks import one_thread
from gallery.adapters import WithAdapter
from gallery.every_architecture import tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nicehooks import UnsupportedModule, anatomy, capture, direct_logit_attribution, head_results, logit_lens

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
        results, lens = head_results(model, cache, 1), logit_lens(model, cache)[-1]
    assert torch.allclose(sum(terms.values()), logits[:, -1, 7] - logits[:, -1, 5], atol=1e-4)
    assert results.shape == (2, 5, parts.n_heads, parts.d_model)
    assert torch.allclose(lens, logits, atol=1e-4)
    assert (results.sum(2) - cache[parts.attn_out[1]]).abs().max() < 1e-4


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


def dispatched(model: nn.Module, folder: str) -> Any:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    return dispatch_model(model, {**places, **layers}, main_device="cpu", offload_dir=folder, force_hooks=True)


CPU = torch.device("cpu")
OFFLOADS: dict[str, Callable[[nn.Module, str], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatch_model": dispatched,
}


@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_models_have_the_anatomy_of_those_whose_weights_are_there(how: str, tmp_path: Path) -> None:
    plain, model = tiny("LlamaForCausalLM"), tiny("LlamaForCausalLM")
    OFFLOADS[how](model, str(tmp_path))
    assert model.model.layers[2].mlp.up_proj.weight.is_meta
    same_anatomy(model, plain)
    holds(model)
    assert [row[:5] for row in anatomy(model).report().rows] == [row[:5] for row in anatomy(plain).report().rows]
    assert model.model.layers[2].mlp.up_proj.weight.is_meta and torch.equal(model(IDS).logits, plain(IDS).logits)


def test_weights_that_come_with_a_whole_layer_are_refused_with_the_way_that_works() -> None:
    model = tiny("LlamaForCausalLM")
    cpu_offload(model, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(UnsupportedModule, match=r"'model.layers.0' brings the weights of all .*\n.*remove_hook"):
        anatomy(model)
    remove_hook_from_submodules(model)
    same_anatomy(model, tiny("LlamaForCausalLM"))


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
