"""`ActivationCache`: a dict of values by path, what is read from it, and what one does with it."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from cached import MODEL, PLUS, X, numbers, run
from gallery.returning import GivesStates
from torch import nn

from nicehooks import (
    ActivationCache,
    ModulePath,
    NotCaptured,
    PathError,
    SiteNotFound,
    StaleActivation,
    TreeMismatch,
    capture,
    patch,
    select,
)

# --- a dict -----------------------------------------------------------------------------------------------------------


def test_a_cache_is_a_dict_in_the_order_of_execution() -> None:
    """Whatever the order in which the sites are named."""
    acts = run("out", "tree", "plus")
    assert isinstance(acts, dict)
    assert list(acts) == list(acts.keys()) == ["plus", "tree", "out"]
    assert list(reversed(acts)) == ["out", "tree", "plus"]
    assert len(acts) == 3
    assert list(run("*", "")) == ["plus", "tree", "out", ""]
    assert not ActivationCache()


def test_a_dict_made_of_a_cache_has_the_same_values() -> None:
    acts = run("*")
    for made in (dict(acts), {**acts}, dict(acts.items()), dict(zip(acts, acts.values(), strict=True)), {} | acts):
        assert type(made) is dict
        assert list(made) == ["plus", "tree", "out"]
        assert all(made[key] is acts[key] for key in acts)


def test_get_and_pop_are_those_of_a_dict() -> None:
    acts = run("plus", "tree")
    plus = acts["plus"]
    assert acts.get("plus") is plus
    assert acts.get("nope") is None
    assert acts.get("nope", 3) == 3
    assert acts.pop("plus") is plus
    assert acts.pop("plus", 3) == 3
    assert list(acts) == ["tree"]
    with pytest.raises(NotCaptured):
        acts.pop("plus")


def test_a_cache_is_written_to_as_a_dict_is() -> None:
    acts = ActivationCache({"a": X})
    acts["b"] = X + 1
    acts.update({"c": X + 2}, d=X + 3)
    acts |= {"e": X + 4}
    del acts["a"]
    assert acts.setdefault("b", None) is acts["b"]
    assert [acts[key][0, 0].item() for key in acts] == [1.0, 2.0, 3.0, 4.0]
    assert list(acts) == ["b", "c", "d", "e"]
    assert acts.popitem()[0] == "e"
    acts.clear()
    assert dict(acts) == {}


def test_caches_are_merged_as_dicts_are() -> None:
    one, other = ActivationCache({"a": X, "b": X}), {"b": X + 1}
    merged = one | other
    assert type(merged) is ActivationCache
    assert list(merged) == ["a", "b"]
    assert merged["b"][0, 0].item() == 1.0
    assert one["b"] is X


def test_a_cache_is_made_of_what_a_dict_is_made_of() -> None:
    for values in ({"a": X}, [("a", X)], iter([("a", X)]), ActivationCache({"a": X})):
        assert ActivationCache(values)["a"] is X


def test_keep_is_one_of_three() -> None:
    with pytest.raises(ValueError, match=r"^keep='some': it is 'first', 'last' or 'all'$"):
        capture(MODEL, "plus", keep="some")  # pyright: ignore[reportArgumentType]
    first, last = run("plus", keep="first"), run("plus", keep="last")
    assert numbers(first) == numbers({"plus": X + 1})
    assert numbers(last) == numbers({"plus": X + 2})


def test_a_site_that_two_items_select_is_captured_once_per_call() -> None:
    assert {key: len(calls) for key, calls in run("plus", "*", nn.Module, keep="all").items()} == {
        "plus": 2,
        "tree": 1,
        "out": 1,
        "": 1,
    }


# --- reading ----------------------------------------------------------------------------------------------------------

READS: dict[str, tuple[Any, str, Any]] = {
    "itself": ("plus", "plus", PLUS),
    "a position": ("plus", "plus[:, -1]", PLUS[:, -1]),
    "a chain": ("plus", "plus[0][1:]", PLUS[0][1:]),
    "heads": ("plus", "plus/3[:, 1]", PLUS[:, 1:2]),
    "new dimensions": ("plus", "plus[..., None, 0]", PLUS[..., None, 0]),
    "an element": ("tree", "tree[0][:, -1]", PLUS[:, -1]),
    "a nested element": ("tree", "tree[1][0]", PLUS + 10),
    "an element that is None": ("tree", "tree[1][1]", None),
    "a part of an element": ("tree[1]", "tree[1][0][0]", PLUS[0] + 10),
    "a key": ("out", "out['logits'][0]", PLUS[0] + 20),
    "a key of a key": ("out['states']", "out['states'][0][:, 0]", PLUS[:, 0]),
    "a call": ("plus#0", "plus#0[0]", X[0] + 1),
    "one of all calls": ("plus#*", "plus#1[0]", PLUS[0]),
    "an input": ("out@input", "out@input[0]", PLUS),
    "an input by name": ("out@input", "out@input['hidden_states'][0]", PLUS[0]),
    "one head of an input": ("out@input[0]", "out@input[0]/3[:, 2]", PLUS[:, 2:]),
    "the model": ("", "[0]", PLUS[0] + 20),
    "other blanks": ("plus[:, -1]", "plus[ : ,-1 ]", PLUS[:, -1]),
    "other quotes": ("out['logits']", 'out["logits"]', PLUS + 20),
    "the name of the port": ("plus", "plus@output[0]", PLUS[0]),
    "one of a star": ("plus[:, *]", "plus[:, 2]", PLUS[:, 2]),
}


@pytest.mark.parametrize("case", READS)
def test_a_path_may_be_more_specific_than_what_was_captured(case: str) -> None:
    where, path, expected = READS[case]
    acts = run(where)
    for key in (path, ModulePath.parse(path)):
        assert key in acts
        torch.testing.assert_close(acts[key], expected, rtol=0, atol=0)
        torch.testing.assert_close(acts.get(key, "other"), expected, rtol=0, atol=0)


def test_a_part_is_a_view_and_the_whole_is_the_models_own_tensor() -> None:
    acts = run("plus")
    assert acts["plus[:, -1]"]._base is acts["plus"]


def test_a_site_finds_its_value() -> None:
    (site,) = select(MODEL, "tree[0]")
    acts = run("tree")
    assert acts[site] is acts["tree[0]"]
    assert site in acts
    assert run(site)[site] is not None


def test_a_part_of_all_calls_is_that_part_of_each() -> None:
    acts = run("plus", keep="all")
    assert numbers(acts["plus[:, -1]"]) == [[3.0, 6.0], [4.0, 7.0]]


def test_what_is_not_there_is_not_in_the_cache() -> None:
    acts = run("plus[0]")
    for path in ("plus", "plus[1]", "out", "plus#0", "plus@input", "nope", 3, None):
        assert path not in acts


MISSING: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: run("plus")["pluss"], "'pluss' is not in this cache of 1 site (nearest: plus)."),
    "another port": (
        lambda: run("plus", "out")["out@input"],
        "'out@input' is not in this cache of 2 sites (nearest: out, plus).",
    ),
    "the whole of a part": (
        lambda: run("tree[0]")["tree"],
        "'tree' is not in this cache of 1 site (nearest: tree[0]).",
    ),
    "nothing alike": (
        lambda: ActivationCache(dict.fromkeys("abcd", X))["xyz"],
        "'xyz' is not in this cache of 4 sites (nearest: a, b, c).",
    ),
    "an empty cache": (lambda: ActivationCache()["plus"], "'plus' is not in this cache of 0 sites (it is empty)."),
    "calls": (lambda: run("plus").calls("tree"), "'tree' is not in this cache of 1 site (nearest: plus)."),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_was_not_captured_is_said_with_the_nearest_keys(case: str) -> None:
    """The error is a `KeyError`, as of any dict, but shows its message as it is."""
    act, message = MISSING[case]
    with pytest.raises(NotCaptured) as caught:
        act()
    assert str(caught.value) == message
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, SiteNotFound)


def test_a_selection_of_nothing_is_said_with_the_nearest_keys() -> None:
    """Beside good ones too."""
    with pytest.raises(SiteNotFound) as caught:
        run("plus", "tree").select(["plus", "tee"])
    assert str(caught.value) == "'tee' is not in this cache of 2 sites (nearest: tree)."


@pytest.mark.parametrize("path", ["plus[:, *]", "*", "p*[0]", "{plus,out}", "plus#*"])
def test_a_path_that_means_several_sites_is_for_select(path: str) -> None:
    with pytest.raises(NotCaptured) as caught:
        run("*")[path]
    assert f'.select("{path}")' in str(caught.value)


def test_a_wrong_part_says_which_and_of_what() -> None:
    with pytest.raises(TreeMismatch) as caught:
        run("plus")["plus[:, 3]"]
    assert str(caught.value) == "'plus[:, 3]' in this cache: [:, 3] is out of range for Tensor[2, 3] float32."
    with pytest.raises(PathError):
        run("plus")["plus[:, 3"]


# --- stale values -----------------------------------------------------------------------------------------------------


def stale(**options: Any) -> ActivationCache:
    """A cache in which `0` has been overwritten in place, and `1` is as it was captured."""
    model = nn.Sequential(GivesStates(lambda x: x + 1), GivesStates(lambda x: x.mul_(2) + 1))
    with capture(model, "*", **options) as acts:
        model(X)
    return acts


READERS: dict[str, Callable[[ActivationCache], Any]] = {
    "[]": lambda acts: acts["0"],
    "[] of a part": lambda acts: acts["0[:, -1]"],
    "get": lambda acts: acts.get("0"),
    "pop": lambda acts: acts.pop("0"),
    "popitem": lambda acts: (acts.popitem(), acts.popitem()),
    "setdefault": lambda acts: acts.setdefault("0", None),
    "values": lambda acts: list(acts.values()),
    "items": lambda acts: list(acts.items()),
    "dict": dict,
    "**": lambda acts: {**acts},
    "| a dict": lambda acts: acts | {},
    "a dict |": lambda acts: {} | acts,
    "update": lambda acts: {}.update(acts),
    "another cache": ActivationCache,
    "copy": lambda acts: acts.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "map": lambda acts: acts.map(torch.abs),
    "detach": lambda acts: acts.detach(),
    "clone": lambda acts: acts.clone(),
    "to": lambda acts: acts.to(torch.float64),
    "index": lambda acts: acts.index(0),
    "select": lambda acts: acts.select("0"),
    "stack": lambda acts: acts.stack(),
    "calls": lambda acts: acts.calls("0"),
    "+": lambda acts: acts + 1,
    "- of another": lambda acts: acts - acts,
    "on the right": lambda acts: 1 - acts,
    "-": lambda acts: -acts,
    "optree": lambda acts: optree.tree_leaves(acts),
    "torch's pytree": torch_pytree.tree_leaves,
    "vmap": lambda acts: torch.vmap(lambda acts: acts["0"])(acts),
    "save": lambda acts: acts.save("/dev/null"),
    "patch": lambda acts: patch(MODEL, acts),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_value_that_was_overwritten_in_place_raises_when_read(reader: str) -> None:
    """However it is read."""
    with pytest.raises(StaleActivation) as caught:
        READERS[reader](stale())
    assert str(caught.value) == (
        "'0' was overwritten in place after it was captured (an in-place layer such as ReLU(inplace=True), or x += y), "
        "so this value is no longer what the site produced.\n"
        '    capture(model, "0", clone=True)  # keeps a copy of its own\n'
        "  run_with_cache, get_caching_hooks and add_caching_hooks take clone=True, too. For run(…), capture around it."
    )
    READERS[reader](stale(clone=True))


def test_what_does_not_read_a_stale_value_does_not_raise() -> None:
    acts = stale()
    assert (list(acts), len(acts), "0" in acts, acts.nbytes) == (["0", "1"], 2, True, 48)
    assert repr(acts).splitlines()[1] == "  0  Tensor[2, 3] float32"
    assert acts["1"].tolist() == (2 * (X + 1) + 1).tolist()
    assert list(acts.select("1")) == ["1"]
    assert acts.keys() == {"0", "1"}
    del acts["0"]
    assert list(acts.values()) == [acts["1"]]


def test_a_clone_has_the_true_value() -> None:
    assert stale(clone=True)["0"].tolist() == (X + 1).tolist()


def test_a_stale_value_that_is_replaced_is_fresh() -> None:
    acts = stale()
    acts["0"] = X
    assert acts["0"] is X


@pytest.mark.parametrize("keep", ["first", "last", "all"])
def test_values_in_trees_and_in_calls_go_stale_too(keep: Any) -> None:
    model = nn.Sequential(GivesStates(lambda x: {"a": (x + 1, None)}), GivesStates(lambda d: d["a"][0].mul_(2)))
    with capture(model, "0", keep=keep) as acts:
        model(X)
        model(X)
    with pytest.raises(StaleActivation):
        acts["0"]
    with pytest.raises(StaleActivation):
        acts["0['a'][0]"]


def test_a_value_made_in_inference_mode_goes_stale_too() -> None:
    """Where tensors have no version counter."""
    with torch.inference_mode():
        acts = stale()
        with pytest.raises(StaleActivation):
            acts["0"]
        assert acts["1"].tolist() == (2 * (X + 1) + 1).tolist()


@pytest.mark.parametrize(
    "made",
    [
        lambda acts: acts.copy(),
        copy.copy,
        ActivationCache,
        lambda acts: acts.select("plus"),
        lambda acts: acts | {},
        lambda acts: ActivationCache() | acts,
    ],
    ids=["copy", "copy.copy", "another cache", "select", "| a dict", "| a cache"],
)
def test_a_cache_made_of_a_cache_notices_as_well(made: Callable[[ActivationCache], ActivationCache]) -> None:
    """It has the very same tensors, so it may be made while the model runs, before they are overwritten."""
    acts = run("plus")
    other = made(acts)
    acts["plus"].add_(1)
    with pytest.raises(StaleActivation):
        other["plus"]


@pytest.mark.parametrize("part", ["plus[0]", "plus[:, 1]"])
def test_a_part_that_was_selected_notices_as_well(part: str) -> None:
    acts = run("plus")
    other = acts.select(part)
    acts["plus"].add_(1)
    with pytest.raises(StaleActivation):
        other[part]


# --- what a cache keeps alive -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drop",
    [
        lambda acts: acts.pop("plus"),
        lambda acts: acts.popitem(),
        lambda acts: acts.clear(),
        lambda acts: acts.__delitem__("plus"),
        lambda acts: acts.__setitem__("plus", None),
        lambda acts: acts.update({"plus": None}),
        lambda acts: acts.__ior__({"plus": None}),
    ],
    ids=["pop", "popitem", "clear", "del", "[]=", "update", "|="],
)
def test_a_value_that_left_the_cache_is_free(drop: Callable[[ActivationCache], Any]) -> None:
    acts = run("plus")
    value = weakref.ref(acts["plus"])
    drop(acts)
    assert value() is None
