"""Values of every kind: complex, sparse, nested, packed, low-precision ones; what cannot be written into them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gallery.returning import Gives
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers.utils.generic import ModelOutput

from nicehooks import (
    ActivationCache,
    TreeMismatch,
    ablate,
    capture,
    captured,
    edit,
    patch,
    splice,
    steer,
)
from nicehooks.values import trees

# What torch says of kinds of tensors that it calls new, on the first of each.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

X = torch.arange(12.0).reshape(3, 4) - 5


def making(make: Callable[[Tensor], Any]) -> nn.Module:
    return nn.Sequential(Gives(make))


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[:1]], layout=torch.jagged)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda x: torch.complex(x, x + 1),
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: x.to_sparse_csr(),
    "compressed columns": lambda x: x.to_sparse_csc(),
    "jagged": jagged,
    "nested": lambda x: torch.nested.nested_tensor([x[:2], x[:1]]),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x > 0,
}


def dense(value: Tensor) -> Any:
    """The numbers of a tensor of any kind."""
    if value.is_nested:
        return [part.tolist() for part in value.unbind()]
    return value.to_dense().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_values_of_every_kind_are_captured_patched_and_ablated(kind: str) -> None:
    model = making(KINDS[kind])
    clean, acts = captured(model, "0")(X)
    assert acts["0"] is clean
    assert acts.nbytes > 0
    assert str(clean.dtype).removeprefix("torch.") in repr(acts)
    with patch(model, {"0": acts.clone()["0"]}):
        patched = model(X + 1)
    assert (dense(patched), patched.layout) == (dense(clean), clean.layout)
    for number in (0, 1):
        with ablate(model, "0", value=number):
            ablated = model(X)
        assert (ablated.layout, ablated.dtype) == (clean.layout, clean.dtype)
        assert set(flat(dense(ablated))) == {number}


def flat(numbers: Any) -> list[Any]:
    return [one for part in numbers for one in flat(part)] if isinstance(numbers, list) else [numbers]


PARTS = ["0[0]", "0[:, 0]", "0[..., 0]", "0[[0, 1]]", "0/2", "0[:, *]", "0[0:1]"]


@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("kind", ["complex", "conjugate", "bfloat16", "int8", "bool"])
def test_parts_of_dense_tensors_are_written(kind: str, path: str) -> None:
    model = making(KINDS[kind])
    with ablate(model, path), capture(model, path) as acts:
        model(X)
    assert len(acts) > 0
    assert not any(value.any() for value in acts.values())


@pytest.mark.parametrize("path", PARTS[:-1])
@pytest.mark.parametrize("kind", ["sparse", "compressed rows", "nested"])
def test_parts_of_tensors_that_torch_writes_no_parts_of_are_refused_with_the_site(kind: str, path: str) -> None:
    model = making(KINDS[kind])
    with pytest.raises(TreeMismatch, match=r"^ablate at '0[\[/]"), ablate(model, path):
        model(X)


@pytest.mark.parametrize("path", [path for path in PARTS if path != "0/2"])
def test_parts_of_a_jagged_tensor_are_refused_with_the_site(path: str) -> None:
    model = making(jagged)
    with pytest.raises(TreeMismatch, match=r"^ablate at '0\["), ablate(model, path):
        model(X)


def test_heads_of_a_jagged_tensor_are_written() -> None:
    model = making(jagged)
    with ablate(model, "0/2"), capture(model, "0") as acts:
        model(X)
    assert set(flat(dense(acts["0"]))) == {0.0}


@pytest.mark.parametrize("path", ["0[:, 0]", "0[1]", "0[..., 1:3]", "0[0, [1, 2]]", "0/2[:, 1]", "0[None][0, :, 0]"])
@pytest.mark.parametrize("conjugate", [False, True])
def test_a_part_of_a_complex_value_is_written_with_gradients_on(path: str, conjugate: bool) -> None:
    """And the gradient is that of the same forward with a mask."""
    model = making(KINDS["conjugate" if conjugate else "complex"])
    x = X.clone().requires_grad_()
    with ablate(model, path):
        out = model(x)
    mask = torch.ones(3, 4)
    with ablate(marked := making(lambda x: x), path):
        mask = marked(mask)
    assert torch.equal(out, model(x) * mask)
    (found,) = torch.autograd.grad(out.abs().sum(), x)
    (expected,) = torch.autograd.grad((model(x).abs() * mask).sum(), x)
    assert torch.allclose(found, expected)


def test_a_part_of_a_complex_value_is_written_under_vmap() -> None:
    def ablated(x: Tensor) -> Tensor:
        with ablate(model, "0[0]"):
            return model(x)

    model = making(KINDS["complex"])
    assert torch.equal(torch.vmap(ablated)(X), torch.stack([ablated(x) for x in X]))


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a complex vector": (lambda model: steer(model, "0", X * 1j), "has an imaginary part"),
    "a complex scale": (lambda model: steer(model, "0", X, scale=1j), "has an imaginary part"),  # pyright: ignore
    "a complex edit": (lambda model: edit(model, "0", lambda value: value * 1j), "has an imaginary part"),
    "a complex part": (lambda model: patch(model, "0[0]", torch.ones(4) * 1j), "has an imaginary part"),
    "a complex autoencoder": (lambda model: splice(model, "0", lambda value: value * 1j), "has an imaginary part"),
    "a tensor without data": (lambda model: patch(model, "0", X.to("meta")), "cannot be written into"),
    "a vector without data": (lambda model: steer(model, "0", X.to("meta")), "cannot be added to"),
    "a nested tensor": (lambda model: patch(model, "0", jagged(X)), "does not broadcast"),
    "a huge index": (lambda model: ablate(model, f"0[{10**30}]"), "0[1000"),
    "a huge negative index": (lambda model: capture(model, f"0[-{10**30}]"), "0[-1000"),
    "a huge index in a list": (lambda model: ablate(model, f"0[[0, {10**30}]]"), "0[[0, 1000"),
    "a huge step": (lambda model: ablate(model, f"0[::{10**30}]"), "cannot be read"),
    "a huge number": (lambda model: ablate(model, "0", value=10**400), "cannot be written into"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_site(case: str) -> None:
    make, said = REFUSED[case]
    with pytest.raises(TreeMismatch, match=r" at '0") as caught, make(model := making(lambda x: x * 1)):
        model(X)
    assert said in str(caught.value)


HALF = torch.eye(4)[:, :2]
UNFIT: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "a subspace of a sparse one": ("sparse", lambda m: ablate(m, "0", subspace=HALF), "within a subspace"),
    "a subspace of a compressed one": ("compressed rows", lambda m: ablate(m, "0", subspace=HALF), "within a subspace"),
    "a subspace of a nested one": ("nested", lambda m: patch(m, "0", 1.0, subspace=HALF), "within a subspace"),
    "parts of a sparse one": ("sparse", lambda m: patch(m, {"0[0]": 1.0, "0[1]": 2.0}), "[0] of Sparse"),
    "parts of a nested one": ("nested", lambda m: patch(m, {"0[0]": 1.0, "0[1]": 2.0}), "[0] of Nested"),
    "another dtype of a compressed one": ("compressed rows", lambda m: capture(m, "0", to="nowhere"), "go to nowhere"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_torch_does_not_do_with_a_kind_of_tensor_is_said_with_the_site(case: str) -> None:
    kind, make, said = UNFIT[case]
    with pytest.raises(TreeMismatch, match=r" at '0") as caught, make(model := making(KINDS[kind])):
        model(X)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [torch.ones(3, 2).T, torch.ones(3), 1.0], ids=["turned", "broadcast", "a number"])
@pytest.mark.parametrize("laid_out", [lambda x: x.clone(), lambda x: x.T.contiguous().T], ids=["in rows", "in columns"])
def test_what_takes_the_place_of_a_tensor_is_laid_out_in_memory_as_that_was(value: Any, laid_out: Any) -> None:
    """As after an assignment: models rely on it when they view a tensor in another shape."""
    model, x = nn.Sequential(Gives(laid_out), Gives(lambda x: (x, x))), torch.zeros(2, 3)
    for context in (patch(model, "0", value), edit(model, "0", lambda _: value), patch(model, "1[1]", value)):
        with context, capture(model, "0", "1[1]") as acts:
            model(x)
        assert acts["0"].stride() == acts["1[1]"].stride() == laid_out(x).stride()


RUN: dict[str, Callable[[Any], Any]] = {
    "vmap": torch.vmap,
    "vmap of vmap": lambda fn: torch.vmap(torch.vmap(fn)),
    "jvp": lambda fn: lambda x: torch.func.jvp(fn, (x,), (x,))[0],
    "grad": lambda fn: lambda x: torch.func.vjp(fn, x)[0],
    "compile": lambda fn: torch.compile(fn, backend="aot_eager"),
    "compile of vmap": lambda fn: torch.compile(torch.vmap(fn), backend="aot_eager"),
}


@pytest.mark.parametrize("run", list(RUN))
def test_a_model_that_views_a_patched_value_does_so_in_transforms_and_compiled(run: str) -> None:
    model, turned = nn.Sequential(nn.Identity(), Gives(lambda x: x.view(-1))), torch.arange(6.0).view(3, 2).T

    def patched(x: Tensor) -> Tensor:
        with patch(model, "0", turned):
            return model(x)

    given = torch.zeros(*[4] * run.count("vmap"), 2, 3)
    assert torch.equal(RUN[run](patched)(given), turned.reshape(-1).expand(*given.shape[:-2], 6))


@pytest.mark.parametrize("value", [3, True, 2.5, 1j])
def test_a_number_that_is_no_tensor_stays_of_its_type(value: Any) -> None:
    """Patching with the captured value changes nothing."""
    model = making(lambda x: (x, value))
    with capture(model, "0[1]") as acts:
        model(X)
    with patch(model, acts):
        out = model(X)
    assert out[1] == value and type(out[1]) is type(value)


@pytest.mark.parametrize("number", [300, float("inf"), float("nan"), 10**30])
def test_a_number_that_the_dtype_cannot_hold_is_refused(number: float) -> None:
    with (
        pytest.raises(TreeMismatch, match="cannot be written into Tensor"),
        ablate(model := making(KINDS["int8"]), "0", value=number),
    ):
        model(X)


def test_what_a_function_of_the_user_raises_stays_its_own() -> None:
    def fails(value: Tensor) -> Tensor:
        raise RuntimeError("mine")

    model = making(lambda x: x)
    for context in (edit(model, "0[0]", fails), splice(model, "0", fails), capture(model, "0[0]", map=fails)):
        with pytest.raises(RuntimeError, match=r"^mine$"), context:
            model(X)


# --- packed sequences -------------------------------------------------------------------------------------------------


def packed() -> PackedSequence:
    return pack_sequence([torch.ones(3, 3), torch.ones(2, 3)])


def test_a_number_fills_the_data_of_a_packed_sequence_and_not_its_book_keeping() -> None:
    lstm = nn.LSTM(3, 4)
    with ablate(lstm, "[0]", value=7):
        out, _ = lstm(packed())
    assert type(out) is PackedSequence
    assert (out.batch_sizes.tolist(), out.data.unique().tolist()) == ([2, 2, 1], [7.0])


def test_what_is_done_to_every_tensor_leaves_the_book_keeping_alone() -> None:
    value = nn.utils.rnn.pack_sequence([torch.ones(2, 3), torch.ones(3, 3)], enforce_sorted=False)
    acts = ActivationCache({"a": value})
    for made in (acts * 2, acts - acts, acts + {"a": value}, acts.abs(), acts.to(torch.float64), acts.clone(), -acts):
        found = made["a"]
        assert found.batch_sizes.tolist() == [2, 2, 1]
        assert found.batch_sizes.dtype == found.sorted_indices.dtype == torch.int64
        assert (found.sorted_indices.tolist(), found.unsorted_indices.tolist()) == ([1, 0], [1, 0])
    assert (acts - acts)["a"].data.unique().tolist() == [0.0]
    moved = acts.to("meta")["a"]
    assert (moved.sorted_indices.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    with pytest.raises(TreeMismatch, match="cannot be put end to end"):
        ActivationCache.cat([acts, acts])


# --- containers that change -------------------------------------------------------------------------------------------


@dataclass
class Record:
    h: Any


@dataclass
class Output(ModelOutput):
    h: Any = None


CHANGED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "dict": (lambda x: {"h": x}, lambda d: d.update(h=d["h"] + 1)),
    "a new key": (lambda x: {"h": x}, lambda d: d.update(more=1)),
    "list": (lambda x: [x], lambda d: d.append(d[0])),
    "list in a tuple": (lambda x: (x, [x]), lambda d: d[1].clear()),
    "dict in a list": (lambda x: [{"h": x}], lambda d: d[0].pop("h")),
    "dataclass": (lambda x: Record(x), lambda d: setattr(d, "h", None)),
    "ModelOutput": (lambda x: Output(h=x), lambda d: setattr(d, "h", d.h * 3)),
}


@pytest.mark.parametrize("keep", ["first", "last", "all"])
@pytest.mark.parametrize("kind", CHANGED)
def test_a_captured_container_is_as_it_was_when_it_was_captured(kind: str, keep: Any) -> None:
    make, change = CHANGED[kind]
    model = nn.Sequential(Gives(make), Gives(change))
    expected = make(X)
    with capture(model, "0", keep=keep) as acts:
        model(X)
    found = acts["0"][0] if keep == "all" else acts["0"]
    assert (
        torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected) or found == expected
    )
    assert all(leaf is X for leaf in trees.leaves(found))
    assert trees.structure_of(copy.copy(acts)["0"]) == trees.structure_of(acts["0"])


def test_what_is_made_of_a_captured_container_keeps_none_of_it_alive() -> None:
    model = making(lambda x: {"h": x * 1})
    with capture(model, "0") as acts:
        model(X)
    for made in (acts.detach(), acts - acts, acts.map(torch.sum), acts.clone()):
        assert made["0"]["h"] is not acts["0"]["h"]
    value, made = weakref.ref(acts["0"]["h"]), acts.map(lambda tensor: tensor.detach().clone())
    del acts
    gc.collect()
    assert value() is None
    assert made["0"]["h"].tolist() == X.tolist()


@pytest.mark.parametrize("keep", ["first", "last", "all"])
def test_a_container_that_nobody_changes_is_the_models_own(keep: Any) -> None:
    model = making(lambda x: {"h": [x]})
    with capture(model, "0", keep=keep) as acts:
        outputs = [model(X), model(X)]
    found = acts["0"] if keep == "all" else [acts["0"]]
    expected = {"first": outputs[:1], "last": outputs[1:], "all": outputs}[keep]
    assert [mine is theirs for mine, theirs in zip(found, expected, strict=True)] == [True] * len(expected)


def test_of_several_calls_only_the_one_that_was_changed_is_a_copy() -> None:
    model = making(lambda x: {"h": x})
    with capture(model, "0", keep="all") as acts:
        first, second = model(X), model(X)
    first["h"] = None
    assert acts["0"][0]["h"] is X
    assert acts["0"][1] is second


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_vector", [torch.float32, torch.bfloat16, torch.float64])
def test_steering_rounds_once(dtype: torch.dtype, of_vector: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator).to(dtype)
    vector = torch.randn(32, generator=generator).to(of_vector)
    with steer(model := making(lambda x: x), "0", vector, scale=0.3):
        steered = model(x)
    assert steered.dtype is dtype
    assert torch.equal(steered, (x.float() + 0.3 * vector.float()).to(dtype))


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize(("inside", "of_module"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32",) * 2])
def test_an_autoencoder_gets_the_value_in_its_own_dtype(inside: str, of_module: str, error: bool) -> None:
    torch.manual_seed(0)
    dtype, own = getattr(torch, inside), getattr(torch, of_module)
    autoencoder, x = nn.Linear(4, 4).to(own), X.to(dtype)
    with splice(model := making(lambda x: x), "0", autoencoder, error=error):
        out = model(x)
    assert out.dtype is dtype
    assert torch.allclose(out, x) if error else torch.equal(out, autoencoder(x.to(own)).to(dtype))
