"""Law 5: the modes of `vmap`, what passes through transforms beside tensors, and backward around `vmap`."""

from __future__ import annotations

import pytest
import torch
from gallery.plain import Matmul
from gallery.trees import UsesWords
from torch import nn
from torch.func import grad, jacrev, vmap
from worlds import AROUND, inputs, make, same, total

from nicehooks import ablate, capture, captured, edit, patch

# --- the modes of vmap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("out_dim", [0, 1, -1])
def test_in_and_out_dims(in_dim, out_dim):
    model, x = make("Mlp"), inputs()
    found, acts = vmap(captured(model, "embed"), in_dims=in_dim, out_dims=out_dim)(x.movedim(0, in_dim))
    assert torch.allclose(found, model(x).movedim(0, out_dim), atol=1e-6)
    assert torch.allclose(acts["embed"], model.embed(x).movedim(0, out_dim), atol=1e-6)
    with capture(model, "embed") as acts:
        vmap(model, in_dims=in_dim, out_dims=out_dim)(x.movedim(0, in_dim))
    assert torch.allclose(acts["embed"], model.embed(x), atol=1e-6)  # in front, wherever the results have it


def test_dims_of_some_arguments():
    model, x, by = make("Normed"), inputs(), torch.randn(7, 4)
    run = vmap(captured(model.gate, "@input['value']", "@input['by']", ""), in_dims=(None, 0, None))
    out, acts = run(x[0], by, 2.0)
    assert torch.allclose(out, x[0] * by.sigmoid() * 2)
    assert torch.equal(acts["@input['value']"], x[0].expand(7, 4)) and torch.equal(acts["@input['by']"], by)


def test_chunks():
    """Inside, chunks are joined again; outside, each is a forward of its own."""
    model, x = make("Mlp"), inputs()
    out, acts = vmap(captured(model, "embed"), chunk_size=2)(x)
    assert torch.allclose(out, model(x)) and torch.allclose(acts["embed"], model.embed(x))
    with capture(model, "embed", keep="all") as each, capture(model, "embed") as last:
        vmap(model, chunk_size=2)(x)
    assert [value.shape[0] for value in each["embed"]] == [2, 2, 1]
    assert torch.allclose(torch.cat(each["embed"]), model.embed(x))
    assert torch.equal(last["embed"], each["embed"][-1])
    with capture(model, "embed", keep="all") as rows:
        jacrev(model, chunk_size=2)(x[0])
    assert len(rows["embed"]) == 1  # jacrev has one forward, and chunks its backward


def dropout():
    return nn.Sequential(nn.Identity(), nn.Dropout(0.5))


def seeded(run):
    torch.manual_seed(0)
    return run()


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness(randomness, where):
    model, x = dropout(), torch.ones(8, 50)

    def run():
        if where == "inside":
            return vmap(captured(model, "1"), randomness=randomness)(x)
        with capture(model, "1") as acts:
            return vmap(model, randomness=randomness)(x), acts

    out, acts = seeded(run)
    assert same(acts["1"], out)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in out}) == (8 if randomness == "different" else 1)
    assert torch.equal(out, seeded(lambda: vmap(model, randomness=randomness)(x)))  # looking draws no number


def test_randomness_that_is_an_error_is_torchs_own():
    model = dropout()
    with pytest.raises(RuntimeError, match="randomness"), capture(model, "1"):
        vmap(model, randomness="error")(torch.ones(8, 50))
    assert all("forward" not in vars(module) for module in model.modules())
    with capture(model.eval(), "1") as acts:
        vmap(model, randomness="error")(torch.ones(8, 50))
    assert torch.equal(acts["1"], torch.ones(8, 50))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_of_an_edit(randomness):
    model = nn.Sequential(nn.Identity())
    with edit(model, "0", lambda value: value * torch.rand(50)):
        out = vmap(model, randomness=randomness)(torch.ones(8, 50))
    assert len({tuple(row.tolist()) for row in out}) == (8 if randomness == "different" else 1)


