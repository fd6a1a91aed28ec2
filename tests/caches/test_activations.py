"""`ActivationCache`: a dict of values by path, what is read from it, and what one does with it."""

from __future__ import annotations

import copy
import operator
import pickle
import re
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from gallery.returning import GivesStates
from gallery.trees import SeveralKinds
from gallery.values import Output, Pair, Record
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nicehooks import (
    ActivationCache,
    ModulePath,
    NiceHooksError,
    NotCaptured,
    PathError,
    SiteNotFound,
    StaleActivation,
    TreeMismatch,
    capture,
    captured,
    patch,
    select,
)

MODEL = SeveralKinds()
X = torch.arange(6.0).reshape(2, 3)


def run(*where: Any, **options: Any) -> ActivationCache:
    with capture(MODEL, *where, **options) as acts:
        MODEL(X)
    return acts


def numbers(value: Any) -> Any:
    """A value with plain lists for its tensors, and plain dicts for its caches."""
    if isinstance(value, ActivationCache):
        return {key: numbers(child) for key, child in value.items()}
    return torch_pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, value)


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

PLUS = X + 2
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


# --- arithmetic -------------------------------------------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("number", [2, 0.5, -1.5])
def test_arithmetic_with_a_number_is_that_of_every_tensor(op: Any, number: Any) -> None:
    """On either side; in trees too, where what is no tensor stays."""
    acts = ActivationCache({"a": X, "b": (X + 1, [None, "text", X.double()])})
    for made, expected in ((op(acts, number), lambda t: op(t, number)), (op(number, acts), lambda t: op(number, t))):
        assert type(made) is ActivationCache
        assert numbers(made) == numbers(
            {"a": expected(X), "b": (expected(X + 1), [None, "text", expected(X.double())])}
        )
        assert made["b[1][2]"].dtype == torch.float64


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("kind", [ActivationCache, dict, OrderedDict])
def test_arithmetic_of_caches_is_on_the_common_keys(op: Any, kind: Any) -> None:
    """In the order of the left one; with a plain dict on either side."""
    left = ActivationCache({"a": X, "b": X + 1, "c": (X + 2, None)})
    right = kind({"c": (X + 5, None), "d": X, "b": X + 7})
    made = op(left, right)
    assert type(made) is ActivationCache
    assert list(made) == ["b", "c"]
    assert numbers(made) == numbers({"b": op(X + 1, X + 7), "c": (op(X + 2, X + 5), None)})
    other = op(right, left)
    assert type(other) is ActivationCache
    assert numbers(other) == numbers({"b": op(X + 7, X + 1), "c": (op(X + 5, X + 2), None)})


def test_a_sequence_is_combined_with_another_by_position() -> None:
    """So that what was loaded, where named tuples have become tuples, fits what is captured."""
    pair, plain = ActivationCache({"a": Pair(X, None)}), ActivationCache({"a": (X + 1, None)})
    assert numbers(plain - pair) == numbers({"a": (X * 0 + 1, None)})
    assert type((pair - plain)["a"]) is Pair
    with pytest.raises(TreeMismatch):
        plain - {"a": {"left": X, "right": None}}


def test_caches_can_be_summed_and_averaged() -> None:
    one, other = run("plus"), run("plus") + 2
    mean = sum([one, other]) / 2
    assert numbers(mean) == numbers({"plus": PLUS + 1})
    assert numbers(-one) == numbers({"plus": -PLUS})


@pytest.mark.parametrize(("left", "right"), [("plus", "out"), ("plus", None), (None, "out")])
def test_arithmetic_of_caches_without_a_common_key_is_refused(left: str | None, right: str | None) -> None:
    one, other = (ActivationCache() if where is None else run(where) for where in (left, right))
    shown = [repr(where) if where else "an empty one" for where in (left, right)]
    with pytest.raises(SiteNotFound) as caught:
        one - other
    assert str(caught.value) == f"these caches have no site in common: {shown[0]}, and {shown[1]}."
    assert ActivationCache() - {} == {}


ARITHMETIC_ERRORS: dict[str, tuple[Any, Any, str]] = {
    "shapes": (X, X[:, :2], "at 'a': Tensor[2, 3] float32 and Tensor[2, 2] float32 do not broadcast."),
    "lengths": (
        (X,),
        (X, X),
        "at 'a': (Tensor[2, 3] float32) and (Tensor[2, 3] float32, Tensor[2, 3] float32) have different structures.",
    ),
    "keys": (
        {"x": X},
        {"y": X},
        "at 'a': {x: Tensor[2, 3] float32} and {y: Tensor[2, 3] float32} have different structures.",
    ),
    "a tensor and None": (X, None, "at 'a': Tensor[2, 3] float32 and None have different structures."),
    "None and a tensor": (None, X, "at 'a': None and Tensor[2, 3] float32 have different structures."),
    "a tensor and a tuple": (
        X,
        (X,),
        "at 'a': Tensor[2, 3] float32 and (Tensor[2, 3] float32) have different structures.",
    ),
}


