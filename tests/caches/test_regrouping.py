"""A part is found in what was captured, however the subscripts of both are grouped; and it is that part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nicehooks import ActivationCache, NotCaptured, anatomy, capture
from nicehooks.caches.regrouping import regrouped
from nicehooks.errors import TreeMismatch
from nicehooks.paths.grammar import ModulePath
from nicehooks.values import trees

VALUE = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
ITEMS = st.one_of(
    st.just(slice(None)), st.integers(-2, 1), st.sampled_from([slice(1, None), slice(-2, None), slice(0, 2)])
)
CHAINS = st.lists(st.lists(ITEMS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)


@given(CHAINS)
def test_what_is_left_of_a_chain_behind_another_one_leads_to_the_same_part(steps: list[Any]) -> None:
    chain = tuple(steps)
    try:
        expected = trees.get(VALUE, chain)
    except TreeMismatch:
        assume(False)
        return
    for whole, rest in regrouped(chain):
        assert torch.equal(trees.get(trees.get(VALUE, whole), rest), expected)


@given(CHAINS, CHAINS)
def test_a_cache_gives_the_part_or_does_not_have_it(captured: list[Any], asked: list[Any]) -> None:
    there, wanted = (str(ModulePath("h", chain=tuple(chain))) for chain in (captured, asked))
    try:
        part, expected = (trees.get(VALUE, tuple(chain)) for chain in (captured, asked))
    except TreeMismatch:
        assume(False)
        return
    acts = ActivationCache({there: part})
    if wanted in acts:
        assert torch.equal(acts[wanted], expected)
    else:
        with pytest.raises(NotCaptured):
            _ = acts[wanted]


@pytest.mark.parametrize(
    ("captured", "asked"),
    [
        ("[:, :, -1]", "[:, 3][:, -1]"),
        ("[:, :, -1]", "[:, 3, -1]"),
        ("[:, :, -1]", "[:, 3][:, -1][0]"),
        ("[:, :, 3]", "[:, -1, 3]"),
        ("[0]", "[:, 1, 2][0]"),
        ("[:, 1:, 0]", "[1, 1:][:, 0]"),
    ],
)
def test_a_part_across_what_was_captured_is_found(captured: str, asked: str) -> None:
    value = torch.randn(2, 4, 5, 6)
    acts = ActivationCache({f"h{captured}": trees.get(value, ModulePath.parse(f"h{captured}").chain)})
    assert torch.equal(acts[f"h{asked}"], trees.get(value, ModulePath.parse(f"h{asked}").chain))
    assert torch.equal(acts.stack(f"h{asked}")[0], acts[f"h{asked}"])


@pytest.mark.parametrize(
    ("captured", "asked"),
    [
        ("[:, :, -1]", "[:, 3]"),  # not all of it is there
        ("[:, :, -1]", "[:, 3, 5]"),  # which is the last one in some models
        ("[:, 2:]", "[:, 2]"),  # a part of a range
        ("[:, 1:, 0]", "[1][1:, 0]"),  # which may be of a tuple
        ("/2[:, :, 1]", "[:, 1]"),  # of another shape
        ("['x'][:, 1]", "[:, 1]"),
    ],
)
def test_what_is_not_there_or_not_known_to_be_is_not_found(captured: str, asked: str) -> None:
    acts = ActivationCache({f"h{captured}": torch.randn(2, 3, 4)})
    assert f"h{asked}" not in acts


def test_a_head_of_patterns_that_were_captured_at_the_last_query(small_llama: Any) -> None:
    parts, ids = anatomy(small_llama), torch.tensor([[3, 1, 4, 1, 5]])
    with capture(small_llama, parts.pattern.at[:, :, -1], parts.pattern[1]) as acts:
        small_llama(ids)
    some = acts.select(parts.pattern.at[:, :, -1])
    assert torch.equal(some[parts.pattern[1].head(3)[:, -1]], acts[parts.pattern[1]][:, 3, -1])
    assert parts.pattern[1].head(3) not in some


@pytest.fixture(scope="module")
def small_llama() -> Any:
    from gallery.families import made

    return made("llama", "sdpa")
