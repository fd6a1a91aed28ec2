"""Arithmetic of caches with caches and numbers, and what is done to every tensor of one."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cached import PLUS, X, numbers, run
from gallery.values import Output, Pair

from nicehooks import (
    ActivationCache,
    SiteNotFound,
    TreeMismatch,
)

# --- arithmetic -------------------------------------------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("number", [2, 0.5, -1.5])
def test_arithmetic_with_a_number_is_that_of_every_tensor(op: Any, number: Any) -> None:
    """On either side; in trees too, where what is no tensor stays."""
    acts = ActivationCache({"a": X, "b": (X + 1, [None, "text", X.double()])})
    for made, expected in ((op(acts, number), lambda t: op(t, number)), (op(number, acts), lambda t: op(number, t))):
        assert type(made) is ActivationCache
        assert numbers(made) == numbers(
            {"a": expected(X), "b": (expected(X + 1), [None, "text", expected(X.double())])}
        )
        assert made["b[1][2]"].dtype == torch.float64


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("kind", [ActivationCache, dict, OrderedDict])
def test_arithmetic_of_caches_is_on_the_common_keys(op: Any, kind: Any) -> None:
    """In the order of the left one; with a plain dict on either side."""
    left = ActivationCache({"a": X, "b": X + 1, "c": (X + 2, None)})
    right = kind({"c": (X + 5, None), "d": X, "b": X + 7})
    made = op(left, right)
    assert type(made) is ActivationCache
    assert list(made) == ["b", "c"]
    assert numbers(made) == numbers({"b": op(X + 1, X + 7), "c": (op(X + 2, X + 5), None)})
    other = op(right, left)
    assert type(other) is ActivationCache
    assert numbers(other) == numbers({"b": op(X + 7, X + 1), "c": (op(X + 5, X + 2), None)})


def test_a_sequence_is_combined_with_another_by_position() -> None:
    """So that what was loaded, where named tuples have become tuples, fits what is captured."""
    pair, plain = ActivationCache({"a": Pair(X, None)}), ActivationCache({"a": (X + 1, None)})
    assert numbers(plain - pair) == numbers({"a": (X * 0 + 1, None)})
    assert type((pair - plain)["a"]) is Pair
    with pytest.raises(TreeMismatch):
        plain - {"a": {"left": X, "right": None}}


def test_caches_can_be_summed_and_averaged() -> None:
    one, other = run("plus"), run("plus") + 2
    mean = sum([one, other]) / 2
    assert numbers(mean) == numbers({"plus": PLUS + 1})
    assert numbers(-one) == numbers({"plus": -PLUS})


@pytest.mark.parametrize(("left", "right"), [("plus", "out"), ("plus", None), (None, "out")])
def test_arithmetic_of_caches_without_a_common_key_is_refused(left: str | None, right: str | None) -> None:
    one, other = (ActivationCache() if where is None else run(where) for where in (left, right))
    shown = [repr(where) if where else "an empty one" for where in (left, right)]
    with pytest.raises(SiteNotFound) as caught:
        one - other
    assert str(caught.value) == f"these caches have no site in common: {shown[0]}, and {shown[1]}."
    assert ActivationCache() - {} == {}


ARITHMETIC_ERRORS: dict[str, tuple[Any, Any, str]] = {
    "shapes": (X, X[:, :2], "at 'a': Tensor[2, 3] float32 and Tensor[2, 2] float32 do not broadcast."),
    "lengths": (
        (X,),
        (X, X),
        "at 'a': (Tensor[2, 3] float32) and (Tensor[2, 3] float32, Tensor[2, 3] float32) have different structures.",
    ),
    "keys": (
        {"x": X},
        {"y": X},
        "at 'a': {x: Tensor[2, 3] float32} and {y: Tensor[2, 3] float32} have different structures.",
    ),
    "a tensor and None": (X, None, "at 'a': Tensor[2, 3] float32 and None have different structures."),
    "None and a tensor": (None, X, "at 'a': None and Tensor[2, 3] float32 have different structures."),
    "a tensor and a tuple": (
        X,
        (X,),
        "at 'a': Tensor[2, 3] float32 and (Tensor[2, 3] float32) have different structures.",
    ),
}


@pytest.mark.parametrize("case", ARITHMETIC_ERRORS)
def test_caches_that_do_not_fit_say_where(case: str) -> None:
    one, other, message = ARITHMETIC_ERRORS[case]
    with pytest.raises(TreeMismatch) as caught:
        ActivationCache({"b": X, "a": one}) - ActivationCache({"b": X, "a": other})
    assert str(caught.value) == message


def test_arithmetic_with_anything_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        run("plus") + "text"
    with pytest.raises(TypeError, match="unsupported operand"):
        None - run("plus")


# --- every tensor -----------------------------------------------------------------------------------------------------


def trees() -> ActivationCache:
    x = X.clone().requires_grad_() * 1
    return ActivationCache({"a": x, "b": (x, [None, {"c": Pair(x, "text")}]), "d": Output(logits=x)})


def test_map_applies_to_every_tensor_and_keeps_every_type() -> None:
    acts = trees()
    made = acts.map(lambda tensor: tensor.sum(dim=-1))
    assert type(made) is ActivationCache
    assert list(made) == ["a", "b", "d"]
    sums = X.sum(dim=-1).tolist()
    assert numbers(made["a"]) == sums
    assert numbers(made["b"]) == (sums, [None, {"c": Pair(sums, "text")}])
    assert type(made["b"][1][1]["c"]) is Pair
    assert type(made["d"]) is Output
    assert acts["a"].shape == (2, 3)


def test_detach_clone_and_to_are_those_of_a_tensor() -> None:
    acts = trees()
    inner = "b[1][1]['c'][0]"
    assert acts[inner].requires_grad
    assert not acts.detach()[inner].requires_grad
    assert acts.detach()[inner].data_ptr() == acts[inner].data_ptr()
    assert acts.clone()[inner].data_ptr() != acts[inner].data_ptr()
    assert torch.equal(acts.clone()[inner], acts[inner])
    for arguments, options in [((torch.float64,), {}), (("cpu", torch.float64), {}), ((), {"dtype": torch.float64})]:
        assert acts.to(*arguments, **options)[inner].dtype == torch.float64
    assert acts.to("cpu")[inner] is acts[inner]
    assert acts.to("meta")[inner].device.type == "meta"


@pytest.mark.parametrize("key", [0, -1, slice(0, 1), (slice(None), 0), None, ..., [1, 0], torch.tensor([True, False])])
def test_index_indexes_every_tensor(key: Any) -> None:
    made = trees().index(key)
    for path in ("a", "b[0]", "b[1][1]['c'][0]", "d['logits']"):
        assert torch.equal(made[path], X[key])
    assert made["b[1][0]"] is None