@pytest.mark.parametrize("case", ARITHMETIC_ERRORS)
def test_caches_that_do_not_fit_say_where(case: str) -> None:
    one, other, message = ARITHMETIC_ERRORS[case]
    with pytest.raises(TreeMismatch) as caught:
        ActivationCache({"b": X, "a": one}) - ActivationCache({"b": X, "a": other})
    assert str(caught.value) == message


def test_arithmetic_with_anything_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        run("plus") + "text"
    with pytest.raises(TypeError, match="unsupported operand"):
        None - run("plus")


# --- every tensor -----------------------------------------------------------------------------------------------------


def trees() -> ActivationCache:
    x = X.clone().requires_grad_() * 1
    return ActivationCache({"a": x, "b": (x, [None, {"c": Pair(x, "text")}]), "d": Output(logits=x)})


def test_map_applies_to_every_tensor_and_keeps_every_type() -> None:
    acts = trees()
    made = acts.map(lambda tensor: tensor.sum(dim=-1))
    assert type(made) is ActivationCache
    assert list(made) == ["a", "b", "d"]
    sums = X.sum(dim=-1).tolist()
    assert numbers(made["a"]) == sums
    assert numbers(made["b"]) == (sums, [None, {"c": Pair(sums, "text")}])
    assert type(made["b"][1][1]["c"]) is Pair
    assert type(made["d"]) is Output
    assert acts["a"].shape == (2, 3)


def test_detach_clone_and_to_are_those_of_a_tensor() -> None:
    acts = trees()
    inner = "b[1][1]['c'][0]"
    assert acts[inner].requires_grad
    assert not acts.detach()[inner].requires_grad
    assert acts.detach()[inner].data_ptr() == acts[inner].data_ptr()
    assert acts.clone()[inner].data_ptr() != acts[inner].data_ptr()
    assert torch.equal(acts.clone()[inner], acts[inner])
    for arguments, options in [((torch.float64,), {}), (("cpu", torch.float64), {}), ((), {"dtype": torch.float64})]:
        assert acts.to(*arguments, **options)[inner].dtype == torch.float64
    assert acts.to("cpu")[inner] is acts[inner]
    assert acts.to("meta")[inner].device.type == "meta"


@pytest.mark.parametrize("key", [0, -1, slice(0, 1), (slice(None), 0), None, ..., [1, 0], torch.tensor([True, False])])
def test_index_indexes_every_tensor(key: Any) -> None:
    made = trees().index(key)
    for path in ("a", "b[0]", "b[1][1]['c'][0]", "d['logits']"):
        assert torch.equal(made[path], X[key])
    assert made["b[1][0]"] is None


# --- parts of a cache -------------------------------------------------------------------------------------------------

