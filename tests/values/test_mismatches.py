"""What does not fit is said with what came and what was expected, and at a site with where and what to write."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.trees import Fixed
from gallery.values import Frozen, Output, Pair, Record, tensor_of
from torch import nn

from nicehooks import KEEP, NiceHooksError, TreeMismatch, capture, edit, patch
from nicehooks.caches.watching import Calls
from nicehooks.values.trees import Heads, assign, get, structure_of

# --- what does not fit ------------------------------------------------------------------------------------------------

T23 = tensor_of((2, 3))
MISMATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "a shape": (
        lambda: assign(T23, torch.zeros(2)),
        "Tensor[2] float32 does not broadcast to Tensor[2, 3] float32",
    ),
    "a larger shape": (
        lambda: assign(T23[0], T23),
        "Tensor[2, 3] float32 does not broadcast to Tensor[3] float32",
    ),
    "a complex tensor": (
        lambda: assign(torch.zeros(2), torch.zeros(2, dtype=torch.complex64)),
        "Tensor[2] complex64 has an imaginary part, Tensor[2] float32 has none",
    ),
    "a complex number": (
        lambda: assign(torch.zeros(2), 1j),
        "1j has an imaginary part, Tensor[2] float32 has none",
    ),
    "a text": (lambda: assign(T23, "text"), "str came where Tensor[2, 3] float32 stands"),
    "None": (lambda: assign(T23, None), "None came where Tensor[2, 3] float32 stands"),
    "a list of numbers": (
        lambda: assign(torch.zeros(2), [1.0, 2.0]),
        "[float, float] came where Tensor[2] float32 stands",
    ),
    "a tensor for a tuple": (
        lambda: assign((T23, None), T23),
        "Tensor[2, 3] float32 came where (Tensor[2, 3] float32, None) stands",
    ),
    "a tuple of another length": (
        lambda: assign((T23, None), (T23,)),
        "(Tensor[2, 3] float32) came where (Tensor[2, 3] float32, None) stands",
    ),
    "a wrong element": (
        lambda: assign((None, [T23]), (KEEP, [torch.zeros(2)])),
        "Tensor[2] float32 does not broadcast to Tensor[2, 3] float32 (in element 0) (in element 1)",
    ),
    "a wrong key": (
        lambda: assign({"a": T23, "b": T23}, {"a": T23, "c": T23}),
        "{a: Tensor[2, 3] float32, c: Tensor[2, 3] float32} came where "
        "{a: Tensor[2, 3] float32, b: Tensor[2, 3] float32} stands",
    ),
    "a key too many": (
        lambda: assign({"a": T23}, {"a": T23, "c": T23}),
        "{a: Tensor[2, 3] float32, c: Tensor[2, 3] float32} came where {a: Tensor[2, 3] float32} stands",
    ),
    "a dict for a tuple": (
        lambda: assign((T23, None), {"a": T23, "b": None}),
        "{a: Tensor[2, 3] float32, b: None} came where (Tensor[2, 3] float32, None) stands",
    ),
    "a tuple for a dict": (
        lambda: assign({"a": T23, "b": None}, (T23, None)),
        "(Tensor[2, 3] float32, None) came where {a: Tensor[2, 3] float32, b: None} stands",
    ),
    "another dataclass": (
        lambda: assign(Record(T23, None), Frozen(T23, None)),
        "Frozen(first: Tensor[2, 3] float32, second: None) came where "
        "Record(first: Tensor[2, 3] float32, second: None) stands",
    ),
    "an index": (lambda: get(T23, (2,)), "[2] is out of range for Tensor[2, 3] float32"),
    "an index in a tuple": (
        lambda: get(T23, ((slice(None), 3),)),
        "[:, 3] is out of range for Tensor[2, 3] float32",
    ),
    "an index in a list": (lambda: get(T23, ([0, 2],)), "[[0, 2]] is out of range for Tensor[2, 3] float32"),
    "too many indices": (lambda: get(T23, ((0, 0, 0),)), "[0, 0, 0] is out of range for Tensor[2, 3] float32"),
    "an index of a number": (lambda: get(torch.zeros(()), (0,)), "[0] is out of range for Tensor[] float32"),
    "a key of a tensor": (lambda: get(T23, ("a",)), "['a'] is a key, but the value is Tensor[2, 3] float32"),
    "backwards": (
        lambda: get(T23, (slice(None, None, -1),)),
        "[::-1] steps backwards, which PyTorch does not do",
    ),
    "heads": (lambda: get(T23, (Heads(2),)), "/2 does not divide the last dimension of Tensor[2, 3] float32"),
    "heads of a number": (
        lambda: get(torch.zeros(()), (Heads(2),)),
        "/2 does not divide the last dimension of Tensor[] float32",
    ),
    "heads of a tuple": (lambda: get((T23,), (Heads(3),)), "/3 needs a tensor, not (Tensor[2, 3] float32)"),
    "a slice of a tuple": (
        lambda: get((T23,), ((slice(None), 0),)),
        "[:, 0] needs a tensor, not (Tensor[2, 3] float32)",
    ),
    "an element": (
        lambda: get((T23, None), (2,)),
        "[2] is not in (Tensor[2, 3] float32, None), which has 0, 1",
    ),
    "a key": (lambda: get({"a": T23}, ("b",)), "['b'] is not in {a: Tensor[2, 3] float32}, which has 'a'"),
    "a field": (
        lambda: get(Pair(T23, None), ("middle",)),
        "['middle'] is not in Pair(left: Tensor[2, 3] float32, right: None), which has 'left', 'right'",
    ),
    "a part of None": (lambda: get((None,), (0, 0)), "[0] needs a tensor or a container, not None"),
    "a part of nothing": (lambda: get((), (0,)), "[0] is not in (), which has nothing"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_mismatch_says_what_came_and_what_was_expected(case: str) -> None:
    act, message = MISMATCHES[case]
    with pytest.raises(TreeMismatch) as caught:
        act()
    assert str(caught.value) == message
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, NiceHooksError)


MODEL = Fixed(T23)
AT_SITES: dict[str, tuple[Callable[[], Any], str]] = {
    "a shape": (
        lambda: patch(MODEL, "fc", torch.zeros(2, 4)),
        "patch at 'fc': Tensor[2, 4] float32 does not broadcast to Tensor[2, 3] float32.",
    ),
    "a shape, at a part": (
        lambda: patch(MODEL, {"fc[:, -1]": torch.zeros(3)}),
        "patch at 'fc[:, -1]': Tensor[3] float32 does not broadcast to Tensor[2] float32.",
    ),
    "an index": (
        lambda: patch(MODEL, "fc[:, 3]", 0.0),
        "patch at 'fc[:, 3]': [:, 3] is out of range for Tensor[2, 3] float32.",
    ),
    "an index to capture": (
        lambda: capture(MODEL, "fc[:, 3]"),
        "capture at 'fc[:, 3]': [:, 3] is out of range for Tensor[2, 3] float32.",
    ),
    "a key": (
        lambda: capture(MODEL, "out['states']"),
        "capture at \"out['states']\": ['states'] is not in Output(logits: Tensor[2, 3] float32), which has 'logits'.",
    ),
    "an argument": (
        lambda: capture(MODEL, "fc@input[1]"),
        "capture at 'fc@input[1]': [1] is not in Arguments(input: Tensor[2, 3] float32), which has 'input'.",
    ),
    "a star too many": (
        lambda: capture(MODEL, "fc[0, 0, *]"),
        "capture at 'fc[0, 0, *]': [*] is at dimension 2 of Tensor[2, 3] float32.",
    ),
    "a star before too many": (
        lambda: capture(MODEL, "fc[..., *, 0, 0]"),
        "capture at 'fc[..., *, 0, 0]': [*] is at dimension -1 of Tensor[2, 3] float32.",
    ),
    "a star of None": (
        lambda: capture(MODEL, "nothing[*]"),
        "capture at 'nothing[*]': [*] needs a tensor or a container, not None.",
    ),
    "heads": (
        lambda: capture(MODEL, "fc/2[..., 0]"),
        "capture at 'fc/2[..., 0]': /2 does not divide the last dimension of Tensor[2, 3] float32.",
    ),
    "a tensor for a tuple": (
        lambda: edit(MODEL, "pair", lambda value: value[0] * 2),
        "edit at 'pair': Tensor[2, 3] float32 came where (Tensor[2, 3] float32, None) stands.\n"
        "  the value there is (Tensor[2, 3] float32, None); choose a part of it:\n"
        '    edit(model, "pair[0]", …)',
    ),
    "a tensor for a ModelOutput": (
        lambda: edit(MODEL, "out", lambda value: value.logits * 2),
        "edit at 'out': Tensor[2, 3] float32 came where Output(logits: Tensor[2, 3] float32) stands.\n"
        "  the value there is Output(logits: Tensor[2, 3] float32); choose a part of it:\n"
        "    edit(model, \"out['logits']\", …)",
    ),
}


@pytest.mark.parametrize("case", AT_SITES)
def test_at_a_site_a_mismatch_says_where_and_what_to_write(case: str) -> None:
    make, message = AT_SITES[case]
    with pytest.raises(TreeMismatch) as caught, make():
        MODEL(T23)
    assert str(caught.value) == message


# --- descriptions -----------------------------------------------------------------------------------------------------

DESCRIPTIONS: list[tuple[Any, str]] = [
    (T23, "Tensor[2, 3] float32"),
    (torch.zeros((), dtype=torch.bool), "Tensor[] bool"),
    (None, "None"),
    ("secret", "str"),
    (3, "int"),
    ((), "()"),
    ((T23, None), "(Tensor[2, 3] float32, None)"),
    ([T23, (None,)], "[Tensor[2, 3] float32, (None)]"),
    ({"b": T23, "a": None}, "{b: Tensor[2, 3] float32, a: None}"),
    (OrderedDict(b=T23, a=None), "OrderedDict(b: Tensor[2, 3] float32, a: None)"),
    (Pair(T23, None), "Pair(left: Tensor[2, 3] float32, right: None)"),
    (Record(T23, None), "Record(first: Tensor[2, 3] float32, second: None)"),
    (Output(logits=T23), "Output(logits: Tensor[2, 3] float32)"),
]


@pytest.mark.parametrize(("value", "text"), DESCRIPTIONS, ids=[text for _, text in DESCRIPTIONS])
def test_a_description_has_the_structure_and_never_the_contents(value: Any, text: str) -> None:
    assert structure_of(value) == text


SEVERAL: dict[str, tuple[str, Any, str]] = {
    "a tree of gradients": ("1@grad", (KEEP, torch.ones(2)), "{'1@grad[0]': …, '1@grad[1]': …}"),
    "a mapping, of those of arguments": ("1@input.grad", {"x": 1.0}, "{\"1@input.grad['x']\": …}"),
    "the calls of a capture": ("0", Calls([torch.ones(2)] * 3), "{'0#0': …, '0#1': …, …}"),
    "those of gradients": ("0@grad", Calls([torch.ones(2)] * 2), "{'0#0@grad': …, '0#1@grad': …}"),
}


@pytest.mark.parametrize("case", list(SEVERAL))
def test_several_values_for_one_site_are_refused_on_entry_with_the_paths_to_write(case: str) -> None:
    where, value, fix = SEVERAL[case]
    model = nn.Sequential(nn.Linear(2, 2), Fixed((torch.ones(2), torch.ones(2))))
    with pytest.raises(TreeMismatch, match=f"^patch at '{where}': ") as caught, patch(model, where, value):
        raise AssertionError
    assert f"\n    patch(model, {fix})  # " in str(caught.value)
