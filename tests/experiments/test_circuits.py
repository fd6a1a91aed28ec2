"""Circuits: how they grow, that they reach the logits, what they do alone, and how they are found edge by edge."""

from __future__ import annotations

import pytest
import torch
from by_hooks import one_thread
from test_edge_effects import metric, prompts, seen, small

from nicehooks import NiceHooksError, acdc, circuit, edges, faithfulness
from nicehooks.experiments.circuits import Circuit, Edge
from nicehooks.experiments.edge_effects import Edges

single_thread = pytest.fixture(one_thread, scope="module", autouse=True)


@pytest.fixture(scope="module")
def found() -> Edges:
    (clean, corrupted), model = prompts(), small()
    return edges(model, seen(model, corrupted), metric, clean)


def reaches_logits(chosen: Circuit) -> bool:
    """Whether from every edge a way leads to the logits."""
    reached, before = {"logits"}, set[str]()
    while reached != before:
        before = set(reached)
        reached |= {edge.sender for edge in chosen.edges if set(edge.into) & reached}
    return all(set(edge.into) & reached for edge in chosen.edges)


@pytest.mark.parametrize("top", [0, 1, 5, 20, 46])
def test_a_circuit_has_so_many_edges_all_of_which_reach_the_logits(found: Edges, top: int) -> None:
    chosen = circuit(found, top=top)
    assert len(chosen) == len(chosen.edges) == int(chosen.mask.sum()) == top
    assert reaches_logits(chosen) and "logits" in chosen.nodes
    assert set(chosen.nodes) == {"logits", *(edge.sender for edge in chosen.edges)}
    assert list(chosen.nodes.values()) == sorted(chosen.nodes.values())
    assert [abs(edge.effect) for edge in chosen.edges] == sorted(
        [abs(edge.effect) for edge in chosen.edges], reverse=True
    )


def test_the_largest_edge_that_leads_on_comes_next(found: Edges) -> None:
    into_logits = found.values[:, -1].abs().nan_to_num(-1.0)
    first = circuit(found, top=1).edges[0]
    assert first.receiver == "logits" and first.sender == found.axes[0].labels[into_logits.argmax()]
    smaller, larger = circuit(found, top=8), circuit(found, top=12)
    assert set(smaller.edges) < set(larger.edges)


def test_a_threshold_takes_every_edge_that_is_as_large_and_leads_on(found: Edges) -> None:
    limit = found.values.abs().nan_to_num(0.0).flatten().sort(descending=True).values[20].item()
    chosen = circuit(found, threshold=limit)
    assert 0 < len(chosen) <= 21 and min(abs(edge.effect) for edge in chosen.edges) >= limit
    assert reaches_logits(chosen)
    large = [(s, r) for s, r in (found.values.abs() >= limit).nonzero().tolist()]
    left = [place for place in large if not chosen.mask[place]]
    nodes = set(chosen.nodes)
    assert all(not set(found.wiring.receivers[receiver].into) & nodes for _, receiver in left)


def test_edges_are_drawn_between_nodes(found: Edges) -> None:
    chosen = circuit(found, top=20)
    drawn = chosen.drawn()
    assert len(drawn) == 20 and {edge[0] for edge in drawn} | {edge[1] for edge in drawn} <= set(chosen.nodes)
    assert all(chosen.nodes[sender] < chosen.nodes[receiver] for sender, receiver, _, _ in drawn)
    assert {edge[3] for edge in drawn} <= {"q", "k", "v", ""}
    assert repr(chosen) == f"Circuit({len(chosen.nodes)} nodes, 20 of 46 edges)"


def test_faithfulness_beside_patching_by_hand(found: Edges) -> None:
    (clean, corrupted), model = prompts(), small()
    values = seen(model, corrupted)
    curve = faithfulness(model, circuit(found, top=10), values, metric, clean, sizes=[0, 10, 30, 46], random=3)
    assert [axis.name for axis in curve.axes] == ["size", "circuit"] and curve.values.shape == (4, 4)
    assert curve.axes[0].labels == ("0", "10", "30", "46")
    base, other = metric(model(clean)), metric(model(corrupted))
    assert torch.allclose(curve.examples[0, 0], other - base, atol=1e-10)  # the empty circuit is the other run
    assert torch.equal(curve.examples[3], torch.zeros(4, 2))  # the whole graph is the model
    assert (curve.model, curve.nothing) == pytest.approx((base.mean().item(), other.mean().item()))
    assert torch.allclose(curve.shares[0], torch.zeros(4, dtype=torch.float64), atol=1e-10)
    assert torch.equal(curve.shares[3], torch.ones(4, dtype=torch.float64))
    alone = faithfulness(model, circuit(found, top=10), values, metric, clean)
    assert torch.equal(alone.values[0, 0], curve.values[1, 0]) and alone.values.shape == (1, 1)
    assert repr(alone) == f"Faithfulness(10 edges {alone.shares[0, 0]:.2f})"


def test_a_circuit_is_more_faithful_than_random_ones(found: Edges) -> None:
    (clean, corrupted), model = prompts(), small()
    curve = faithfulness(
        model, circuit(found, top=10), seen(model, corrupted), metric, clean, sizes=[10, 20], random=10
    )
    errors = (1 - curve.shares).abs()
    assert (errors[:, 0] < errors[:, 1:].mean(1)).all()


def test_greedy_discovery_keeps_what_moves_the_metric() -> None:
    (clean, corrupted), model = prompts(), small()
    values = seen(model, corrupted)
    base = metric(model(clean)).mean()
    everything = acdc(model, values, metric, clean, threshold=0.0)
    assert len(everything) == 46 and reaches_logits(everything)
    span = (metric(model(corrupted)).mean() - base).abs().item()
    some = acdc(model, values, metric, clean, threshold=0.02 * span)
    assert 0 < len(some) < 46 and reaches_logits(some)
    alone = faithfulness(model, some, values, metric, clean)
    assert abs(alone.values.item()) < 46 * 0.02 * span
    fewer = acdc(model, values, metric, clean, threshold=0.2 * span, start=some)
    assert {edge[:2] for edge in fewer.edges} < {edge[:2] for edge in some.edges}


def test_greedy_discovery_by_hand() -> None:
    """The edges into the logits are tried first, the last sender first."""
    (clean, corrupted), model = prompts(), small()
    values = seen(model, corrupted)
    exact = edges(model, values, metric, clean, method="exact", senders="mlp_out[1]", receivers="logits").values.item()
    kept = {edge.sender for edge in acdc(model, values, metric, clean, threshold=abs(exact) * 0.99).edges}
    gone = {edge.sender for edge in acdc(model, values, metric, clean, threshold=abs(exact) * 1.01).edges}
    assert "mlp_out[1]" in kept and "mlp_out[1]" not in gone


def test_what_is_refused(found: Edges) -> None:
    (clean, corrupted), model = prompts(), small()
    values = seen(model, corrupted)
    with pytest.raises(NiceHooksError, match=r"circuit\(edges, top=…\) takes"):
        circuit(found)
    with pytest.raises(NiceHooksError, match="the effects of all edges"):
        circuit(edges(model, values, metric, clean, receivers="logits"), top=2)
    own = Circuit(found.wiring, [Edge("embed", "logits", 1.0, ("logits",))])
    assert faithfulness(model, own, values, metric, clean).axes[0].labels == ("1",)
    with pytest.raises(NiceHooksError, match="no effects are known"):
        faithfulness(model, own, values, metric, clean, sizes=[1])
