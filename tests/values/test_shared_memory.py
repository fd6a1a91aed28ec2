"""A part is the elements that it names, whatever memory they share, and whoever writes into them in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.returning import Gives
from torch import Tensor, nn

from nicehooks import ablate, capture, edit, patch

SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda x: x.unfold(0, 3, 1),
    "as_strided": lambda x: x.as_strided((5, 3), (1, 1)),
    "expand": lambda x: x[:3].expand(4, 3),
    "one for all": lambda x: x[:1].expand(3, 4),
    "broadcast": lambda x: torch.broadcast_to(x[:3, None], (3, 4)),
    "transposed": lambda x: x[:8].view(2, 4).t(),
    "conjugated": lambda x: torch.complex(x, x)[:8].conj().view(2, 4),
    "every other": lambda x: x[:8:2].view(4, 1).expand(4, 2),
}
"""Tensors whose elements share memory, or lie in it in another order."""

PARTS: dict[str, Any] = {
    "[0]": 0,
    "[:, 1]": (slice(None), 1),
    "[1:, :2]": (slice(1, None), slice(None, 2)),
    "[..., -1]": (..., -1),
    "[0, 1]": (0, 1),
    "[[0, 1]]": [0, 1],
    "[:, [1]]": (slice(None), [1]),
    "": ...,
}


def fill(value: Tensor) -> Tensor:
    return value.fill_(9.0)


def fill_silently(value: Tensor) -> None:
    value[...] = 9.0


VERBS: dict[str, Callable[[nn.Module, str], Any]] = {
    "patch": lambda model, path: patch(model, path, 9.0),
    "ablate": lambda model, path: ablate(model, path, value=9.0),
    "edit": lambda model, path: edit(model, path, lambda value: value * 0 + 9.0),
    "edit in place": lambda model, path: edit(model, path, fill),
    "edit in place, None": lambda model, path: edit(model, path, fill_silently),
}


def expected(value: Tensor, index: Any) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)
    value[index] = 9.0
    return value


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shared", SHARED)
def test_a_part_alone_is_changed(shared: str, part: str, verb: str) -> None:
    make, x = SHARED[shared], torch.arange(9.0)
    model = nn.Sequential(Gives(make), nn.Identity())
    for path in (f"0{part}", f"1@input[0]{part}"):
        with VERBS[verb](model, path):
            found = model(x.clone())
        assert torch.equal(found, expected(make(x), PARTS[part]))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("part", ["[0]", "[[0, 1]]", ""])
@pytest.mark.parametrize("dim", [0, 1])
def test_of_examples_that_share_memory_each_is_changed_alone(dim: int, part: str, verb: str) -> None:
    examples = torch.arange(8.0).unfold(0, 3, 1)
    model = nn.Sequential(nn.Identity())
    with VERBS[verb](model, f"0{part}"):
        found = torch.vmap(model, in_dims=dim)(examples if dim == 0 else examples.t())
    index = (slice(None), *([PARTS[part]] if part else []))
    assert torch.equal(found, expected(torch.arange(8.0).unfold(0, 3, 1), index))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shared", ["unfold", "expand", "transposed"])
def test_in_compiled_code(shared: str, dynamic: bool) -> None:
    make = SHARED[shared]
    for verb in ("patch", "edit in place"):
        for part in ("[:, 1]", "[[0, 1]]", ""):
            torch.compiler.reset()
            model = nn.Sequential(Gives(make))
            compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic, fullgraph=True)
            for size in (9, 10):
                x = torch.arange(float(size))
                with VERBS[verb](model, f"0{part}"):
                    assert torch.equal(compiled(x), expected(make(x), PARTS[part]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_written_into_a_part_that_was_read_into_memory_of_its_own_is_there(mode: Any) -> None:
    """A list of indices, and heads of what is not laid out in order, give no view."""
    model = nn.Sequential(nn.Identity())
    x = torch.arange(8.0).view(4, 2).t()
    with mode():
        with edit(model, "0[:, [0, 2]]", fill):
            assert torch.equal(model(x), expected(x, (slice(None), [0, 2])))
        with edit(model, "0/2[:, 0]", fill):
            assert torch.equal(model(x), expected(x, (slice(None), slice(2))))


def test_the_gradient_goes_through_what_was_written_in_place() -> None:
    model, x = nn.Sequential(nn.Identity()), torch.arange(4.0).requires_grad_()
    with edit(model, "0[[0, 1]]", lambda value: value.mul_(2)):
        out = model(x)
    out.sum().backward()
    assert torch.equal(out, torch.tensor([0.0, 2.0, 2.0, 3.0]))
    assert torch.equal(x.grad, torch.tensor([2.0, 2.0, 1.0, 1.0]))  # type: ignore[arg-type]


def test_what_is_only_looked_at_is_no_copy() -> None:
    x = torch.arange(8.0).unfold(0, 3, 1)
    model = nn.Sequential(nn.Identity())
    with capture(model, "0", "0[0]") as acts:
        assert model(x) is x
    assert acts["0"] is x and acts["0[0]"].data_ptr() == x.data_ptr()


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x[:8].view(2, 4).t(),
    "every other": lambda x: x.view(3, 3)[::2, ::2],
    "columns": lambda x: x.view(3, 3)[:, 1:],
    "one column": lambda x: x.as_strided((3, 1), (2, 0)),
    "turned": lambda x: x[:8].view(2, 2, 2).permute(2, 0, 1),
}
"""Tensors of which each element is a place of its own."""


@pytest.mark.parametrize("apart", APART)
def test_a_function_gets_the_value_itself_where_no_memory_is_shared(apart: str) -> None:
    """It is no copy, whole or as a part: what is captured before stays the model's own."""
    value, seen = APART[apart](torch.arange(9.0)), []
    model = nn.Sequential(nn.Identity())
    with edit(model, "0", seen.append), edit(model, "0[0]", seen.append):
        assert model(value) is value
    assert seen[0] is value and seen[1].data_ptr() == value.data_ptr()
