"""Law 5: what is written to a region, and read of it, has the right derivatives under every transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap

from nicehooks import capture, patch

REGIONS = {
    "[..., 1]": lambda t: t[..., 1],
    "[-1]": lambda t: t[-1],
    "[0, 1]": lambda t: t[0, 1],
    "[:, -1, :2]": lambda t: t[:, -1, :2],
    "[..., ::2]": lambda t: t[..., ::2],
    "[:, 1:]": lambda t: t[:, 1:],
    "[1, [2, 0]]": lambda t: t[1, [2, 0]],
    "[..., [0, 3]]": lambda t: t[..., [0, 3]],
    "[..., None, 2]": lambda t: t[..., None, 2],
    "[0][1:][:, 0]": lambda t: t[0][1:][:, 0],
    "/2[..., 1, 0]": lambda t: t.unflatten(-1, (2, 2))[..., 1, 0],
    "/2[:, 0, 1]": lambda t: t.unflatten(-1, (2, 2))[:, 0, 1],
}


def assigned(base, region, value):
    """`base` with `value` in the region, by a mask."""
    positions = REGIONS[region](torch.arange(base.numel()).view(base.shape))
    flat = torch.zeros(base.numel(), dtype=base.dtype).scatter(0, positions.flatten(), value.flatten())
    mask = torch.zeros(base.numel(), dtype=torch.bool).scatter(0, positions.flatten(), True)
    return torch.where(mask, flat, base.flatten()).view(base.shape)


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0)], ids=["both", "the input", "the value"])
@pytest.mark.parametrize("region", REGIONS)
def test_what_is_written_has_the_right_derivatives(region, mapped):
    """In the value and in what it is written to, with `vmap` outside of the derivative and inside of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Tanh())
    base = torch.randn(2, 3, 4, dtype=torch.double)
    value = torch.randn_like(REGIONS[region](base))
    bases, values = (
        torch.stack([one, one * 2, -one]) if dim == 0 else one for one, dim in zip((base, value), mapped, strict=True)
    )

    def with_patch(base, value):
        with patch(model, f"0{region}", value.sin()):
            return (model(base.cos()) * torch.arange(1, 25).view(2, 3, 4)).sum()

    def by_hand(base, value):
        return (assigned(base.cos(), region, value.sin()).tanh() * torch.arange(1, 25).view(2, 3, 4)).sum()

    def loop(base, value):
        pairs = [(base[i] if mapped[0] == 0 else base, value[i] if mapped[1] == 0 else value) for i in range(3)]
        return torch.stack([by_hand(*pair) for pair in pairs])

    leaves = [one.clone().requires_grad_() for one in (bases, values)]
    expected = torch.autograd.grad(loop(*leaves).sum(), leaves)
    mapped_patch = vmap(with_patch, in_dims=mapped)
    assert torch.allclose(mapped_patch(bases, values), loop(bases, values))
    inside = grad(lambda *both: mapped_patch(*both).sum(), argnums=(0, 1))(bases, values)
    around = torch.autograd.grad(mapped_patch(*leaves).sum(), leaves)
    outside = vmap(grad(with_patch, argnums=(0, 1)), in_dims=mapped)(bases, values)
    outside = [found if dim == 0 else found.sum(0) for found, dim in zip(outside, mapped, strict=True)]
    for found in (inside, around, outside):
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    tangents = jvp(mapped_patch, (bases, values), (bases, values))[1].sum()
    assert torch.allclose(tangents, sum((a * b).sum() for a, b in zip(expected, (bases, values), strict=True)))


@pytest.mark.parametrize("region", REGIONS)
def test_what_is_read_has_the_right_gradients(region):
    model = nn.Sequential(nn.Identity(), nn.Tanh())
    xs = torch.randn(3, 2, 3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    leaf = xs.clone().requires_grad_()
    (whole,) = torch.autograd.grad(leaf.tanh().sin().sum(), leaf)
    expected = torch.stack([REGIONS[region](one) for one in whole])
    for run in (vmap(grad(lambda x: model(x).sin().sum())), grad(lambda xs: vmap(model)(xs).sin().sum())):
        with capture(model, f"0@grad{region}") as acts:
            run(xs)
        assert torch.allclose(acts[f"0@grad{region}"], expected)
