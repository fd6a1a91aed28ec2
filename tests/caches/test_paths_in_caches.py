"""What a path means in a cache: what it means in a model, however it is spelled."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from gallery.calling import AddsByName
from torch import Tensor, nn

from nicehooks import ActivationCache, NiceHooksError, NotCaptured, SiteNotFound, capture, edit, patch

MODEL = AddsByName()
X = torch.arange(8.0).reshape(2, 4)


def run(*where: Any, **options: Any) -> ActivationCache:
    with capture(MODEL, *where, **options) as acts:
        MODEL(X)
    return acts


# --- ports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["adds", "a*", "*", "{adds,twice}", ["adds"]])
def test_a_path_without_a_port_selects_outputs_and_nothing_else(where: Any) -> None:
    acts = run("adds", "twice", "adds@input[0]", "adds@input", "adds[0]", "twice#0")
    assert set(acts.select(where)) <= {"adds", "twice"}
    with patch(MODEL, acts.select("adds")) as patched:
        assert "@" not in repr(patched)
        MODEL(X)


def test_gradients_and_values_are_selected_apart() -> None:
    x = X.clone().requires_grad_()
    with capture(MODEL, "*", "*@grad", "adds@input.grad[0]") as acts:
        MODEL(x).sum().backward()
    assert set(acts.select("*")) == {"adds", "twice"}
    assert set(acts.select("*@grad")) == {"adds@grad", "twice@grad"}
    assert list(acts.select("*@input.grad[*]")) == ["adds@input.grad[0]"]


@pytest.mark.parametrize("held", ["adds@input[0]", "adds[0]", "adds@grad"])
def test_what_is_not_there_is_not_selected_by_something_like_it(held: str) -> None:
    with pytest.raises(SiteNotFound, match="nearest"):
        ActivationCache({held: X}).select("adds")


# --- spellings --------------------------------------------------------------------------------------------------------

SPELLINGS = [
    ("adds@input[0]", "adds@input['x']"),
    ("adds@input['x']", "adds@input[0]"),
    ("adds@input[1]", 'adds@input["y"]'),
    ("adds@input['y'][:, 1]", "adds@input[1][:,1]"),
    ("adds[:,2]", "adds[:, 2]"),
    ("adds[ :, 2 ]", "adds[:,2]"),
]


@pytest.mark.parametrize(("asked", "other"), SPELLINGS)
def test_a_site_is_found_under_each_of_its_spellings(asked: str, other: str) -> None:
    acts = run(asked)
    for path in (asked, other):
        assert path in acts
        assert torch.equal(acts[path], next(iter(acts.values())))
        assert torch.equal(acts.select(path)[path], acts[asked])
        assert len(acts.calls(path)) == 1
    assert acts.pop(other) is not None
    assert len(acts) == 0


def test_a_part_is_found_in_what_was_captured_under_another_spelling() -> None:
    acts = run("adds@input[1]")
    assert acts["adds@input['y'][:, 1]"].tolist() == (2 * X)[:, 1].tolist()
    assert list(acts.select("*@input['y'][:, {}]".format("*"))) == [f"adds@input['y'][:, {at}]" for at in range(4)]


@pytest.mark.parametrize("where", ["adds@input[0][:, *]", "adds@input['x'][:, *]", "adds@input[1]/2[:, *]"])
def test_what_stands_for_several_sites_is_stored_under_the_spelling_it_was_asked_for(where: str) -> None:
    acts = run(where)
    assert list(acts) == [where.replace("*", str(at)) for at in range(len(acts))]
    assert len(acts) > 1
    assert list(acts.select(where)) == list(acts)
    with edit(MODEL, where, lambda value: None), patch(MODEL, acts):
        MODEL(X)


def test_another_spelling_is_not_another_site() -> None:
    with pytest.raises(NotCaptured):
        run("adds@input[0]")["adds@input['y']"]
    with pytest.raises(SiteNotFound):
        run("adds@input[0]").select("*@input['y']")


# --- calls ------------------------------------------------------------------------------------------------------------


def test_one_call_among_all_is_asked_for_by_calls() -> None:
    with pytest.raises(NotCaptured) as caught:
        run("twice", keep="all")["twice#1"]
    assert str(caught.value) == (
        "'twice#1' is one call, but this cache of 1 site holds all calls of that site together.\n"
        '    acts.calls("twice")[1]  # in the order in which they were made, over all steps'
    )


def test_all_calls_among_single_ones_are_asked_for_by_calls() -> None:
    acts = run("twice#*")
    with pytest.raises(NotCaptured) as caught:
        acts["twice"]
    assert 'acts.calls("twice")  # a list of them' in str(caught.value)
    assert len(acts.calls("twice")) == 2


# --- what the user does with it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [lambda acts: acts.__setitem__("twice", 0), lambda acts: acts.__delitem__("twice")])
def test_a_value_that_nobody_has_read_is_free_when_it_leaves_the_cache(drop: Any) -> None:
    model, alive = nn.Sequential(nn.Linear(3, 3)), []
    model.add_module("twice", nn.ReLU())
    model.twice.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))  # pyright: ignore
    gc.collect()
    with torch.no_grad(), capture(model, "twice") as acts:
        model(torch.ones(1, 3))
    assert alive[0]() is not None
    drop(acts)
    assert alive[0]() is None


def test_a_value_of_the_users_own_is_not_watched() -> None:
    acts = run("adds")
    acts["adds"] = mine = torch.ones(2)
    mine.add_(1)
    assert acts["adds"] is mine


def test_a_key_that_is_not_there_cannot_be_deleted() -> None:
    with pytest.raises(KeyError, match="nearest: adds"):
        del run("adds")["ads"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_absolute_values_and_means() -> None:
    acts = ActivationCache({"a": -X, "b": (X, [None, X - 3])})
    assert acts.abs()["b[1][1]"].tolist() == (X - 3).abs().tolist()
    assert acts.abs()["b[1][0]"] is None
    assert acts.mean(0)["a"].tolist() == (-X).mean(0).tolist()
    assert acts.mean(-1, keepdim=True)["b[0]"].shape == (2, 1)
    assert acts.mean((0, 1))["a"].item() == acts.mean()["a"].item() == -3.5


REFUSED = {
    "mean": (lambda acts: acts.mean(0), {"a": X, "b": X.long()}, "mean(0) at 'b': it does not work for Tensor[2, 4]"),
    "dim": (lambda acts: acts.mean(7), {"a": X}, "mean(7) at 'a': "),
    "index": (lambda acts: acts.index(9), {"a": X}, "index(9) at 'a': "),
    "abs": (lambda acts: acts.abs(), {"a": X > 0}, "abs() at 'a': "),
    "truth": (lambda acts: acts - acts, {"a": X > 0}, "at 'a': Tensor[2, 4] bool and Tensor[2, 4] bool do not go"),
    "number": (lambda acts: acts - True, {"a": X > 0}, "at 'a': Tensor[2, 4] bool and True do not go together"),
    "stack": (lambda acts: ActivationCache.cat([acts, {"a": X[:, :2]}]), {"a": X}, "at 'a': Tensor[2, 4] float32, T"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_said_with_the_site(case: str) -> None:
    do, values, message = REFUSED[case]
    with pytest.raises(NiceHooksError) as caught:
        do(ActivationCache(values))
    assert str(caught.value).startswith(message)


def test_what_a_function_of_the_user_raises_stays_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        ActivationCache({"a": X}).map(lambda tensor: 1 / 0)
    with pytest.raises(RuntimeError, match="mine"):
        ActivationCache({"a": X}).map(_fails)


def _fails(tensor: Tensor) -> Tensor:
    raise RuntimeError("mine")


def test_caches_of_batches_become_one() -> None:
    first, second = run("*", "twice#*"), run("*", "twice#*")
    both = ActivationCache.cat([first, dict(second)])
    assert list(both) == list(first)
    assert both["adds"].shape == (4, 4)
    assert ActivationCache.cat([first, second, first], dim=1)["twice#1"].shape == (2, 12)
    tree = ActivationCache({"a": (X, {"b": [X, None, "text"]})})
    assert ActivationCache.cat([tree, tree])["a[1]['b'][0]"].shape == (4, 4)
    assert ActivationCache.cat(iter([tree, tree]))["a[1]['b']"][1:] == [None, "text"]


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ([], "cat takes at least one cache: there is none."),
        ([{"a": X}, {"b": X}], "cat takes caches of the same sites; cache 1: 'a' is not in this cache of 1 site"),
        ([{"a": X}, {"a": X, "b": X}], "cat takes caches of the same sites; cache 0: 'b' is not in this cache"),
        ([{"a": X}, {"a": (X,)}], "at 'a': Tensor[2, 4] float32, (Tensor[2, 4] float32) cannot be put end to end"),
    ],
)
def test_caches_that_are_no_batches_of_one_run_are_refused(caches: Any, message: str) -> None:
    with pytest.raises(NiceHooksError) as caught:
        ActivationCache.cat(caches)
    assert str(caught.value).startswith(message)


def test_a_part_is_in_a_cache_where_it_can_be_read() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    with capture(model, "*", keep="all") as acts:
        model(torch.ones(4, 2)), model(torch.ones(5, 2))
    assert [text in acts for text in ("1[3]", "1[4]", "1[:, -3]", "1[:, 3]", "1['x']")] == [1, 0, 1, 0, 0]
    assert acts.get("1[4]") is None and [call.shape[0] for call in acts.get("1[:, 2]")] == [4, 5]


def test_what_selects_nothing_is_told_what_there_is_and_not_to_select() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    with capture(model, "*[:, -1]") as acts:
        model(torch.ones(4, 2))
    for wanted in (lambda: acts.select("*"), lambda: acts.stack("*[:, 0]")):
        with pytest.raises(SiteNotFound, match=r"nearest: .*\[:, -1\]"):
            wanted()
