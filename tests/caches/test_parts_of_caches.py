"""Parts of a cache: chosen by path, stacked, indexed, and call by call."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cached import PLUS, X, numbers, run
from torch import nn

from nicehooks import (
    ActivationCache,
    ModulePath,
    NiceHooksError,
    SiteNotFound,
    capture,
)

# --- parts of a cache -------------------------------------------------------------------------------------------------

SOME = ActivationCache({f"h.{i}{port}": X + i for i in range(11) for port in ("", "@input[0]")} | {"head": X})
SELECTIONS: dict[str, tuple[Any, list[str]]] = {
    "a path": ("h.3", ["h.3"]),
    "a wildcard": ("h.1*", ["h.1", "h.10"]),
    "a port": ("h.3@input[0]", ["h.3@input[0]"]),
    "a wildcard with a port": ("h.1*@input[0]", ["h.1@input[0]", "h.10@input[0]"]),
    "alternatives": ("h.{2,10}@input[0]", ["h.2@input[0]", "h.10@input[0]"]),
    "a part": ("h.{2..3}@input[0][:, -1]", ["h.2@input[0][:, -1]", "h.3@input[0][:, -1]"]),
    "a part of one": ("head[0]", ["head[0]"]),
    "a list": (["head", "h.3@input[0]"], ["head", "h.3@input[0]"]),
    "a tuple": (("head",), ["head"]),
    "True": (True, list(SOME)),
    "False": (False, []),
    "a parsed path": (ModulePath.parse("head"), ["head"]),
    "a predicate": (lambda key: key.endswith("d"), ["head"]),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_select_is_a_part_of_the_cache(case: str) -> None:
    where, keys = SELECTIONS[case]
    part = SOME.select(where)
    assert type(part) is ActivationCache
    assert list(part) == keys
    assert all(torch.equal(part[key], SOME[key]) for key in keys)


def test_several_places_are_the_list_of_them() -> None:
    assert list(SOME.select("head", ["h.3", "h.4@input[0]"], "h.1")) == ["head", "h.3", "h.4@input[0]", "h.1"]
    assert torch.equal(SOME.stack("h.3", "head"), torch.stack([SOME["h.3"], SOME["head"]]))


def test_select_takes_regular_expressions_over_the_keys() -> None:
    assert list(SOME.select(re.compile(r"^h\.\d$"))) == [f"h.{i}" for i in range(10)]
    assert list(SOME.select([re.compile(r"^h\.0"), "head"])) == ["h.0", "h.0@input[0]", "head"]


@pytest.mark.parametrize("where", ["plus[:, *]", "plus#*", "plus#*[0]", "p*[:, *]", "tree[*]", "tree[1][*]"])
def test_what_selects_in_a_capture_selects_the_same_in_its_cache(where: str) -> None:
    """`acts.select(where)` is everything that `capture(model, where)` has seen."""
    acts = run(where)
    assert list(acts.select(where)) == list(acts)


def test_a_star_selects_the_parts_of_what_was_captured_whole() -> None:
    assert list(run("plus", "tree").select("plus[:, *]")) == ["plus[:, 0]", "plus[:, 1]", "plus[:, 2]"]


@pytest.mark.parametrize("where", [nn.Linear, nn.ReLU(), 3, None])
def test_a_cache_knows_no_modules(where: Any) -> None:
    """So what selects by module is an error of ours that says what a cache can select by."""
    with pytest.raises(NiceHooksError, match="regular expression"):
        SOME.select(where)


@pytest.mark.parametrize(
    ("where", "shown"), [(re.compile("^plus$"), "'^plus$'"), (str.isdigit, "'isdigit'")], ids=["pattern", "predicate"]
)
def test_a_test_of_the_keys_that_selects_nothing_is_said(where: Any, shown: str) -> None:
    with pytest.raises(SiteNotFound) as caught:
        SOME.select(["head", where])
    assert str(caught.value) == f"{shown} selects nothing in this cache of 23 sites."


def test_a_part_does_not_stand_for_the_whole() -> None:
    with pytest.raises(SiteNotFound):
        run("tree[1][0]").select("tree[1]")


def test_a_module_is_selected_under_each_of_its_names() -> None:
    model = nn.Sequential(nn.ReLU())
    model.add_module("same", model[0])
    with capture(model, "0") as acts:
        model(X)
    assert list(acts.select("same[0]")) == ["same[0]"]
    assert acts.select("same[0]")["same[0]"].tolist() == X[0].tolist()


def test_stack_is_one_tensor_with_a_new_leading_dimension() -> None:
    stacked = SOME.select("h.{0..2}@input[0]").stack()
    assert torch.equal(stacked, torch.stack([X, X + 1, X + 2]))
    assert torch.equal(SOME.stack("h.{0..2}@input[0][:, -1]"), torch.stack([X[:, -1] + i for i in range(3)]))
    assert torch.equal(SOME.stack(["head", "h.1@input[0]"]), torch.stack([X, X + 1]))
    assert ActivationCache({"a": X, "b": X}).stack().shape == (2, 2, 3)


STACKS: dict[str, tuple[ActivationCache, Any, str]] = {
    "shapes": (
        ActivationCache({"a": X, "b": X[0]}),
        True,
        "only tensors of one shape and dtype can be stacked, but here are a: Tensor[2, 3] float32, "
        "b: Tensor[3] float32.",
    ),
    "dtypes": (
        ActivationCache({"a": X, "b": X.double()}),
        True,
        "only tensors of one shape and dtype can be stacked, but here are a: Tensor[2, 3] float32, "
        "b: Tensor[2, 3] float64.",
    ),
    "trees": (
        ActivationCache({"a": (X,)}),
        "a",
        "only tensors of one shape and dtype can be stacked, but here are a: (Tensor[2, 3] float32).",
    ),
    "nothing": (ActivationCache(), True, "there is nothing to stack: the cache is empty."),
    "none of it": (ActivationCache({"a": X}), False, "there is nothing to stack: no site is selected."),
}


@pytest.mark.parametrize("case", STACKS)
def test_what_cannot_be_stacked_is_said(case: str) -> None:
    acts, where, message = STACKS[case]
    with pytest.raises(NiceHooksError) as caught:
        acts.stack(where)
    assert str(caught.value) == message


@pytest.mark.parametrize("where", ["plus", "plus#*"])
def test_calls_are_the_values_of_each_call(where: str) -> None:
    """However they were captured."""
    acts = run(where, keep="all" if where == "plus" else "last")
    assert numbers(acts.calls("plus")) == [(X + 1).tolist(), (X + 2).tolist()]
    assert numbers(acts.calls("plus[0]")) == [(X[0] + 1).tolist(), (X[0] + 2).tolist()]


def test_one_call_is_a_list_of_one() -> None:
    assert numbers(run("out").calls("out['logits']")) == [(PLUS + 20).tolist()]
    assert numbers(run("out", keep="all").calls("out['logits']")) == [(PLUS + 20).tolist()]
    assert numbers(run("plus#1").calls("plus")) == [PLUS.tolist()]


def test_nbytes_is_the_memory_of_all_tensors_once() -> None:
    assert ActivationCache().nbytes == 0
    assert ActivationCache({"a": X, "b": (X.double(), [None, "text"]), "c": X}).nbytes == 24 + 48
    assert run("plus", keep="all").nbytes == 48
