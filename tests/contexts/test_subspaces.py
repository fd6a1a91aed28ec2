"""`subspace=`: what is replaced within it, what is not, and a basis that is learned (distributed alignment search)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nicehooks import TreeMismatch, ablate, capture, captured, patch

Model = nn.Sequential


def model_and_input() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(3, 5, 4)


def basis(k: int = 2, d: int = 6) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(1))).Q


def expected(old: Tensor, new: Tensor, q: Tensor) -> Tensor:
    return old + (new - old) @ q @ q.T


def test_only_the_component_within_the_span_is_replaced() -> None:
    (model, x), q = model_and_input(), basis()
    old, new = model[:2](x), torch.randn(3, 5, 6)
    with patch(model, "1", new, subspace=q), capture(model, "1") as acts:
        model(x)
    assert torch.allclose(acts["1"], expected(old, new, q), atol=1e-6)
    assert torch.allclose(acts["1"] @ q, new @ q, atol=1e-6)
    rest = torch.eye(6) - q @ q.T
    assert torch.allclose(acts["1"] @ rest, old @ rest, atol=1e-6)


def test_ablate_zeroes_a_direction() -> None:
    (model, x), q = model_and_input(), basis(1)
    with ablate(model, "1[:, -1]", subspace=q), capture(model, "1") as acts:
        model(x)
    old = model[:2](x)
    assert (acts["1"][:, -1] @ q).abs().max() < 1e-6
    assert torch.equal(acts["1"][:, :-1], old[:, :-1])
    assert torch.allclose(acts["1"][:, -1], expected(old[:, -1], torch.zeros(6), q), atol=1e-6)


def test_regions_that_are_written_together_and_heads() -> None:
    (model, x), q = model_and_input(), basis()
    old = model[:2](x)
    with patch(model, {"1[:, 0]": 1.0, "1[:, 2]": 2.0}, subspace=q), capture(model, "1") as acts:
        model(x)
    assert torch.allclose(acts["1"][:, 0], expected(old[:, 0], torch.full((6,), 1.0), q), atol=1e-6)
    assert torch.allclose(acts["1"][:, 2], expected(old[:, 2], torch.full((6,), 2.0), q), atol=1e-6)
    with patch(model, {"1[:, 0]": 1.0, "1[:, 2]": 2.0}), capture(model, "1") as acts:  # the same plan, whole values
        model(x)
    assert torch.equal(acts["1"][:, 0], torch.full((3, 6), 1.0))
    small = basis(1, 3)
    with patch(model, "1/2[:, :, 1]", 0.0, subspace=small), capture(model, "1") as acts:
        model(x)
    assert torch.equal(acts["1"][..., :3], old[..., :3])
    assert torch.allclose(acts["1"][..., 3:], expected(old[..., 3:], torch.zeros(3), small), atol=1e-6)


def test_a_whole_basis_replaces_everything_and_the_same_value_nothing() -> None:
    (model, x), q = model_and_input(), basis(6)
    new = torch.randn(3, 5, 6)
    with patch(model, "1", new, subspace=q), capture(model, "1") as acts:
        model(x)
    assert torch.allclose(acts["1"], new, atol=1e-5)
    old = model[:2](x)
    with patch(model, "1", old, subspace=q):
        assert torch.equal(model(x), model[2](old))


def test_short_dtypes_and_trees() -> None:
    (model, x), q = model_and_input(), basis()
    half = model.bfloat16()
    with patch(half, "1", 0.0, subspace=q), capture(half, "1") as acts:
        half(x.bfloat16())
    assert acts["1"].dtype is torch.bfloat16
    lstm = nn.LSTM(4, 6)
    with patch(lstm, "", 1.0, subspace=q), capture(lstm, "") as acts:
        lstm(x)
    output, (hidden, _) = lstm(x)
    assert torch.allclose(acts[""][0], expected(output, torch.ones(6), q), atol=1e-6)
    assert torch.allclose(acts[""][1][0], expected(hidden, torch.ones(6), q), atol=1e-6)


def test_under_vmap_and_over_bases() -> None:
    (model, x), q = model_and_input(), torch.stack([basis(), torch.eye(6)[:, :2]])

    def run(q: Tensor) -> Tensor:
        with patch(model, "1", 0.0, subspace=q):
            return captured(model, "1")(x)[1]["1"]

    each = torch.vmap(run)(q)
    assert torch.allclose(each[0], run(q[0]), atol=1e-6) and torch.allclose(each[1], run(q[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("subspace", "text"),
    [
        (torch.ones(6), "it is a matrix \\[d, k\\]"),
        (torch.ones(6, 2), "not orthonormal"),
        ([1.0], "it is a matrix \\[d, k\\]"),
    ],
)
def test_what_is_no_basis_is_refused_at_once(subspace: object, text: str) -> None:
    model, _ = model_and_input()
    with pytest.raises(TreeMismatch, match=text):
        patch(model, "1", 0.0, subspace=subspace)
    with pytest.raises(TreeMismatch, match=text):
        ablate(model, "1", subspace=subspace)


def test_a_basis_of_another_size_is_refused_at_the_site() -> None:
    model, x = model_and_input()
    with pytest.raises(TreeMismatch, match=r"a subspace of 4 dimensions is none of .*3, 5, 6"):
        with patch(model, "1", 0.0, subspace=torch.eye(4)[:, :2]):
            model(x)


# --- distributed alignment search -------------------------------------------------------------------------------------


def parity_task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three bits each, as -1 and 1, and their parity."""
    bits = torch.randint(0, 2, (count, 3), generator=torch.Generator().manual_seed(seed))
    return bits.float() * 2 - 1, bits.sum(-1) % 2