SOME = ActivationCache({f"h.{i}{port}": X + i for i in range(11) for port in ("", "@input[0]")} | {"head": X})
SELECTIONS: dict[str, tuple[Any, list[str]]] = {
    "a path": ("h.3", ["h.3"]),
    "a wildcard": ("h.1*", ["h.1", "h.10"]),
    "a port": ("h.3@input[0]", ["h.3@input[0]"]),
    "a wildcard with a port": ("h.1*@input[0]", ["h.1@input[0]", "h.10@input[0]"]),
    "alternatives": ("h.{2,10}@input[0]", ["h.2@input[0]", "h.10@input[0]"]),
    "a part": ("h.{2..3}@input[0][:, -1]", ["h.2@input[0][:, -1]", "h.3@input[0][:, -1]"]),
    "a part of one": ("head[0]", ["head[0]"]),
    "a list": (["head", "h.3@input[0]"], ["head", "h.3@input[0]"]),
    "a tuple": (("head",), ["head"]),
    "True": (True, list(SOME)),
    "False": (False, []),
    "a parsed path": (ModulePath.parse("head"), ["head"]),
    "a predicate": (lambda key: key.endswith("d"), ["head"]),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_select_is_a_part_of_the_cache(case: str) -> None:
    where, keys = SELECTIONS[case]
    part = SOME.select(where)
    assert type(part) is ActivationCache
    assert list(part) == keys
    assert all(torch.equal(part[key], SOME[key]) for key in keys)


def test_select_takes_regular_expressions_over_the_keys() -> None:
    assert list(SOME.select(re.compile(r"^h\.\d$"))) == [f"h.{i}" for i in range(10)]
    assert list(SOME.select([re.compile(r"^h\.0"), "head"])) == ["h.0", "h.0@input[0]", "head"]


@pytest.mark.parametrize("where", ["plus[:, *]", "plus#*", "plus#*[0]", "p*[:, *]", "tree[*]", "tree[1][*]"])
def test_what_selects_in_a_capture_selects_the_same_in_its_cache(where: str) -> None:
    """`acts.select(where)` is everything that `capture(model, where)` has seen."""
    acts = run(where)
    assert list(acts.select(where)) == list(acts)


def test_a_star_selects_the_parts_of_what_was_captured_whole() -> None:
    assert list(run("plus", "tree").select("plus[:, *]")) == ["plus[:, 0]", "plus[:, 1]", "plus[:, 2]"]


@pytest.mark.parametrize("where", [nn.Linear, nn.ReLU(), 3, None])
def test_a_cache_knows_no_modules(where: Any) -> None:
    """So what selects by module is an error of ours that says what a cache can select by."""
    with pytest.raises(NiceHooksError, match="regular expression"):
        SOME.select(where)


@pytest.mark.parametrize(
    ("where", "shown"), [(re.compile("^plus$"), "'^plus$'"), (str.isdigit, "'isdigit'")], ids=["pattern", "predicate"]
)
def test_a_test_of_the_keys_that_selects_nothing_is_said(where: Any, shown: str) -> None:
    with pytest.raises(SiteNotFound) as caught:
        SOME.select(["head", where])
    assert str(caught.value) == f"{shown} selects nothing in this cache of 23 sites."


def test_a_part_does_not_stand_for_the_whole() -> None:
    with pytest.raises(SiteNotFound):
        run("tree[1][0]").select("tree[1]")


def test_a_module_is_selected_under_each_of_its_names() -> None:
    model = nn.Sequential(nn.ReLU())
    model.add_module("same", model[0])
    with capture(model, "0") as acts:
        model(X)
    assert list(acts.select("same[0]")) == ["same[0]"]
    assert acts.select("same[0]")["same[0]"].tolist() == X[0].tolist()


def test_stack_is_one_tensor_with_a_new_leading_dimension() -> None:
    stacked = SOME.select("h.{0..2}@input[0]").stack()
    assert torch.equal(stacked, torch.stack([X, X + 1, X + 2]))
    assert torch.equal(SOME.stack("h.{0..2}@input[0][:, -1]"), torch.stack([X[:, -1] + i for i in range(3)]))
    assert torch.equal(SOME.stack(["head", "h.1@input[0]"]), torch.stack([X, X + 1]))
    assert ActivationCache({"a": X, "b": X}).stack().shape == (2, 2, 3)


STACKS: dict[str, tuple[ActivationCache, Any, str]] = {
    "shapes": (
        ActivationCache({"a": X, "b": X[0]}),
        True,
        "only tensors of one shape and dtype can be stacked, but here are a: Tensor[2, 3] float32, "
        "b: Tensor[3] float32.",
    ),
    "dtypes": (
        ActivationCache({"a": X, "b": X.double()}),
        True,
        "only tensors of one shape and dtype can be stacked, but here are a: Tensor[2, 3] float32, "
        "b: Tensor[2, 3] float64.",
    ),
    "trees": (
        ActivationCache({"a": (X,)}),
        "a",
        "only tensors of one shape and dtype can be stacked, but here are a: (Tensor[2, 3] float32).",
    ),
    "nothing": (ActivationCache(), True, "there is nothing to stack: the cache is empty."),
    "none of it": (ActivationCache({"a": X}), False, "there is nothing to stack: no site is selected."),
}


@pytest.mark.parametrize("case", STACKS)
def test_what_cannot_be_stacked_is_said(case: str) -> None:
    acts, where, message = STACKS[case]
    with pytest.raises(NiceHooksError) as caught:
        acts.stack(where)
    assert str(caught.value) == message


@pytest.mark.parametrize("where", ["plus", "plus#*"])
def test_calls_are_the_values_of_each_call(where: str) -> None:
    """However they were captured."""
    acts = run(where, keep="all" if where == "plus" else "last")
    assert numbers(acts.calls("plus")) == [(X + 1).tolist(), (X + 2).tolist()]
    assert numbers(acts.calls("plus[0]")) == [(X[0] + 1).tolist(), (X[0] + 2).tolist()]


def test_one_call_is_a_list_of_one() -> None:
    assert numbers(run("out").calls("out['logits']")) == [(PLUS + 20).tolist()]
    assert numbers(run("out", keep="all").calls("out['logits']")) == [(PLUS + 20).tolist()]
    assert numbers(run("plus#1").calls("plus")) == [PLUS.tolist()]


def test_nbytes_is_the_memory_of_all_tensors_once() -> None:
    assert ActivationCache().nbytes == 0
    assert ActivationCache({"a": X, "b": (X.double(), [None, "text"]), "c": X}).nbytes == 24 + 48
    assert run("plus", keep="all").nbytes == 48


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
