"""The step `/rows`: `[batch, pos]` again, where a module has flattened them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery.plain import CallsFlat
from torch import nn

from nicehooks import (
    ActivationCache,
    ModulePath,
    PathError,
    TreeMismatch,
    UnsupportedModule,
    ablate,
    capture,
    captured,
    edit,
    patch,
)


@pytest.fixture
def model() -> CallsFlat:
    return CallsFlat().requires_grad_(False)


X = torch.randn(2, 3, 4)


def test_it_is_read_and_written_as_any_step() -> None:
    path = ModulePath.parse("layer.mlp@input[0]/rows/2[:, -1]")
    assert path.subscripts == "[0]/rows/2[:, -1]" and ModulePath.parse(str(path)) == path
    for text in ("a/row", "a/rowss", "a/"):
        with pytest.raises(PathError, match="the number of heads is expected after /"):
            ModulePath.parse(text)


def test_reading(model: CallsFlat) -> None:
    with capture(model, "layer.mlp/rows", "layer.mlp@input[0]/rows", "layer.mlp/rows/2[:, 0]", "layer.mlp") as acts:
        output = model(X)
    assert torch.equal(acts["layer.mlp/rows"] * 2, output)
    assert torch.equal(acts["layer.mlp@input[0]/rows"], X)
    assert torch.equal(acts["layer.mlp/rows/2[:, 0]"], acts["layer.mlp/rows"].unflatten(-1, (2, 3))[:, 0])
    assert torch.equal(acts["layer.mlp/rows[:, -1]"], acts["layer.mlp/rows"][:, -1])
    assert acts["layer.mlp"].shape == (6, 6)


def test_writing_a_position(model: CallsFlat) -> None:
    clean = model(X)
    for context in (ablate(model, "layer.mlp/rows[:, 1]"), patch(model, {"layer.mlp/rows[:, 1]": torch.zeros(2, 6)})):
        with context:
            changed = model(X)
        assert not changed[:, 1].any() and torch.equal(changed[:, [0, 2]], clean[:, [0, 2]])
    with edit(model, "layer.mlp@input[0]/rows", lambda value: value[:, [2, 1, 0]]):
        assert torch.allclose(model(X), clean[:, [2, 1, 0]], atol=1e-6)
    assert torch.equal(model(X), clean)


def test_a_star_is_a_position(model: CallsFlat) -> None:
    with capture(model, "layer.mlp/rows[0, *]") as acts:
        output = model(X)
    assert list(acts) == [f"layer.mlp/rows[0, {i}]" for i in range(3)]
    assert torch.equal(acts.stack() * 2, output[0])


def test_each_run_has_rows_of_its_own(model: CallsFlat) -> None:
    with capture(model, "layer.mlp/rows", keep="all") as acts:
        for shape in ((2, 3, 4), (3, 2, 4), (4,), (2, 1, 2, 4)):
            model(torch.ones(shape))
    assert [list(value.shape) for value in acts["layer.mlp/rows"]] == [[2, 3, 6], [3, 2, 6], [6], [2, 1, 2, 6]]


def test_the_gradient_has_rows_too(model: CallsFlat) -> None:
    with capture(model, "layer.mlp@grad/rows", "layer.mlp@grad/rows[:, -1]") as acts:
        model(X)[:, -1].sum().backward()
    assert acts["layer.mlp@grad/rows"].sum((0, 2)).tolist() == [0, 0, 24]
    assert torch.equal(acts["layer.mlp@grad/rows[:, -1]"], torch.full((2, 6), 2.0))


def test_under_vmap(model: CallsFlat) -> None:
    output, acts = torch.vmap(captured(model, "layer.mlp/rows"))(X[:, None].expand(2, 5, 3, 4))
    assert torch.equal(acts["layer.mlp/rows"] * 2, output)


@pytest.mark.slow
def test_compiled(model: CallsFlat) -> None:
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with capture(compiled, "layer.mlp/rows") as acts, ablate(compiled, "layer.mlp/rows[:, 1]"):
        changed = compiled(X)
    torch._dynamo.reset()
    assert torch.equal(acts["layer.mlp/rows"] * 2, model(X))
    assert not changed[:, 1].any() and changed[:, 0].any()


def test_what_cannot_be_split_says_so(model: CallsFlat) -> None:
    with pytest.raises(UnsupportedModule, match=r"^'/rows': /rows needs a module around '' that is called\.$"):
        with capture(model, "/rows"):
            model(X)
    with pytest.raises(
        TreeMismatch, match=r"/rows does not split the first dimension of .*\[2, 3, 6\] .* into \[2, 3\]"
    ):
        with capture(model, "layer/rows"):
            model(X)
    with pytest.raises(UnsupportedModule, match=r"needs a module around '0\.0' that is called"):
        with capture(nn.Sequential(nn.ModuleList([nn.ReLU()])), "0.0/rows"):
            pass
    with pytest.raises(TreeMismatch, match="is known only while the model runs: capture it so"):
        _ = ActivationCache({"layer.mlp": torch.ones(6, 6)})["layer.mlp/rows"]