def descend(parameters: list[Tensor], loss_at: Callable[[int], Tensor], steps: int, rate: float) -> None:
    """Gradient descent with momentum."""
    speeds = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(steps):
        gradients = torch.autograd.grad(loss_at(step), parameters)
        with torch.no_grad():
            for parameter, speed, gradient in zip(parameters, speeds, gradients, strict=True):
                speed.mul_(0.9).add_(gradient)
                parameter.sub_(rate * speed)


@pytest.fixture(scope="module")
def trained() -> Model:
    """A small network that knows the parity of three bits."""
    torch.manual_seed(0)
    model = Model(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 2))

    def loss(step: int) -> Tensor:
        x, y = parity_task(256, seed=step)
        return nn.functional.cross_entropy(model(x), y)

    descend(list(model.parameters()), loss, steps=400, rate=0.1)
    x, y = parity_task(512, seed=10_000)
    assert (model(x).argmax(-1) == y).float().mean() > 0.99
    return model


def interchange(model: Model, q: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Logits with a hidden layer of other examples in the subspace, and the parity of those examples.

    It is what the network should say if the subspace is where its hidden layer has the parity.
    """
    (x, _), (source, y) = parity_task(256, seed), parity_task(256, seed + 1)
    with torch.no_grad(), capture(model, "3") as acts:
        model(source)
    with patch(model, "3", acts["3"], subspace=q):
        return model(x), y


def accuracy(model: Model, q: Tensor) -> float:
    logits, y = interchange(model, q, seed=20_000)  # examples that nothing was trained on
    return (logits.argmax(-1) == y).float().mean().item()


def test_a_subspace_is_learned_by_gradient_descent_and_beats_a_random_one(trained: Model) -> None:
    """Distributed alignment search, with its two controls: held-out examples, and random subspaces."""
    directions = torch.randn(16, 1).requires_grad_()

    def loss(step: int) -> Tensor:
        logits, y = interchange(trained, torch.linalg.qr(directions).Q, seed=3 * step)
        return nn.functional.cross_entropy(logits, y)

    descend([directions], loss, steps=100, rate=0.1)
    learned = accuracy(trained, torch.linalg.qr(directions.detach()).Q)
    random = [accuracy(trained, torch.linalg.qr(torch.randn(16, 1)).Q) for _ in range(10)]
    assert learned > 0.95
    assert max(random) < learned - 0.1 and sum(random) / len(random) < 0.75


@pytest.mark.slow
def test_compiled_code_replaces_it_too_and_takes_new_values_without_compiling() -> None:
    (model, x), q = model_and_input(), basis()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for new in (torch.randn(3, 5, 6), torch.randn(3, 5, 6)):
        with patch(model, "1", new, subspace=q):
            assert torch.allclose(compiled(x), model[2](expected(model[:2](x), new, q)), atol=1e-5)
    assert len(graphs) == 1
