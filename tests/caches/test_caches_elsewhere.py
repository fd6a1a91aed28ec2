"""Caches where others take them: in files, in pytrees, in copies, and on the screen."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from cached import MODEL, PLUS, X, numbers, run
from gallery.values import Output, Pair, Record
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from nicehooks import (
    ActivationCache,
    TreeMismatch,
    capture,
    captured,
    patch,
)

# --- files ------------------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
tensors = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
)
savable = st.recursive(
    tensors | st.none() | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(a: Any, b: Any) -> bool:
    """Whether two values are of the same types, in the same order, with equal leaves."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), savable, max_size=3))
@example({"a": (X, X + 1), "a/1": X + 2})
@example({"__metadata__": X})
@example({"": X, "h.3[:, -1]/2['\"\\']": [X.T, {"é": X[:, 0], 1: None}]})
def test_what_is_saved_is_loaded_again(values: dict[str, Any]) -> None:
    """Bit for bit, in order, whatever the keys, and tensors that share memory too."""
    acts = ActivationCache(values)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "acts.safetensors"
        acts.save(file)
        loaded = ActivationCache.load(str(file))
    assert same(dict(loaded), values)
    assert type(loaded) is ActivationCache


def test_loaded_values_are_plain_containers_out_of_the_graph(tmp_path: Path) -> None:
    """Named tuples come back as tuples; dataclasses and `ModelOutput`s as dicts; calls as what `calls` takes."""
    x = X.clone().requires_grad_() * 1
    acts = ActivationCache(
        {"a": Pair(x, None), "b": Output(logits=x, states=(x,)), "c": Record(x, [x]), "d": OrderedDict(k=x)}
    )
    acts.save(tmp_path / "acts")
    loaded = ActivationCache.load(tmp_path / "acts")
    assert numbers(dict(loaded)) == numbers(
        {"a": (X, None), "b": {"logits": X, "states": (X,)}, "c": {"first": X, "second": [X]}, "d": {"k": X}}
    )
    assert type(loaded["a"]) is tuple
    assert not loaded["a[0]"].requires_grad
    run("plus", keep="all").save(tmp_path / "calls")
    assert numbers(ActivationCache.load(tmp_path / "calls").calls("plus[0]")) == [(X[0] + 1).tolist(), PLUS[0].tolist()]


def test_a_view_of_a_large_tensor_is_saved_alone(tmp_path: Path) -> None:
    ActivationCache({"a": torch.zeros(1000, 1000)[0, :2], "b": torch.zeros(2)}).save(tmp_path / "acts")
    assert (tmp_path / "acts").stat().st_size < 1000


def test_a_safetensors_file_of_anybody_is_a_cache(tmp_path: Path) -> None:
    save_file({"h.0": X, "h.1": X + 1}, str(tmp_path / "acts"))
    loaded = ActivationCache.load(tmp_path / "acts")
    assert numbers(loaded["h.1[0]"]) == (X[0] + 1).tolist()


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    with pytest.raises(TreeMismatch) as caught:
        ActivationCache({"a": (X, object())}).save(tmp_path / "acts")
    assert str(caught.value) == "'a[1]' holds a object, which cannot be saved; select or map the rest first."
    assert not (tmp_path / "acts").exists()


# --- pytrees ----------------------------------------------------------------------------------------------------------


def test_a_cache_is_a_pytree_for_optree_and_for_torch() -> None:
    """For everybody, not only for this library; the leaves of trees and of calls are leaves."""
    acts = ActivationCache({"b": X, "a": (X + 1, None)})
    calls = run("plus", keep="all")
    for made in (optree.tree_map(lambda x: x + 1, acts), torch_pytree.tree_map_only(Tensor, lambda x: x + 1, acts)):
        assert type(made) is ActivationCache
        assert numbers(made) == numbers({"b": X + 1, "a": (X + 2, None)})
    assert numbers(optree.tree_leaves(acts)) == numbers([X, X + 1])
    assert numbers(torch_pytree.tree_leaves(acts)) == numbers([X, X + 1, None])
    for flatten, unflatten in (
        (optree.tree_flatten, lambda leaves, spec: optree.tree_unflatten(spec, leaves)),
        (torch_pytree.tree_flatten, torch_pytree.tree_unflatten),
    ):
        leaves, spec = flatten(calls)
        assert numbers(leaves) == numbers([X + 1, X + 2])
        again = unflatten(leaves, spec)
        assert again["plus"][0] is calls["plus"][0]
        assert len(again.calls("plus")) == 2
        assert flatten(calls)[1] == spec
        assert flatten(acts)[1] != spec
    assert [str(path[0]) for path in optree.tree_paths(acts)] == ["b", "a"]