@pytest.mark.parametrize("where", [["mixed"], ["mixed[0]"], ["mixed[2]['count']"], ["nothing"], ["mixed", "nothing"]])
@pytest.mark.parametrize("transform", ["vmap", "jvp", "jacrev"])
def test_values_that_are_no_tensors(where, transform):
    model, x = UsesWords(), inputs()
    _, expected = captured(model, *where)(x)
    with capture(model, *where) as acts:
        AROUND[transform](model)
    assert same(dict(acts), dict(expected))
    if transform == "vmap":
        out, acts = vmap(captured(model, *where))(x)
        assert torch.equal(out, x * 6) and same(dict(acts), dict(expected))


@pytest.mark.parametrize("transform", AROUND)
def test_autocast_around(transform):
    model = Matmul()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = AROUND[transform](model)
        with capture(model, "inner[..., 0, :]") as acts:
            assert same(AROUND[transform](model), plain)
        with patch(model, "inner", torch.ones(3, dtype=torch.float64)):
            changed, one = vmap(model)(inputs()), model(inputs()[0])
    assert acts["inner[..., 0, :]"].dtype == torch.bfloat16
    assert changed.dtype == one.dtype == torch.bfloat16 and (changed == 1).all()


# --- backward outside of vmap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["an input", "the parameters"])
def test_plain_backward_around_vmap(where):
    model, x = make("Mlp"), inputs()
    ports = ["embed@grad", "blocks.1@input.grad[0]", "head@grad[..., 0]"]
    if where == "an input":
        model.requires_grad_(False)
        x.requires_grad_()
    with capture(model, *ports) as expected:
        total(model(x)).backward()
    with capture(model, *ports) as acts:
        total(vmap(model)(x)).backward()
    assert same(*({key: value.shape for key, value in cache.items()} for cache in (acts, expected)))
    assert all(torch.allclose(acts[port], expected[port], atol=1e-6) for port in ports)
    with ablate(model, "blocks.1@grad[..., 0]"):
        x.grad = model.embed.weight.grad = None
        total(model(x)).backward()
        by_hand = x.grad, model.embed.weight.grad
        x.grad = model.embed.weight.grad = None
        total(vmap(model)(x)).backward()
    for found, wanted in zip((x.grad, model.embed.weight.grad), by_hand, strict=True):
        assert (found is None and wanted is None) or torch.allclose(found, wanted, atol=1e-6)


def test_edits_of_gradients_outside_of_vmap_are_per_example():
    """A function on a gradient sees that of one example, whether backward is inside of `vmap` or outside."""
    model, shapes = make("Mlp"), []

    def clipped(gradient):
        shapes.append(gradient.shape)
        return gradient / gradient.norm().clamp(min=1)

    def loss(x):
        return (model(x) * 9).sum()

    with edit(model, "embed@grad", clipped):
        inside = vmap(grad(loss))(inputs())
        outside = grad(lambda x: vmap(loss)(x).sum())(inputs())
        nested = grad(lambda x: vmap(vmap(loss, in_dims=0), in_dims=0)(x).sum())(inputs()[None])[0]
        one_by_one = torch.stack([grad(loss)(x) for x in inputs()])
    assert torch.allclose(inside, one_by_one, atol=1e-6)
    assert torch.allclose(outside, one_by_one, atol=1e-6)
    assert torch.allclose(nested, one_by_one, atol=1e-6)
    assert set(shapes) == {(6,)}


def test_a_value_that_is_the_same_for_every_example_has_a_gradient_for_each():
    model, weights = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(7, 2)

    def of_weights(x, weight):
        return (model(x) * weight).sum()

    x = torch.ones(4)
    with capture(model, "0@grad") as acts:
        grad(lambda x: vmap(of_weights, in_dims=(None, 0))(x, weights).sum())(x)
    assert torch.allclose(acts["0@grad"], weights @ model[1].weight, atol=1e-6)
