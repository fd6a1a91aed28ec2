"""Caches on their way out of transforms: any tree, and whole inputs, by `captured`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gallery.returning import HandsOver
from gallery.values import Output, Pair, WithDefault
from torch import Tensor

from nicehooks import ActivationCache, captured
from nicehooks.values import trees


@dataclass(frozen=True)
class Frozen:
    u: Any


MAKES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x * 1,
    "dataclass": lambda x: WithDefault(x * 1, x * 2),
    "frozen dataclass": lambda x: Frozen(x * 3),
    "dataclass with None": lambda x: WithDefault(x * 1, None),
    "dataclass in a tuple": lambda x: (x * 1, WithDefault(x, (x * 2, None, x * 3))),
    "dict with None": lambda x: {"k": x * 1, "n": None, "t": (x, None)},
    "dict with numbers": lambda x: OrderedDict(k=x * 1, n=3, s="text"),
    "named tuple": lambda x: Pair(x * 2, [x, None]),
    "ModelOutput": lambda x: Output(logits=x * 2, states=(x, None)),
    "None": lambda x: None,
    "numbers": lambda x: (1, 2.5),
}
PLACES = ["a", "a@input", "a@input['extra']", ("a", "a@input[0]", "a@input")]
X = torch.arange(12.0).reshape(4, 3)


def values(acts: ActivationCache) -> list[tuple[str, Any]]:
    """What is in a cache, with lists for tensors."""
    return [
        (key, [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in trees.leaves(value)])
        for key, value in acts.items()
    ]


def structures(acts: ActivationCache) -> list[str]:
    return [f"{key} {type(value).__name__} {trees.structure_of(value)}" for key, value in acts.items()]


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("kind", MAKES)
def test_any_tree_leaves_vmap(kind: str, where: Any, chunk: int | None) -> None:
    paths = where if isinstance(where, tuple) else (where,)
    run = captured(HandsOver(MAKES[kind]), *paths)
    _, acts = torch.vmap(run, chunk_size=chunk)(X)
    _, alone = run(X)  # all that it does is elementwise
    assert values(acts) == values(alone)
    assert structures(acts) == structures(alone)


@pytest.mark.parametrize("kind", MAKES)
def test_any_tree_leaves_two_vmaps(kind: str) -> None:
    run = captured(HandsOver(MAKES[kind]), "a", "a@input")
    _, acts = torch.vmap(torch.vmap(run))(X)
    assert values(acts) == values(run(X)[1])


@pytest.mark.parametrize("kind", MAKES)
def test_any_tree_leaves_the_other_transforms(kind: str) -> None:
    run = captured(HandsOver(MAKES[kind]), "a", "a@input")

    def loss(x: Tensor) -> tuple[Tensor, ActivationCache]:
        out, acts = run(x)
        return out.sum(), acts

    expected = values(run(X)[1])
    assert values(torch.func.grad(loss, has_aux=True)(X)[1]) == expected
    assert values(torch.func.grad_and_value(loss, has_aux=True)(X)[1][1]) == expected
    assert values(torch.func.jacrev(run, has_aux=True)(X)[1]) == expected
    assert values(torch.func.jacfwd(run, has_aux=True)(X)[1]) == expected
    assert values(torch.func.vjp(run, X, has_aux=True)[2]) == expected  # pyright: ignore
    assert values(torch.func.jvp(run, (X,), (X,), has_aux=True)[2]) == expected  # pyright: ignore
    assert values(torch.vmap(torch.func.grad(loss, has_aux=True))(X)[1]) == expected


@pytest.mark.parametrize("kind", ["dataclass", "dataclass in a tuple", "named tuple", "ModelOutput"])
def test_tangents_and_jacobians_come_for_the_tensors_of_any_tree(kind: str) -> None:
    run = captured(HandsOver(MAKES[kind]), "a")
    _, (_, tangents) = torch.func.jvp(run, (X,), (torch.ones_like(X),))
    (_, ones), (_, twice) = run(torch.ones_like(X)), run(torch.ones_like(X) * 2)
    assert values(tangents) == values(twice - ones)
    _, jacobians = torch.func.jacrev(run)(X[0])
    assert all(leaf.shape == (3, 3) for leaf in trees.leaves(jacobians["a"]) if isinstance(leaf, Tensor))


def test_what_has_left_a_transform_is_a_cache_like_any_other() -> None:
    _, acts = torch.vmap(captured(HandsOver(MAKES["dataclass with None"]), "a"))(X)
    acts["b"] = (X, None)
    assert len(torch.utils._pytree.tree_leaves(acts)) == 3
    assert list(acts.select("b")) == ["b"]
    assert (acts * 2)["a['u']"].tolist() == (X * 2).tolist()