def test_a_cache_leaves_and_enters_transforms() -> None:
    """As the output of `vmap`, as an argument of it, and as what a gradient or a tangent is taken of."""
    _, acts = torch.vmap(captured(MODEL, "plus", "tree[1][0]"))(X)
    assert type(acts) is ActivationCache
    assert numbers(acts) == numbers({"plus": PLUS, "tree[1][0]": PLUS + 10})
    sums = torch.vmap(lambda acts: acts.map(torch.sum))(acts.select("plus"))
    assert numbers(sums) == numbers({"plus": PLUS.sum(-1)})
    grads = torch.func.grad(lambda acts: (acts["plus"] ** 2).sum())(ActivationCache({"plus": PLUS, "out": X}))
    assert type(grads) is ActivationCache
    assert numbers(grads) == numbers({"plus": 2 * PLUS, "out": X * 0})
    cache = ActivationCache({"a": X})
    out, tangent = torch.func.jvp(lambda acts: acts * 3, (cache,), (cache + 1,))  # pyright: ignore
    assert (numbers(out), numbers(tangent)) == (numbers({"a": X * 3}), numbers({"a": (X + 1) * 3}))
    mapped = torch.vmap(lambda acts: acts["a"], in_dims=(ActivationCache({"a": 1}),))(cache)
    assert torch.equal(mapped, X.T)


def test_a_cache_with_none_in_it_leaves_a_transform_too() -> None:
    """`vmap` wants tensors alone as outputs; what is None for one example is None for all."""
    _, acts = torch.vmap(captured(MODEL, "tree", "tree[1][1]"))(X)
    assert numbers(acts) == numbers({"tree": (PLUS, [PLUS + 10, None]), "tree[1][1]": None})


def test_a_cache_under_vmap_is_that_of_each_example() -> None:
    """Parts are read, and arithmetic is done, inside."""
    out = torch.vmap(lambda x: (captured(MODEL, "plus")(x)[1] - 1)["plus[-1]"])(X)
    assert torch.equal(out, PLUS[:, -1] - 1)


def test_patch_takes_a_plain_dict_where_it_takes_a_cache() -> None:
    acts = run("plus#0", "tree[1][0]") * 0
    for values in (acts, dict(acts)):
        with patch(MODEL, values), capture(MODEL, "plus", "tree") as seen:
            MODEL(X)
        assert numbers(seen) == numbers({"plus": X * 0 + 1, "tree": (X * 0 + 1, [X * 0, None])})


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_same_values_and_is_another_cache() -> None:
    acts = run("plus", "tree")
    for other in (acts.copy(), copy.copy(acts)):
        assert type(other) is ActivationCache
        assert list(other) == list(acts)
        assert all(other[key] is acts[key] for key in acts)
        del other["plus"]
        assert "plus" in acts


def test_deep_copies_and_pickles_have_values_of_their_own(tmp_path: Path) -> None:
    acts = run("plus", "tree", keep="all")
    torch.save(acts, tmp_path / "acts")
    for other in (
        copy.deepcopy(acts),
        pickle.loads(pickle.dumps(acts)),
        torch.load(tmp_path / "acts", weights_only=False),
    ):
        assert type(other) is ActivationCache
        assert numbers(other) == numbers(acts)
        assert other["plus"][0].data_ptr() != acts["plus"][0].data_ptr()
        assert len(other.calls("plus")) == 2
        assert numbers(other["tree[1][0][0]"]) == numbers(acts["tree[1][0][0]"])


# --- how it is shown --------------------------------------------------------------------------------------------------


def test_repr_has_structures_and_never_contents() -> None:
    acts = ActivationCache({"h.0": X, "h.10@input": {"a": (X.double(), None), "b": "secret"}})
    assert repr(acts) == str(acts) == (
        "ActivationCache: 2 sites, 72 bytes\n"
        "  h.0         Tensor[2, 3] float32\n"
        "  h.10@input  {a: (Tensor[2, 3] float64, None), b: str}"
    )  # fmt: skip
    assert (
        repr(ActivationCache({"a": torch.zeros(512)})) == "ActivationCache: 1 site, 2.0 KiB\n  a  Tensor[512] float32"
    )
    assert repr(ActivationCache()) == "ActivationCache: 0 sites, 0 bytes"


def test_the_notebook_shows_a_table_and_never_contents() -> None:
    acts = ActivationCache({"h.0": X, "<b>": {"a": "<i>secret</i>"}})
    assert acts._repr_html_() == (
        "<table><caption>ActivationCache: 2 sites, 24 bytes</caption>"
        "<tr><th>site</th><th>value</th></tr>"
        "<tr><td><code>h.0</code></td><td>Tensor[2, 3] float32</td></tr>"
        "<tr><td><code>&lt;b&gt;</code></td><td>{a: str}</td></tr></table>"
    )
    assert "ActivationCache: 1 site, 24 bytes" in ActivationCache({"a": X})._repr_html_()


def test_a_representation_stays_short() -> None:
    """A thousand calls of one site are one line."""
    acts = ActivationCache()
    for _ in range(1000):
        acts.record("plus", X, keep="all")
    assert len(repr(acts)) < 200
    assert len(acts._repr_html_()) < 400
