"""In half precision many numbers are equal: the parts are where they are in single precision all the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from by_hooks import one_thread
from gallery.every_architecture import tiny

from nicehooks import anatomy
from nicehooks.anatomies.columns import columns_of

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)

WIDE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 2},
    "GPT2LMHeadModel": {"n_embd": 256},
    "GPTNeoXForCausalLM": {"hidden_size": 256},
    "Phi3ForCausalLM": {"hidden_size": 256, "num_key_value_heads": 2},
    "Gemma2ForCausalLM": {"hidden_size": 256, "head_dim": 64},
    "DeepseekV3ForCausalLM": {"qk_nope_head_dim": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 64},
}
PARTS = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "mlp_out", "resid_post")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WIDE)
def test_the_parts_are_where_they_are_in_single_precision(name: str, dtype: torch.dtype) -> None:
    plain = tiny(name, **WIDE[name])
    single, half = anatomy(plain), anatomy(copy.deepcopy(plain).to(dtype))
    assert all(list(half[part]) == list(single[part]) for part in PARTS)
    assert half.layout.roles == single.layout.roles and half.head.softcap == single.head.softcap
    assert [step for places in half.layout.layers for step in places.form] == [
        step for places in single.layout.layers for step in places.form
    ]


def test_a_soft_cap_of_small_logits_is_that_of_the_config() -> None:
    model = tiny("Gemma2ForCausalLM", final_logit_softcapping=25.0, attn_logit_softcapping=40.0)
    model.lm_head.weight.mul_(0.05)
    assert anatomy(model).head.softcap == 25.0


def test_columns_are_found_among_many_that_are_equal_side_by_side_or_partly_in_another_order() -> None:
    given = torch.randint(0, 40, (2, 30, 64), generator=torch.Generator().manual_seed(1)).float()
    assert len(given[0, 0].unique()) < 40
    beside = torch.stack([torch.arange(8, 24), torch.arange(32, 48)])
    turned = torch.cat([beside[:, :10], beside[:, 10:].unflatten(-1, (3, 2)).mT.flatten(-2)], -1)  # as rotary embedding
    for columns in (beside, turned):
        found = columns_of(given[..., columns], given)
        assert found is not None and torch.equal(found, columns)
